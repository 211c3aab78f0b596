// Ring 1. Warp shuffles, votes and the warp barrier. Every lane of mask must call.
#pragma once

#include <cstdint>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/warp.h"
#endif

namespace varstream::ptx {

inline constexpr uint32_t kFullWarp = 0xFFFFFFFFu;
inline constexpr int kWarpLanes = 32;

// The value of lane ^ distance.
template <typename T>
VARSTREAM_DEVICE T shuffle_xor(T value, int distance, uint32_t mask = kFullWarp) {
#if defined(VARSTREAM_EMULATED)
  return emu::shuffle(value, "shuffle_xor", mask, [=](int lane) { return lane ^ distance; });
#else
  return __shfl_xor_sync(mask, value, distance);
#endif
}

// The value of lane + distance; the lane's own where that is past the warp.
template <typename T>
VARSTREAM_DEVICE T shuffle_down(T value, int distance, uint32_t mask = kFullWarp) {
#if defined(VARSTREAM_EMULATED)
  return emu::shuffle(value, "shuffle_down", mask, [=](int lane) {
    return lane + distance < kWarpLanes ? lane + distance : lane;
  });
#else
  return __shfl_down_sync(mask, value, distance);
#endif
}

// The value of lane `source`.
template <typename T>
VARSTREAM_DEVICE T shuffle(T value, int source, uint32_t mask = kFullWarp) {
#if defined(VARSTREAM_EMULATED)
  return emu::shuffle(value, "shuffle", mask, [=](int) { return source & (kWarpLanes - 1); });
#else
  return __shfl_sync(mask, value, source);
#endif
}

// One bit a lane: whether its predicate holds.
VARSTREAM_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kFullWarp) {
#if defined(VARSTREAM_EMULATED)
  return emu::ballot(predicate, mask);
#else
  return __ballot_sync(mask, predicate);
#endif
}

VARSTREAM_DEVICE bool any(bool predicate, uint32_t mask = kFullWarp) {
  return ballot(predicate, mask) != 0;
}

VARSTREAM_DEVICE bool all(bool predicate, uint32_t mask = kFullWarp) {
  return ballot(predicate, mask) == mask;
}

VARSTREAM_DEVICE void sync_warp(uint32_t mask = kFullWarp) {
#if defined(VARSTREAM_EMULATED)
  emu::sync_warp(mask);
#else
  __syncwarp(mask);
#endif
}

}  // namespace varstream::ptx
