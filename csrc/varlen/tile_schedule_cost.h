// Ring 2. What one query tile covers, what it costs, and the bucket that cost is sorted into; the
// same for the plan on the host and the kernel on the device.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/math.h"
#include "varlen/sequence.h"
#include "varlen/tile_schedule_params.h"

namespace varstream::varlen {

// A multiple of 2^shift in cost shares a bucket, the shift as small as the buckets allow.
inline constexpr int32_t kCostBuckets = 1024;

struct CostBuckets {
  int32_t limit;  // costlier tiles count as this
  int32_t shift;
};

VARSTREAM_HOST_DEVICE CostBuckets cost_buckets(int32_t max_cost) {
  CostBuckets buckets{max_cost < 0 ? 0 : max_cost, 0};
  while (buckets.limit >> buckets.shift >= kCostBuckets) ++buckets.shift;
  return buckets;
}

// 0 to kCostBuckets - 1, higher for costlier tiles.
VARSTREAM_HOST_DEVICE int32_t bucket_of(const CostBuckets& buckets, int32_t cost) {
  return clamp(cost, int32_t{0}, buckets.limit) >> buckets.shift;
}

// Rows of a sequence: every query makes rows_per_query of them.
VARSTREAM_HOST_DEVICE int64_t row_count(const TileScheduleParams& p, const Sequence& s) {
  return int64_t{s.sq} * p.rows_per_query;
}

VARSTREAM_HOST_DEVICE int64_t tile_count(const TileScheduleParams& p, const Sequence& s) {
  return ceil_div(row_count(p, s), int64_t{p.tile_rows});
}

struct TileWork {
  int64_t first_row, last_row;  // of the sequence, last included
  KeyRange keys;                // that any of those rows sees, see visible_keys()
  int32_t cost;                 // key tiles, aligned to tile_keys, that hold such a key
};

// Tile 0 to tile_count() - 1 of sequence s.
VARSTREAM_HOST_DEVICE TileWork tile_work(const TileScheduleParams& p,
                                         const Sequence& s,
                                         int64_t tile) {
  TileWork work{};
  work.first_row = tile * p.tile_rows;
  const int64_t end_row = work.first_row + p.tile_rows;
  const int64_t rows = row_count(p, s);
  work.last_row = (end_row < rows ? end_row : rows) - 1;
  work.keys = visible_keys(static_cast<int32_t>(work.first_row / p.rows_per_query),
                           static_cast<int32_t>(work.last_row / p.rows_per_query),
                           s.sq,
                           s.sk,
                           p.window);
  // A range without keys is 0, 0: whoever sees none stands before the first one, or there are none.
  const int64_t end = ceil_div(int64_t{work.keys.end}, int64_t{p.tile_keys});
  work.cost = static_cast<int32_t>(end - work.keys.begin / p.tile_keys);
  return work;
}

}  // namespace varstream::varlen
