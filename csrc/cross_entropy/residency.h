// Ring 3. Where the rows of a launch are held while their gradient is formed; plain C++.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/math.h"

namespace varstream::cross_entropy {

inline constexpr int kWordBytes = 16;    // what a thread moves at once
inline constexpr int kRowThreads = 256;  // of a block
inline constexpr int kStepWords = 2;     // words a thread takes before it waits again
inline constexpr int kStages = 4;        // steps on their way or at work
inline constexpr int kRingSlots = kStepWords * kStages;

struct Residency {
  uint32_t cluster;  // blocks that share a row, a power of two
  int32_t slots;     // 16-byte words a thread holds
  bool kept;         // slots hold all of it; else they are a ring, and the row is read again
};

// What a device lends to a block, beyond what the block uses otherwise.
struct BlockLimits {
  int64_t shared_bytes;  // that a block can ask for
  int64_t fixed_bytes;   // of them used apart from the slots
  int64_t rows;          // that a block holds side by side, each in slots of its own
  uint32_t cluster;      // blocks that a cluster may have, 1 without clusters
};

// A row that is kept costs one read. Two blocks on an SM hide each other's pauses between reading
// and writing, so a row gets the fewest blocks that leave room for that, else the fewest that hold
// it at all. words: of one row. once: whether a row is needed once only.
inline Residency residency_of(int64_t words, bool once, const BlockLimits& limits) {
  constexpr int64_t kReservedBytes = 1 << 10;  // of each block, by the driver
  const Residency ring{1, kRingSlots, false};
  if (once) return ring;
  const int64_t half = (limits.shared_bytes + kReservedBytes) / 2 - kReservedBytes;
  for (const int64_t limit : {half, limits.shared_bytes}) {
    for (uint32_t blocks = 1; blocks <= limits.cluster; blocks *= 2) {
      const int64_t share = ceil_div(words, int64_t{blocks});
      const int64_t slots = ceil_div(share, int64_t{kRowThreads} * kStepWords) * kStepWords;
      const int64_t bytes = limits.fixed_bytes + limits.rows * slots * kRowThreads * kWordBytes;
      if (bytes <= limit) return {blocks, static_cast<int32_t>(slots), true};
    }
  }
  return ring;
}

}  // namespace varstream::cross_entropy
