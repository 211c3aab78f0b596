// Ring 3. One value of all threads that share a row, joined in the same order everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"
#include "cross_entropy/residency.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"

namespace varstream::cross_entropy {

inline constexpr int kRowWarps = kRowThreads / ptx::kWarpLanes;

// Shared memory that joins of a Sums take: the warps' and the result, in multiples of 16 bytes.
template <typename Sums>
inline constexpr size_t kJoinBytes = ((kRowWarps + 1) * sizeof(Sums) + 15) / 16 * 16;

// Sums has join(other) and join_lane(distance). A barrier of the cluster and one of the block; the
// memory at `offset` may be used again after another barrier of the cluster.
template <typename Sums>
VARSTREAM_DEVICE Sums join_cluster(Sums sums, int32_t thread, uint32_t cluster, size_t offset = 0) {
  auto* shared = ptx::shared_array<Sums>(offset, kJoinBytes<Sums>);
  const int32_t warp = thread / ptx::kWarpLanes, lane = thread % ptx::kWarpLanes;
  VARSTREAM_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) sums.join_lane(distance);
  if (lane == 0) shared[warp] = sums;
  if (cluster > 1) {
    ptx::cluster_arrive(), ptx::cluster_wait();
  } else {
    ptx::sync_block();
  }
  if (warp == 0) {
    Sums all;
    for (int32_t i = lane; i < static_cast<int32_t>(cluster) * kRowWarps; i += ptx::kWarpLanes) {
      const Sums* own = shared + i % kRowWarps;
      all.join(cluster > 1 ? ptx::load_peer(own, static_cast<uint32_t>(i / kRowWarps)) : *own);
    }
    VARSTREAM_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) all.join_lane(distance);
    if (lane == 0) shared[kRowWarps] = all;
  }
  ptx::sync_block();
  return shared[kRowWarps];
}

}  // namespace varstream::cross_entropy
