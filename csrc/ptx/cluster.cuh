// Ring 1. Thread-block clusters of sm_90 and up: a barrier of all their threads, and reading each
// other's shared memory. A kernel finds its number in the cluster as block_index().x % size.
//
// Code for older architectures is never run with a cluster: a block is then alone with itself.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/cluster.h"
#endif

namespace varstream::ptx {

// The barrier in two halves: what a thread wrote before it arrives, every thread of the cluster
// sees after its wait. All threads of all blocks call both, by whole warps.
VARSTREAM_DEVICE void cluster_arrive() {
#if defined(VARSTREAM_EMULATED)
  emu::cluster_arrive();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

VARSTREAM_DEVICE void cluster_wait() {
#if defined(VARSTREAM_EMULATED)
  emu::cluster_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The T at own's place in the shared memory of the cluster's block number `block`, which must not
// have ended: a cluster_arrive behind the last read and a cluster_wait before the end keep it.
template <typename T>
VARSTREAM_DEVICE T load_peer(const T* own, uint32_t block) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0 && alignof(T) % 4 == 0,
                "copied as 32-bit words");
#if defined(VARSTREAM_EMULATED)
  T value;
  emu::load_peer(&value, own, sizeof(T), block);
  return value;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint32_t there, words[sizeof(T) / 4];
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
  VARSTREAM_UNROLL
  for (uint32_t i = 0; i < sizeof(T) / 4; ++i) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(words[i])
                 : "r"(there + 4 * i)
                 : "memory");
  }
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
#else
  static_cast<void>(block);
  return *own;
#endif
}

}  // namespace varstream::ptx
