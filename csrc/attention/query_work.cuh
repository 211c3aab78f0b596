// Ring 3. What a block does that owns a tile of query rows.
#pragma once

#include <cstdint>

#include "attention/forward_params.h"
#include "attention/score_modifiers.cuh"
#include "common/thread.h"
#include "tile/shared_tile.cuh"

namespace varstream::attention {

// It lies in shared memory: registers belong to the accumulators.
struct QueryWork {
  int32_t index;  // of the sequence; -1: nothing
  varlen::Sequence sequence;
  int32_t head;  // the first of those packed into the rows
  int32_t kv_head;
  int32_t tile_row;         // of the sequence's rows
  int32_t rows;             // of the sequence
  varlen::KeyRange seen;    // by any row of the tile
  varlen::KeyRange shared;  // by all of them
};
inline constexpr size_t kQueryWorkBytes = 128;
static_assert(sizeof(QueryWork) <= kQueryWorkBytes);

// block = (section * slots + slot) * section_heads + head slot of the section
VARSTREAM_DEVICE QueryWork find_query_work(const ForwardParams& p, int32_t tile_rows) {
  const uint32_t block = block_index().x;
  const uint32_t row = p.section_heads.quotient(block), section = p.slots.quotient(row);
  const varlen::QueryTile at = p.tiles[row - section * p.slots.value];
  QueryWork work{};
  work.index = at.sequence;
  if (at.sequence < 0) return work;
  const uint32_t head_slot = block - (row - section) * p.section_heads.value;
  work.sequence = varlen::sequence_at(p.lengths, at.sequence);
  work.head = static_cast<int32_t>(head_slot * p.pack.value);
  work.kv_head = static_cast<int32_t>(p.group.quotient(work.head));
  work.tile_row = at.tile * tile_rows;
  work.rows = work.sequence.sq * static_cast<int32_t>(p.pack.value);
  const int32_t end = work.rows < work.tile_row + tile_rows ? work.rows : work.tile_row + tile_rows;
  const auto first = static_cast<int32_t>(p.pack.quotient(work.tile_row));
  const auto last = static_cast<int32_t>(p.pack.quotient(end - 1));
  const int32_t sq = work.sequence.sq, sk = work.sequence.sk;
  work.seen = varlen::visible_keys(first, last, sq, sk, p.window);
  work.shared = {varlen::visible_keys(last, sq, sk, p.window).begin,
                 varlen::visible_keys(first, sq, sk, p.window).end};
  return work;
}

// Starts copying the rows from first_row on, each a (query, head) of `from`, which holds rows to
// end_row; those past it become zero.
template <int Threads, typename Tile>
VARSTREAM_DEVICE void load_query_rows(const Tile& to,
                                      int thread,
                                      const Rows& from,
                                      const varlen::Sequence& sequence,
                                      const RowOrder& order,
                                      int32_t first_row,
                                      int32_t end_row,
                                      int dim) {
  using Element = typename Tile::Element;
  const auto* data = static_cast<const Element*>(from.data) + sequence.q0 * from.row_stride;
  tile::gather_rows_async<Threads>(
      to, thread, end_row - first_row, dim, [&](int r) -> const Element* {
        const RowPlace row = order.at(first_row + r);
        return data + row.query * from.row_stride + row.head * from.head_stride;
      });
}

// Starts copying the keys or values from first_key on; those past the sequence's end become zero.
template <int Threads, typename Tile>
VARSTREAM_DEVICE void load_key_rows(const Tile& to,
                                    int thread,
                                    const Rows& from,
                                    const varlen::Sequence& sequence,
                                    int32_t kv_head,
                                    int32_t first_key,
                                    int dim) {
  const auto* data = static_cast<const typename Tile::Element*>(from.data) +
                     kv_head * from.head_stride +
                     (int64_t{sequence.k0} + first_key) * from.row_stride;
  tile::copy_rows_async<Threads>(to, thread, data, from.row_stride, sequence.sk - first_key, dim);
}

}  // namespace varstream::attention
