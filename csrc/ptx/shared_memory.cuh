// Ring 1. The block's dynamic shared memory, and integer additions to it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/block.h"
#endif

namespace varstream::ptx {

// The array of `bytes` bytes at byte `offset`. Emulated, every array stands apart behind guard
// gaps, so each is asked for as a whole, with the same numbers in every thread.
template <typename T>
VARSTREAM_DEVICE T* shared_array(size_t offset, size_t bytes) {
#if defined(VARSTREAM_EMULATED)
  return reinterpret_cast<T*>(emu::block().shared().at(offset, bytes));
#else
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  static_cast<void>(bytes);
  return reinterpret_cast<T*>(shared_memory + offset);
#endif
}

// *at += value, atomically within the block; what was there before.
VARSTREAM_DEVICE int32_t add_shared(int32_t* at, int32_t value) {
#if defined(VARSTREAM_EMULATED)
  const int32_t before = *at;  // emulated threads never run at the same time
  *at += value;
  return before;
#else
  return atomicAdd_block(at, value);
#endif
}

}  // namespace varstream::ptx
