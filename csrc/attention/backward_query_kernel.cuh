// Ring 3. dQ in a fixed order, for deterministic=True: a block owns a tile of rows, as in the
// forward kernel, makes the scores' gradients again and keeps dQ in registers.
#pragma once

#include "attention/backward_params.h"
#include "attention/backward_scores.cuh"
#include "attention/backward_traits.h"
#include "attention/query_work.cuh"
#include "common/thread.h"
#include "ptx/barrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "tile/product.cuh"
#include "tile/shared_tile.cuh"

namespace varstream::attention {

template <typename Traits>
struct BackwardQuery {
  using Params = BackwardParams;
  using Element = typename Traits::Element;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kMinBlocks = Traits::kMinBlocks;

  static constexpr int kRows = Traits::kRows, kKeys = Traits::kKeys;
  using QTile = tile::SharedTile<Element, kRows, Traits::kDim>;
  using DoutTile = tile::SharedTile<Element, kRows, Traits::kValueDim>;
  using KTile = tile::SharedTile<Element, kKeys, Traits::kDim>;
  using VTile = tile::SharedTile<Element, kKeys, Traits::kValueDim>;
  using Scores = tile::Accumulator<1, kKeys / 8>;
  using Dq = tile::Accumulator<1, Traits::kDim / 8>;

  static VARSTREAM_DEVICE void run(const Params& p) {
    const BackwardQuery block(p);
    if (thread_index().x == 0) *block.work_ = find_query_work(p.forward, kRows);
    ptx::sync_block();
    if (block.work_->index < 0) return;
    Dq dq;
    tile::clear(dq);
    block.walk(dq);
    block.finish(dq);
  }

 private:
  const Params& p_;
  const QTile q_;
  const DoutTile dout_;
  const KTile k_;
  const VTile v_;
  QueryWork* const work_;
  const int thread_;

  VARSTREAM_DEVICE explicit BackwardQuery(const Params& p)
      : p_(p),
        q_{ptx::shared_array<Element>(0, Traits::kQBytes)},
        dout_{ptx::shared_array<Element>(Traits::kDoutOffset, Traits::kDoutBytes)},
        k_{ptx::shared_array<Element>(Traits::kKOffset, Traits::kKBytes)},
        v_{ptx::shared_array<Element>(Traits::kVOffset, Traits::kVBytes)},
        work_(ptx::shared_array<QueryWork>(Traits::kWorkOffset, kQueryWorkBytes)),
        thread_(static_cast<int>(thread_index().x)) {}

  VARSTREAM_DEVICE int lane() const { return ptx::opaque(thread_) % 32; }
  VARSTREAM_DEVICE int warp_row() const { return ptx::opaque(thread_) / 32 * 16; }
  VARSTREAM_DEVICE RowOrder order() const { return {p_.forward.pack, work_->head}; }
  VARSTREAM_DEVICE ScorePlace place(int32_t first_key) const {
    return {
        work_->sequence, work_->index, order(), work_->tile_row + warp_row(), first_key, lane()};
  }

  template <typename Tile>
  VARSTREAM_DEVICE void load_rows(const Tile& to, const Rows& from, int dim) const {
    load_query_rows<kThreads>(
        to, thread_, from, work_->sequence, order(), work_->tile_row, work_->rows, dim);
  }

  template <typename Tile>
  VARSTREAM_DEVICE void load_keys(const Tile& to, const Rows& from, int dim, int32_t first) const {
    load_key_rows<kThreads>(
        to, ptx::opaque(thread_), from, work_->sequence, work_->kv_head, first, dim);
  }

  // Of the sequence's row r; rows past the last weigh nothing.
  VARSTREAM_DEVICE RowStatistics statistics(int32_t r) const {
    if (r >= work_->rows) return {INFINITY, 0.0f};
    const RowPlace at = order().at(r);
    return p_.statistics[int64_t{work_->sequence.q0 + at.query} * p_.forward.heads + at.head];
  }

  VARSTREAM_DEVICE void walk(Dq& dq) const {
    constexpr auto kAlong = tile::Read::kAlong;
    if (work_->seen.begin >= work_->seen.end) return;
    load_rows(q_, p_.forward.q, p_.forward.dim);
    load_rows(dout_, p_.dout, p_.forward.value_dim);
    LaneRows<1> lse, delta;
    const int own_row = work_->tile_row + warp_row() + lane() / 4;
    lse.load(own_row, [&](int r) { return statistics(r).lse; });
    delta.load(own_row, [&](int r) { return statistics(r).delta; });
    int32_t key_tile = (work_->seen.end - 1) / kKeys;
    for (; key_tile >= work_->seen.begin / kKeys; --key_tile) {
      const int32_t first_key = key_tile * kKeys;
      load_keys(k_, p_.forward.k, p_.forward.dim, first_key);
      ptx::cp_async_commit();
      load_keys(v_, p_.forward.v, p_.forward.value_dim, first_key);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      ptx::sync_block();  // K is there
      Scores scores, slopes, dscores;
      tile::clear(scores);
      tile::multiply<Traits::kDim / 16, kAlong, kAlong>(scores, q_, warp_row(), k_, 0, lane());
      const bool hide = first_key < work_->shared.begin || first_key + kKeys > work_->shared.end;
      scores_to_weights<Traits::kModified>(scores, slopes, place(first_key), lse, p_.forward, hide);
      ptx::cp_async_wait<0>();
      ptx::sync_block();  // V is there
      tile::clear(dscores);
      tile::multiply<Traits::kValueDim / 16, kAlong, kAlong>(
          dscores, dout_, warp_row(), v_, 0, lane());
      weights_to_gradients<Traits::kModified>(dscores, scores, slopes, delta, p_.forward);
      tile::Operand<1, kKeys / 16> operand;
      tile::round_to_operand<Element>(dscores, operand);
      tile::multiply_operand_by_columns(dq, operand, k_, lane());
      ptx::sync_block();  // nobody reads this K and V any more
    }
  }

  // Rounds dQ through the warp's own rows of the Q tile, so that it leaves in 16-byte words.
  VARSTREAM_DEVICE void finish(const Dq& dq) const {
    const int32_t tile_row = work_->tile_row, rows = work_->rows;
    const RowOrder order = this->order();
    const float scale = p_.forward.softmax_scale;
    ptx::sync_warp();
    tile::store_changed(dq, q_, warp_row(), 0, lane(), [=](float value) { return scale * value; });
    ptx::sync_warp();
    const int64_t row_stride = int64_t{p_.forward.heads} * p_.forward.dim;
    auto* data = static_cast<Element*>(p_.dq) + work_->sequence.q0 * row_stride;
    tile::store_rows<16, Traits::kDim / 8>(
        q_, warp_row(), lane(), p_.forward.dim, [&](int r) -> Element* {
          if (tile_row + r >= rows) return nullptr;
          const RowPlace row = order.at(tile_row + r);
          return data + row.query * row_stride + row.head * p_.forward.dim;
        });
  }
};

}  // namespace varstream::attention
