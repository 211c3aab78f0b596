// Ring 2. Which query tiles an attention launch has, and in which order blocks take them.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "varlen/sequence.h"

namespace varstream::varlen {

// One query tile: rows tile * tile_rows and on of a sequence. A query makes rows_per_query rows:
// 1, or the heads of its group where they share a tile.
struct QueryTile {
  int32_t sequence;  // batch: the inert tail; -1: an unused slot, to be skipped
  int32_t tile;
};

struct TileScheduleParams {
  PackedLengths lengths;
  Window window;
  int32_t rows_per_query;
  int32_t tile_rows;
  int32_t tile_keys;
  int32_t max_cost;   // key tiles of the longest sequence; costlier tiles count as this
  int32_t max_tiles;  // slots, see tile_slots()
  QueryTile* tiles;   // (max_tiles,) out: longest first, then unused slots
};

// Slots that any split of total_q queries into `batch` sequences and a tail can fill.
VARSTREAM_HOST_DEVICE int64_t tile_slots(int64_t total_q,
                                         int64_t batch,
                                         int64_t rows_per_query,
                                         int64_t tile_rows) {
  return total_q * rows_per_query / tile_rows + (total_q < batch + 1 ? total_q : batch + 1);
}

}  // namespace varstream::varlen
