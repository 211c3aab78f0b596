// Host emulation. Which threads of a block can run: one bit a thread, one word a warp, so that the
// next one in a cyclic order is found without looking at those that wait.
#pragma once

#include <cstdint>

#include "emu/unchecked.h"

namespace varstream::emu {

inline constexpr int kWarpLanes = 32;
inline constexpr int kMaxWarps = 32;  // 1024 threads

class ReadySet {
 public:
  // Threads 0 to count - 1.
  void fill(int count) {
    *this = {};
    for (int warp = 0; warp * kWarpLanes < count; ++warp) {
      const int lanes = count - warp * kWarpLanes;
      add(warp, lanes < kWarpLanes ? (uint32_t{1} << lanes) - 1 : ~uint32_t{0});
    }
  }

  VARSTREAM_UNCHECKED bool empty() const { return warps_ == 0; }

  VARSTREAM_UNCHECKED void add(int warp, uint32_t lanes) {
    lanes_[warp] |= lanes;
    if (lanes != 0) warps_ |= uint32_t{1} << warp;
  }

  VARSTREAM_UNCHECKED void remove(int warp, int lane) {
    lanes_[warp] &= ~(uint32_t{1} << lane);
    if (lanes_[warp] == 0) warps_ &= ~(uint32_t{1} << warp);
  }

  // The first thread at or after `from`, in a circle. The set must hold one.
  VARSTREAM_UNCHECKED int next(int from) const {
    const int warp = from / kWarpLanes;
    const uint32_t here = lanes_[warp] >> (from % kWarpLanes);
    if (here != 0) return from + __builtin_ctz(here);
    // Round the circle: this warp's own lower lanes come last.
    const uint32_t later = warp + 1 < kMaxWarps ? warps_ >> (warp + 1) << (warp + 1) : 0;
    const int found = __builtin_ctz(later != 0 ? later : warps_);
    return found * kWarpLanes + __builtin_ctz(lanes_[found]);
  }

 private:
  uint32_t warps_ = 0;  // those with a thread that can run
  uint32_t lanes_[kMaxWarps] = {};
};

}  // namespace varstream::emu
