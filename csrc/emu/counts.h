// Host emulation. How often kernels used what costs time on a device, over all launches.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace varstream::emu {

// Counted once for a warp, except kCpAsync: once for each thread's copy; kBarrier: once for each
// time a barrier is complete; kBankConflict: wavefronts an ldmatrix needs beyond its four.
enum class Count { kLdmatrix, kMma, kCpAsync, kShuffle, kVote, kBarrier, kBankConflict, kNumber };

struct Counts {
  int64_t of[int(Count::kNumber)] = {};
  void add(Count what, int64_t times = 1) { of[int(what)] += times; }
};

// By name: "ldmatrix", "mma", "cp.async", "shuffle", "vote", "barrier", "ldmatrix bank conflicts".
// A copy: clearing it would clear nothing, hence const.
const std::map<std::string, int64_t> instruction_counts();
void reset_instruction_counts();

}  // namespace varstream::emu
