// Ring 2. Lists the query tiles of a packed batch, longest first, without the host knowing lengths:
// one block, a counting sort by cost.
//
// Threads take sequences kThreads at a time; a scan of their tile counts lays these tiles out in a
// row, and threads take them one by one. So one sequence of many tiles and many sequences of one
// tile are spread over the block alike. No more than max_tiles tiles are ever looked at: lengths
// that lie (overlapping sequences) make neither wild slots nor endless work. Tiles of one bucket
// come in any order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"
#include "common/thread.h"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"
#include "varlen/tile_schedule_cost.h"

namespace varstream::varlen {

struct TileSchedule {
  using Params = TileScheduleParams;
  static constexpr int kThreads = kCostBuckets;  // a thread for each bucket
  static constexpr int kMinBlocks = 1;

  // Shared memory: tiles in each bucket, later its next slot; where each sequence's tiles end
  // among those of its kThreads neighbours; sums of warps.
  static constexpr size_t kBucketBytes = kCostBuckets * sizeof(int32_t);
  static constexpr size_t kEndBytes = kThreads * sizeof(int64_t);
  static constexpr size_t kSumBytes = kThreads / ptx::kWarpLanes * sizeof(int64_t);
  static constexpr size_t kEndOffset = kBucketBytes;
  static constexpr size_t kSumOffset = kEndOffset + kEndBytes;
  static constexpr size_t kSharedBytes = kSumOffset + kSumBytes;
  static_assert(kThreads == ptx::kWarpLanes * ptx::kWarpLanes, "one warp scans the warps' sums");

  struct Shared {
    int32_t* buckets;  // (kCostBuckets,)
    int64_t* ends;     // (kThreads,)
    int64_t* sums;     // (kThreads / 32,)
  };

  static VARSTREAM_DEVICE void run(const Params& p) {
    const Shared shared{ptx::shared_array<int32_t>(0, kBucketBytes),
                        ptx::shared_array<int64_t>(kEndOffset, kEndBytes),
                        ptx::shared_array<int64_t>(kSumOffset, kSumBytes)};
    const CostBuckets buckets = cost_buckets(p.max_cost);
    const auto thread = static_cast<int32_t>(thread_index().x);
    const int32_t bucket = kCostBuckets - 1 - thread;  // the costliest first

    shared.buckets[bucket] = 0;
    const int64_t used = for_each_tile(p, shared, [&](QueryTile, int32_t cost) {
      ptx::add_shared(&shared.buckets[bucket_of(buckets, cost)], 1);
    });
    const int32_t tiles = shared.buckets[bucket];
    const int64_t end = scan(tiles, shared.sums);
    shared.buckets[bucket] = static_cast<int32_t>(end - tiles);
    ptx::sync_block();  // before shared.sums is written again
    for_each_tile(p, shared, [&](QueryTile tile, int32_t cost) {
      p.tiles[ptx::add_shared(&shared.buckets[bucket_of(buckets, cost)], 1)] = tile;
    });
    for (int64_t slot = used + thread; slot < p.max_tiles; slot += kThreads) {
      p.tiles[slot] = {-1, 0};
    }
  }

 private:
  // Calls visit(tile, cost) once for each tile of the batch and its tail, each in some thread; how
  // many there were. All threads call. A barrier stands before the first visit, one after the last.
  template <typename Visit>
  static VARSTREAM_DEVICE int64_t for_each_tile(const Params& p,
                                                const Shared& shared,
                                                const Visit& visit) {
    const auto thread = static_cast<int32_t>(thread_index().x);
    int64_t left = p.max_tiles;
    for (int64_t first = 0; first <= p.lengths.batch && left > 0; first += kThreads) {
      const int64_t own = first + thread;
      int64_t tiles = 0;
      if (own <= p.lengths.batch) {
        tiles = tile_count(p, sequence_at(p.lengths, static_cast<int32_t>(own)));
      }
      shared.ends[thread] = scan(tiles, shared.sums);
      ptx::sync_block();
      const int64_t all = shared.ends[kThreads - 1];
      const int64_t here = all < left ? all : left;
      for (int64_t i = thread; i < here; i += kThreads) {
        const int32_t at = owner_of(i, shared.ends);
        const auto b = static_cast<int32_t>(first + at);
        const int64_t tile = at == 0 ? i : i - shared.ends[at - 1];
        const TileWork work = tile_work(p, sequence_at(p.lengths, b), tile);
        visit(QueryTile{b, static_cast<int32_t>(tile)}, work.cost);
      }
      left -= here;
      ptx::sync_block();
    }
    return p.max_tiles - left;
  }

  // The first of kThreads ascending ends that is past i; the last one must be.
  static VARSTREAM_DEVICE int32_t owner_of(int64_t i, const int64_t* ends) {
    int32_t low = 0;
    for (int32_t step = kThreads / 2; step > 0; step /= 2) {
      if (ends[low + step - 1] <= i) low += step;
    }
    return low;
  }

  // The sum of value over this thread and those below it. All threads call; sums must not be
  // written again before a barrier.
  static VARSTREAM_DEVICE int64_t scan(int64_t value, int64_t* sums) {
    const auto thread = static_cast<int32_t>(thread_index().x);
    const int32_t warp = thread / ptx::kWarpLanes, lane = thread % ptx::kWarpLanes;
    value = scan_warp(value, lane);
    if (lane == ptx::kWarpLanes - 1) sums[warp] = value;
    ptx::sync_block();
    if (warp == 0) sums[lane] = scan_warp(sums[lane], lane);
    ptx::sync_block();
    return warp == 0 ? value : value + sums[warp - 1];
  }

  static VARSTREAM_DEVICE int64_t scan_warp(int64_t value, int32_t lane) {
    VARSTREAM_UNROLL
    for (int32_t distance = 1; distance < ptx::kWarpLanes; distance *= 2) {
      const int64_t below = ptx::shuffle(value, lane < distance ? lane : lane - distance);
      if (lane >= distance) value += below;
    }
    return value;
  }
};

}  // namespace varstream::varlen
