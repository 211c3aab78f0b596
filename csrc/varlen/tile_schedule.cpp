#include "varlen/tile_schedule.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "varlen/tile_schedule_cost.h"
#include "varlen/tile_schedule_params.h"

namespace varstream::varlen {
namespace {

void check_length(const char* name, const char* contract, size_t length, size_t wanted) {
  if (length == wanted) return;
  throw std::invalid_argument(std::string(name) + " must have " + contract + " entries (" +
                              std::to_string(wanted) + "), got " + std::to_string(length));
}

void check_at_least(const char* name, int32_t value, int32_t least) {
  if (value >= least) return;
  throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) +
                              ", got " + std::to_string(value));
}

void check(const TilePlanProblem& p) {
  const size_t entries = p.cu_seqlens_q.size();
  if (entries == 0) throw std::invalid_argument("cu_seqlens_q must have batch + 1 entries, got 0");
  check_length("cu_seqlens_k", "as many as cu_seqlens_q", p.cu_seqlens_k.size(), entries);
  if (p.seqused_k) check_length("seqused_k", "batch", p.seqused_k->size(), entries - 1);
  check_at_least("total_q", p.total_q, 0);
  check_at_least("total_k", p.total_k, 0);
  check_at_least("rows_per_query", p.rows_per_query, 1);
  check_at_least("tile_rows", p.tile_rows, 1);
  check_at_least("tile_keys", p.tile_keys, 1);
  const int64_t rows = int64_t{p.total_q} * p.rows_per_query;
  if (rows > INT32_MAX) {
    throw std::invalid_argument("total_q * rows_per_query must be below 2**31, got " +
                                std::to_string(rows));
  }
}

// What the kernel would be given; max_cost and max_tiles as for a batch whose lengths are true.
TileScheduleParams params_of(const TilePlanProblem& problem) {
  TileScheduleParams p{};
  p.lengths = {problem.cu_seqlens_q.data(),
               problem.cu_seqlens_k.data(),
               problem.seqused_k ? problem.seqused_k->data() : nullptr,
               static_cast<int32_t>(problem.cu_seqlens_q.size() - 1),
               problem.total_q,
               problem.total_k};
  p.window = problem.window;
  p.rows_per_query = problem.rows_per_query;
  p.tile_rows = problem.tile_rows;
  p.tile_keys = problem.tile_keys;
  for (int32_t b = 0; b < p.lengths.batch; ++b) {
    const int64_t keys = sequence_at(p.lengths, b).sk;
    const int64_t cost = ceil_div(keys, int64_t{p.tile_keys});
    p.max_cost = std::max(p.max_cost, static_cast<int32_t>(cost));
  }
  p.max_tiles = static_cast<int32_t>(
      std::min(tile_slots(p.lengths.total_q, p.lengths.batch, p.rows_per_query, p.tile_rows),
               int64_t{INT32_MAX}));
  return p;
}

}  // namespace

std::vector<PlannedTile> plan_tiles(const TilePlanProblem& problem) {
  check(problem);
  const TileScheduleParams p = params_of(problem);
  std::vector<PlannedTile> tiles;
  int64_t left = p.max_tiles;
  for (int32_t b = 0; b <= p.lengths.batch; ++b) {
    const Sequence sequence = sequence_at(p.lengths, b);
    const int64_t count = std::min(tile_count(p, sequence), left);
    for (int64_t tile = 0; tile < count; ++tile) {
      const TileWork work = tile_work(p, sequence, tile);
      tiles.push_back({b,
                       static_cast<int32_t>(tile),
                       static_cast<int32_t>(work.first_row),
                       static_cast<int32_t>(work.last_row),
                       work.keys.begin,
                       work.keys.end,
                       work.cost});
    }
    left -= count;
  }
  const CostBuckets buckets = cost_buckets(p.max_cost);
  std::stable_sort(tiles.begin(), tiles.end(), [&](const PlannedTile& a, const PlannedTile& b) {
    return bucket_of(buckets, a.cost) > bucket_of(buckets, b.cost);
  });
  return tiles;
}

}  // namespace varstream::varlen
