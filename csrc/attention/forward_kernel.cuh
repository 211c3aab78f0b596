// Ring 3. Attention forward over packed sequences with mma.sync (FlashAttention-2, Dao 2023).
//
// A block owns one query tile of one head (or of the heads of a group, packed into its rows) and
// walks the key tiles its rows see, from the last to the first. K of the next tile is on its way
// while V is used, V while K is used; scores never leave registers.
#pragma once

#include "attention/forward_params.h"
#include "attention/forward_traits.h"
#include "attention/score_modifiers.cuh"
#include "common/thread.h"
#include "ptx/barrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "tile/fragment.cuh"
#include "tile/online_softmax.cuh"
#include "tile/shared_tile.cuh"

namespace varstream::attention {

template <typename Traits>
struct Forward {
  using Params = ForwardParams;
  using Element = typename Traits::Element;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kMinBlocks = Traits::kMinBlocks;

  static constexpr int kRows = Traits::kRows, kKeys = Traits::kKeys;
  static constexpr int kTiles = Traits::kWarpTiles;
  using QTile = tile::SharedTile<Element, kRows, Traits::kDim>;
  using KTile = tile::SharedTile<Element, kKeys, Traits::kDim>;
  using VTile = tile::SharedTile<Element, kKeys, Traits::kValueDim>;
  using Scores = tile::Accumulator<kTiles, kKeys / 8>;
  using Output = tile::Accumulator<kTiles, Traits::kValueDim / 8>;

  static VARSTREAM_DEVICE void run(const Params& p) {
    const Forward block(p);
    if (thread_index().x == 0) *block.work_ = find_work(p);
    ptx::sync_block();
    if (block.work_->index < 0) return;
    Output out;
    tile::clear(out);
    tile::OnlineSoftmax<kTiles> softmax;
    softmax.reset();
    block.walk(out, softmax);
    block.finish(out, softmax);
  }

 private:
  // What a block does. It lies in shared memory: registers belong to the accumulators.
  struct Work {
    int32_t index;  // of the sequence; -1: nothing
    varlen::Sequence sequence;
    int32_t head;             // the first of those packed into the rows
    int32_t tile_row;         // of the sequence's rows
    int32_t rows;             // of the sequence
    varlen::KeyRange seen;    // by any row of the tile
    varlen::KeyRange shared;  // by all of them
  };
  static_assert(sizeof(Work) <= Traits::kWorkBytes);

  const Params& p_;
  const QTile q_;
  const KTile k_;
  const VTile v_;
  Work* const work_;
  const int thread_;

  VARSTREAM_DEVICE explicit Forward(const Params& p)
      : p_(p),
        q_{ptx::shared_array<Element>(0, Traits::kQBytes)},
        k_{ptx::shared_array<Element>(Traits::kQBytes, Traits::kKBytes)},
        v_{ptx::shared_array<Element>(Traits::kQBytes + Traits::kKBytes, Traits::kVBytes)},
        work_(ptx::shared_array<Work>(Traits::kTileBytes, Traits::kWorkBytes)),
        thread_(static_cast<int>(thread_index().x)) {}

  static VARSTREAM_DEVICE Work find_work(const Params& p) {
    // block = (section * slots + slot) * section_heads + head of the section
    const uint32_t block = block_index().x;
    const uint32_t row = p.section_heads.quotient(block), section = p.slots.quotient(row);
    const varlen::QueryTile at = p.tiles[row - section * p.slots.value];
    Work work{};
    work.index = at.sequence;
    if (at.sequence < 0) return work;
    const uint32_t head_slot = block - (row - section) * p.section_heads.value;
    work.sequence = varlen::sequence_at(p.lengths, at.sequence);
    work.head = static_cast<int32_t>(head_slot * p.pack.value);
    work.tile_row = at.tile * kRows;
    work.rows = work.sequence.sq * static_cast<int32_t>(p.pack.value);
    const int32_t end = work.rows < work.tile_row + kRows ? work.rows : work.tile_row + kRows;
    const auto first = static_cast<int32_t>(p.pack.quotient(work.tile_row));
    const auto last = static_cast<int32_t>(p.pack.quotient(end - 1));
    const int32_t sq = work.sequence.sq, sk = work.sequence.sk;
    work.seen = varlen::visible_keys(first, last, sq, sk, p.window);
    work.shared = {varlen::visible_keys(last, sq, sk, p.window).begin,
                   varlen::visible_keys(first, sq, sk, p.window).end};
    return work;
  }

  VARSTREAM_DEVICE int lane() const { return ptx::opaque(thread_) % 32; }
  VARSTREAM_DEVICE int warp_row() const { return ptx::opaque(thread_) / 32 * Traits::kWarpRows; }
  VARSTREAM_DEVICE RowOrder order() const { return {p_.pack, work_->head}; }
  VARSTREAM_DEVICE ScorePlace place(int32_t first_key) const {
    return {
        work_->sequence, work_->index, order(), work_->tile_row + warp_row(), first_key, lane()};
  }

  VARSTREAM_DEVICE void load_q() const {
    const auto* data =
        static_cast<const Element*>(p_.q.data) + work_->sequence.q0 * p_.q.row_stride;
    const RowOrder order = this->order();
    const int32_t tile_row = work_->tile_row;
    tile::gather_rows_async<kThreads>(
        q_, thread_, work_->rows - tile_row, p_.dim, [&](int r) -> const Element* {
          const RowPlace row = order.at(tile_row + r);
          return data + row.query * p_.q.row_stride + row.head * p_.q.head_stride;
        });
  }

  // Keys first_key on; those past the sequence's end become zero.
  template <typename Tile>
  VARSTREAM_DEVICE void load_keys(const Tile& to,
                                  const Rows& from,
                                  int dim,
                                  int32_t first_key) const {
    const auto* data = static_cast<const Element*>(from.data) +
                       p_.group.quotient(work_->head) * from.head_stride +
                       (int64_t{work_->sequence.k0} + first_key) * from.row_stride;
    tile::copy_rows_async<kThreads>(
        to, ptx::opaque(thread_), data, from.row_stride, work_->sequence.sk - first_key, dim);
  }

  // Adds up the keys that the tile's rows see, from the last tile of keys to the first.
  VARSTREAM_DEVICE void walk(Output& out, tile::OnlineSoftmax<kTiles>& softmax) const {
    if (work_->seen.begin >= work_->seen.end) return;
    int32_t key_tile = (work_->seen.end - 1) / kKeys;
    load_q();
    load_keys(k_, p_.k, p_.dim, key_tile * kKeys);
    ptx::cp_async_commit();
    for (; key_tile >= work_->seen.begin / kKeys; --key_tile) {
      const int32_t first_key = key_tile * kKeys;
      ptx::cp_async_wait<0>();
      ptx::sync_block();  // K is there, and nobody reads the V before it any more
      load_keys(v_, p_.v, p_.value_dim, first_key);
      ptx::cp_async_commit();

      Scores scores;
      tile::clear(scores);
      tile::multiply_rows_by_rows(scores, q_, warp_row(), k_, lane());
      if constexpr (Traits::kModified) modify_scores(scores, place(first_key), p_);
      if (first_key < work_->shared.begin || first_key + kKeys > work_->shared.end) {
        hide_keys(scores, place(first_key), p_.window);
      }

      ptx::cp_async_wait<0>();
      ptx::sync_block();  // V is there, and nobody reads this K any more
      softmax.update(scores, out, p_.score_unit);
      if constexpr (Traits::kModified) {
        if (p_.rng_state != nullptr) {
          drop_weights(scores, place(first_key), p_, [](float& weight) { weight = 0.0f; });
        }
      }
      tile::Operand<kTiles, kKeys / 16> weights;
      tile::round_to_operand<Element>(scores, weights);
      if (first_key > work_->seen.begin) load_keys(k_, p_.k, p_.dim, first_key - kKeys);
      ptx::cp_async_commit();
      tile::multiply_operand_by_columns(out, weights, v_, lane());
    }
    ptx::cp_async_wait<0>();  // the last group is empty
  }

  // Divides by the row sums, writes LSE and output; the output passes through the warp's own rows
  // of the Q tile so that it leaves in 16-byte words.
  VARSTREAM_DEVICE void finish(Output& out, const tile::OnlineSoftmax<kTiles>& softmax) const {
    const int32_t tile_row = work_->tile_row, rows = work_->rows, q0 = work_->sequence.q0;
    const RowOrder order = this->order();
    const int32_t own_row = tile_row + warp_row() + lane() / 4;
    const bool sunk = p_.sinks != nullptr && work_->index < p_.lengths.batch;  // not the tail
    VARSTREAM_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      VARSTREAM_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int32_t r = own_row + 16 * i + 8 * h;
        const RowPlace row = order.at(r);
        const float sink = sunk && r < rows ? p_.sinks[row.head] * kLog2E : tile::minus_infinity();
        const tile::RowResult result =
            tile::finish_row(softmax.top[i][h], softmax.row_total(i, h), sink);
        if (thread_ % 4 == 0 && r < rows) {
          p_.lse[int64_t{row.head} * p_.lengths.total_q + q0 + row.query] =
              result.log2_total * kLn2;
        }
        const float factor = Traits::kModified ? result.factor * p_.keep_scale : result.factor;
        VARSTREAM_UNROLL
        for (int n = 0; n < Traits::kValueDim / 8; ++n) {
          out[i][n][2 * h] *= factor;
          out[i][n][2 * h + 1] *= factor;
        }
      }
    }
    ptx::sync_warp();
    tile::store_accumulator(out, q_, warp_row(), lane());
    ptx::sync_warp();
    const int64_t row_stride = int64_t{p_.heads} * p_.value_dim;
    auto* data = static_cast<Element*>(p_.out) + q0 * row_stride;
    tile::store_rows<Traits::kWarpRows, Traits::kValueDim / 8>(
        q_, warp_row(), lane(), p_.value_dim, [&](int r) -> Element* {
          if (tile_row + r >= rows) return nullptr;
          const RowPlace row = order.at(tile_row + r);
          return data + row.query * row_stride + int64_t{row.head} * p_.value_dim;
        });
  }
};

}  // namespace varstream::attention
