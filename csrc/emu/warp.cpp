#include "emu/warp.h"

#include <stdexcept>

namespace varstream::emu {

uint32_t ballot(bool predicate, uint32_t mask) {
  struct Operand {
    bool predicate;
    uint32_t result;
  } own{predicate, 0};
  block().collective("ballot", mask, &own, [](Block& b, void* const* operands, uint32_t lanes) {
    b.counts().add(Count::kVote);
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if (lanes >> lane & 1)
        bits |= uint32_t{static_cast<Operand*>(operands[lane])->predicate} << lane;
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if (lanes >> lane & 1) static_cast<Operand*>(operands[lane])->result = bits;
    }
  });
  return own.result;
}

void sync_warp(uint32_t mask) {
  block().collective("sync_warp", mask, nullptr, [](Block&, void* const*, uint32_t) {});
}

void throw_absent_source(int lane, int source) {
  throw std::logic_error(describe(thread()) + ": shuffle of lane " + std::to_string(lane) +
                         " reads lane " + std::to_string(source) + ", which takes no part");
}

}  // namespace varstream::emu
