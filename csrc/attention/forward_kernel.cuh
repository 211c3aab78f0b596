// Ring 3. Attention forward over packed sequences with mma.sync (FlashAttention-2, Dao 2023).
//
// A block owns one query tile of one head (or of the heads of a group, packed into its rows) and
// walks the key tiles its rows see, from the last to the first. K of the next tile is on its way
// while V is used, V while K is used; scores never leave registers.
#pragma once

#include "attention/forward_params.h"
#include "attention/forward_traits.h"
#include "attention/query_work.cuh"
#include "attention/score_modifiers.cuh"
#include "common/thread.h"
#include "ptx/barrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "tile/fragment.cuh"
#include "tile/online_softmax.cuh"
#include "tile/product.cuh"
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
    if (thread_index().x == 0) *block.work_ = find_query_work(p, kRows);
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
  const Params& p_;
  const QTile q_;
  const KTile k_;
  const VTile v_;
  QueryWork* const work_;
  const int thread_;

  VARSTREAM_DEVICE explicit Forward(const Params& p)
      : p_(p),
        q_{ptx::shared_array<Element>(0, Traits::kQBytes)},
        k_{ptx::shared_array<Element>(Traits::kQBytes, Traits::kKBytes)},
        v_{ptx::shared_array<Element>(Traits::kQBytes + Traits::kKBytes, Traits::kVBytes)},
        work_(ptx::shared_array<QueryWork>(Traits::kTileBytes, kQueryWorkBytes)),
        thread_(static_cast<int>(thread_index().x)) {}

  VARSTREAM_DEVICE int lane() const { return ptx::opaque(thread_) % 32; }
  VARSTREAM_DEVICE int warp_row() const { return ptx::opaque(thread_) / 32 * Traits::kWarpRows; }
  VARSTREAM_DEVICE RowOrder order() const { return {p_.pack, work_->head}; }
  VARSTREAM_DEVICE ScorePlace place(int32_t first_key) const {
    return {
        work_->sequence, work_->index, order(), work_->tile_row + warp_row(), first_key, lane()};
  }

  template <typename Tile>
  VARSTREAM_DEVICE void load_keys(const Tile& to, const Rows& from, int dim, int32_t first) const {
    load_key_rows<kThreads>(
        to, ptx::opaque(thread_), from, work_->sequence, work_->kv_head, first, dim);
  }

  // Adds up the keys that the tile's rows see, from the last tile of keys to the first.
  VARSTREAM_DEVICE void walk(Output& out, tile::OnlineSoftmax<kTiles>& softmax) const {
    if (work_->seen.begin >= work_->seen.end) return;
    int32_t key_tile = (work_->seen.end - 1) / kKeys;
    load_query_rows<kThreads>(
        q_, thread_, p_.q, work_->sequence, order(), work_->tile_row, work_->rows, p_.dim);
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
      tile::multiply<Traits::kDim / 16, tile::Read::kAlong, tile::Read::kAlong>(
          scores, q_, warp_row(), k_, 0, lane());
      if constexpr (Traits::kModified) {
        modify_scores(scores, place(first_key), p_, [](int, int, int, float) {});
      }
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
    tile::store_changed(out, q_, warp_row(), 0, lane(), [](float value) { return value; });
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
