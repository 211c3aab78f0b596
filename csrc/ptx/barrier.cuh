// Ring 1. Barriers of a block: the whole block's, and the 16 named ones (0 is the whole block's).
#pragma once

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/block.h"
#endif

namespace varstream::ptx {

// All threads of the block.
VARSTREAM_DEVICE void sync_block() {
#if defined(VARSTREAM_EMULATED)
  emu::block().barrier(0, 0, true);
#else
  __syncthreads();
#endif
}

// Waits until `threads` threads (a multiple of 32) have arrived at barrier id, 1 to 15.
VARSTREAM_DEVICE void barrier_sync(int id, int threads) {
#if defined(VARSTREAM_EMULATED)
  emu::block().barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Arrives without waiting: the producer's half.
VARSTREAM_DEVICE void barrier_arrive(int id, int threads) {
#if defined(VARSTREAM_EMULATED)
  emu::block().barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace varstream::ptx
