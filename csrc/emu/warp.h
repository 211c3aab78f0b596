// Host emulation. Warp shuffles, votes and barriers: every lane deposits its operand, the last one
// to arrive works for all of them.
#pragma once

#include <cstdint>

#include "emu/block.h"

namespace varstream::emu {

[[noreturn]] void throw_absent_source(int lane, int source);

template <typename T>
struct ShuffleOperand {
  T value;
  int source;
  T result;
};

// The value that lane source(own lane) brought. A source outside mask is an error, as the device's
// result is undefined.
template <typename T, typename Source>
T shuffle(T value, const char* name, uint32_t mask, Source source) {
  ShuffleOperand<T> own{value, source(thread().lane), value};
  block().collective(name, mask, &own, [](Block& b, void* const* operands, uint32_t lanes) {
    b.counts().add(Count::kShuffle);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      auto* mine = static_cast<ShuffleOperand<T>*>(operands[lane]);
      if ((lanes >> mine->source & 1) == 0) throw_absent_source(lane, mine->source);
      mine->result = static_cast<ShuffleOperand<T>*>(operands[mine->source])->value;
    }
  });
  return own.result;
}

uint32_t ballot(bool predicate, uint32_t mask);
void sync_warp(uint32_t mask);

}  // namespace varstream::emu
