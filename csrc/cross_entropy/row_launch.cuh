// Ring 3. Launching a kernel that gives each row to a cluster of blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cross_entropy/residency.h"
#include "ptx/launch.cuh"

namespace varstream::cross_entropy {

// Chooses p.residency for rows of `words` words, `abreast` of them side by side in a block that
// uses `fixed` bytes of shared memory besides, and launches. once: rows are needed once only.
template <typename Kernel>
void launch_rows(const char* name,
                 typename Kernel::Params p,
                 int64_t rows,
                 int64_t words,
                 int64_t abreast,
                 size_t fixed,
                 bool once,
                 void* stream) {
  const auto shared = static_cast<int64_t>(ptx::max_shared_bytes());
  p.residency = residency_of(
      words,
      once,
      {shared, static_cast<int64_t>(fixed), abreast, ptx::max_cluster_blocks<Kernel>()});
  const int64_t blocks = rows * p.residency.cluster;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("varstream: too many rows of logits for one launch");
  }
  const size_t slots = size_t{kWordBytes} * kRowThreads * p.residency.slots * abreast;
  ptx::launch<Kernel>(
      name, static_cast<uint32_t>(blocks), fixed + slots, p, stream, p.residency.cluster);
}

}  // namespace varstream::cross_entropy
