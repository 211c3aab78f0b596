// Ring 2. The tile schedule as a plan: what the kernel makes on the device, as a pure function of
// the lengths; plain host C++, no torch.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "varlen/sequence.h"

namespace varstream::varlen {

struct TilePlanProblem {
  std::vector<int32_t> cu_seqlens_q;              // (batch + 1,)
  std::vector<int32_t> cu_seqlens_k;              // (batch + 1,)
  std::optional<std::vector<int32_t>> seqused_k;  // (batch,)
  int32_t total_q;                                // at least 0, as total_k
  int32_t total_k;
  Window window;
  int32_t rows_per_query;  // at least 1, as the next two; total_q * rows_per_query below 2^31
  int32_t tile_rows;
  int32_t tile_keys;
};

struct PlannedTile {
  int32_t sequence;             // batch: the inert tail
  int32_t tile;                 // of the sequence
  int32_t first_row, last_row;  // of the sequence, last included
  int32_t key_begin, key_end;   // of the sequence; the keys any of the rows sees, none if not <
  int32_t cost;                 // key tiles
};

// Every tile of every sequence and of the tail, the costliest bucket first (the kernel's buckets,
// with the longest sequence's key tiles as max_cost), within a bucket by sequence and tile. Lengths
// that lie are clamped as the kernel does, and no more than tile_slots() tiles are listed. Throws
// std::invalid_argument naming argument, contract and value.
std::vector<PlannedTile> plan_tiles(const TilePlanProblem& problem);

}  // namespace varstream::varlen
