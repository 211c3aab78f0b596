// Host emulation. How often kernels used what costs time on a device, over all launches.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace varstream::emu {

// Counted once for a warp, except kCpAsync: once for each thread's copy; kBarrier: once for each
// time a barrier is complete, kClusterBarrier the same of clusters; kBankConflict: wavefronts an
// ldmatrix needs beyond its four; kGlobalRead, kGlobalWritten: bytes each thread asks for through
// cp.async, load_global and store_global.
enum class Count {
  kLdmatrix,
  kMma,
  kCpAsync,
  kShuffle,
  kVote,
  kBarrier,
  kBankConflict,
  kClusterBarrier,
  kGlobalRead,
  kGlobalWritten,
  kNumber
};

struct Counts {
  int64_t of[int(Count::kNumber)] = {};
  void add(Count what, int64_t times = 1) { of[int(what)] += times; }
};

// By name: "ldmatrix", "mma", "cp.async", "shuffle", "vote", "barrier", "ldmatrix bank conflicts",
// "cluster barrier", "global bytes read", "global bytes written".
// A copy: clearing it would clear nothing, hence const.
const std::map<std::string, int64_t> instruction_counts();
void reset_instruction_counts();

}  // namespace varstream::emu
