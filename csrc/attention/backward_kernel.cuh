// Ring 3. Attention backward with mma.sync: a block owns a tile of keys and one K/V head, walks the
// rows (queries of every head of the group) that see it, keeps dK and dV in registers and adds its
// part of dQ into memory (FlashAttention-2, Dao 2023).
#pragma once

#include "attention/backward_params.h"
#include "attention/backward_scores.cuh"
#include "attention/backward_traits.h"
#include "attention/query_work.cuh"
#include "common/thread.h"
#include "ptx/barrier.cuh"
#include "ptx/math.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "tile/add_rows.cuh"
#include "tile/product.cuh"
#include "tile/shared_tile.cuh"

namespace varstream::attention {

template <typename Traits>
struct Backward {
  using Params = BackwardParams;
  using Element = typename Traits::Element;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kMinBlocks = Traits::kMinBlocks;

  static constexpr int kRows = Traits::kRows, kKeys = Traits::kKeys;
  using KTile = tile::SharedTile<Element, kKeys, Traits::kDim>;
  using VTile = tile::SharedTile<Element, kKeys, Traits::kValueDim>;
  using QTile = tile::SharedTile<Element, kRows, Traits::kDim>;
  using DoutTile = tile::SharedTile<Element, kRows, Traits::kValueDim>;
  using ScoreTile = tile::SharedTile<Element, kRows, kKeys>;
  using Scores = tile::Accumulator<Traits::kScoreTiles, Traits::kScoreColumns>;
  using Dk = tile::Accumulator<Traits::kKeyTiles, Traits::kKeyColumns>;
  using Dv = tile::Accumulator<Traits::kKeyTiles, Traits::kValueColumns>;
  using Dq = tile::Accumulator<Traits::kQueryTiles, Traits::kQueryColumns>;

  static VARSTREAM_DEVICE void run(const Params& p) {
    const Backward block(p);
    if (thread_index().x == 0) *block.work_ = find_work(p);
    ptx::sync_block();
    if (block.work_->index < 0 || block.work_->first_row >= block.work_->end_row) return;
    Dk dk;
    Dv dv;
    tile::clear(dk);
    tile::clear(dv);
    block.walk(dk, dv);
    block.finish(dk, dv);
  }

 private:
  // What a block does. It lies in shared memory: registers belong to the accumulators.
  struct Work {
    int32_t index;  // of the sequence; -1: nothing
    varlen::Sequence sequence;
    int32_t head;  // the group's first
    int32_t kv_head;
    int32_t first_key;  // of the sequence's keys in use
    int32_t first_row;  // rows (query, head of the group) that see one of the tile's keys
    int32_t end_row;
  };
  static_assert(sizeof(Work) <= Traits::kWorkBytes);

  const Params& p_;
  const KTile k_;
  const VTile v_;
  Element* const q_;                 // kStages tiles
  Element* const dout_;              // kStages tiles
  RowStatistics* const statistics_;  // (kStages, kRows)
  const ScoreTile weights_;
  const ScoreTile dscores_;
  Work* const work_;
  const int thread_;

  VARSTREAM_DEVICE explicit Backward(const Params& p)
      : p_(p),
        k_{ptx::shared_array<Element>(0, Traits::kKBytes)},
        v_{ptx::shared_array<Element>(Traits::kVOffset, Traits::kVBytes)},
        q_(ptx::shared_array<Element>(Traits::kQOffset, Traits::kStages * Traits::kQBytes)),
        dout_(
            ptx::shared_array<Element>(Traits::kDoutOffset, Traits::kStages * Traits::kDoutBytes)),
        statistics_(ptx::shared_array<RowStatistics>(Traits::kStatisticsOffset,
                                                     Traits::kStages * Traits::kStatisticsBytes)),
        weights_{ptx::shared_array<Element>(Traits::kWeightOffset, Traits::kScoreBytes)},
        dscores_{ptx::shared_array<Element>(Traits::kDscoreOffset, Traits::kScoreBytes)},
        work_(ptx::shared_array<Work>(Traits::kWorkOffset, Traits::kWorkBytes)),
        thread_(static_cast<int>(thread_index().x)) {}

  static VARSTREAM_DEVICE Work find_work(const Params& p) {
    // block = (section * slots + slot) * section_heads + K/V head of the section; the schedule's
    // queries are this kernel's keys.
    const ForwardParams& f = p.forward;
    const uint32_t block = block_index().x;
    const uint32_t row = f.section_heads.quotient(block), section = f.slots.quotient(row);
    const varlen::QueryTile at = f.tiles[row - section * f.slots.value];
    Work work{};
    work.index = at.sequence < f.lengths.batch ? at.sequence : -1;  // no tail: it has no keys
    if (work.index < 0) return work;
    work.sequence = varlen::sequence_at(f.lengths, work.index);
    work.kv_head = static_cast<int32_t>(block - (row - section) * f.section_heads.value);
    work.head = work.kv_head * static_cast<int32_t>(f.group.value);
    work.first_key = at.tile * kKeys;
    const int32_t sq = work.sequence.sq, sk = work.sequence.sk;
    const int32_t last_key = (work.first_key + kKeys < sk ? work.first_key + kKeys : sk) - 1;
    // Seen from the keys, queries are what keys are to queries, with the window turned round.
    const varlen::Window turned{f.window.right, f.window.left};
    const varlen::KeyRange queries = varlen::visible_keys(work.first_key, last_key, sk, sq, turned);
    work.first_row = queries.begin * static_cast<int32_t>(f.group.value);
    work.end_row = queries.end * static_cast<int32_t>(f.group.value);
    return work;
  }

  VARSTREAM_DEVICE int lane() const { return ptx::opaque(thread_) % 32; }
  VARSTREAM_DEVICE int warp() const { return ptx::opaque(thread_) / 32; }
  VARSTREAM_DEVICE RowOrder order() const { return {p_.forward.group, work_->head}; }
  VARSTREAM_DEVICE QTile q(int stage) const { return {q_ + stage * (Traits::kQBytes / 2)}; }
  VARSTREAM_DEVICE DoutTile dout(int stage) const {
    return {dout_ + stage * (Traits::kDoutBytes / 2)};
  }

  // Where a warp's scores begin in the tile of rows x keys.
  VARSTREAM_DEVICE int score_row() const {
    return warp() % Traits::kScoreRowWarps * (16 * Traits::kScoreTiles);
  }
  VARSTREAM_DEVICE int score_key() const {
    return warp() / Traits::kScoreRowWarps * (8 * Traits::kScoreColumns);
  }
  // Where its gradients begin: keys x dims, and rows x dims.
  VARSTREAM_DEVICE int key_row() const {
    return warp() % Traits::kKeyWarps * (16 * Traits::kKeyTiles);
  }
  VARSTREAM_DEVICE int key_part() const { return warp() / Traits::kKeyWarps; }
  VARSTREAM_DEVICE int query_row() const {
    return warp() % Traits::kQueryWarps * (16 * Traits::kQueryTiles);
  }
  VARSTREAM_DEVICE int query_part() const { return warp() / Traits::kQueryWarps; }

  // Rows past the last have statistics 0: their weights meet zeros of dO, their gradients are 0.
  VARSTREAM_DEVICE void load_stage(int stage, int32_t first_row) const {
    const int thread = ptx::opaque(thread_);
    const varlen::Sequence sequence = work_->sequence;
    const int32_t end_row = work_->end_row;
    load_query_rows<kThreads>(
        q(stage), thread, p_.forward.q, sequence, order(), first_row, end_row, p_.forward.dim);
    load_query_rows<kThreads>(
        dout(stage), thread, p_.dout, sequence, order(), first_row, end_row, p_.forward.value_dim);
    if (thread_ < kRows) {
      const int32_t r = first_row + thread_;
      const bool valid = r < work_->end_row;
      const RowPlace at = order().at(valid ? r : first_row);
      const int64_t row = int64_t{work_->sequence.q0 + at.query} * p_.forward.heads + at.head;
      ptx::cp_async_8(statistics_ + stage * kRows + thread_, p_.statistics + row, valid);
    }
  }

  VARSTREAM_DEVICE ScorePlace score_place(int32_t first_row) const {
    return {work_->sequence,
            work_->index,
            order(),
            first_row + score_row(),
            work_->first_key + score_key(),
            lane()};
  }

  // Whether some row of the tile doesn't see some key of the block.
  VARSTREAM_DEVICE bool hides(int32_t first_row) const {
    const RowOrder order = this->order();
    const int32_t end = work_->end_row < first_row + kRows ? work_->end_row : first_row + kRows;
    const int32_t sq = work_->sequence.sq, sk = work_->sequence.sk;
    const varlen::Window window = p_.forward.window;
    return varlen::visible_keys(order.at(end - 1).query, sq, sk, window).begin > work_->first_key ||
           varlen::visible_keys(order.at(first_row).query, sq, sk, window).end <
               work_->first_key + kKeys;
  }

  VARSTREAM_DEVICE void walk(Dk& dk, Dv& dv) const {
    const int32_t key = work_->first_key, head = work_->kv_head;
    load_key_rows<kThreads>(k_, thread_, p_.forward.k, work_->sequence, head, key, p_.forward.dim);
    load_key_rows<kThreads>(
        v_, thread_, p_.forward.v, work_->sequence, head, key, p_.forward.value_dim);
    load_stage(0, work_->first_row);
    ptx::cp_async_commit();
    int stage = 0;
    for (int32_t row = work_->first_row; row < work_->end_row; row += kRows) {
      ptx::cp_async_wait<0>();
      ptx::sync_block();  // this stage is there, and nobody reads the scores before any more
      const int32_t next = row + kRows;
      if (Traits::kStages == 2 && next < work_->end_row) load_stage(1 - stage, next);
      ptx::cp_async_commit();
      make_scores(stage, row);
      ptx::sync_block();  // weights and dscores are there
      add_products(dk, dv, stage, row);
      if (Traits::kStages == 1 && next < work_->end_row) {
        ptx::sync_block();  // nobody reads this stage any more
        load_stage(0, next);
        ptx::cp_async_commit();
      }
      stage = Traits::kStages == 2 ? 1 - stage : 0;
    }
    ptx::cp_async_wait<0>();  // the last group is empty
  }

  // Weights and the gradients of scores, rounded into shared memory.
  VARSTREAM_DEVICE void make_scores(int stage, int32_t first_row) const {
    constexpr auto kAlong = tile::Read::kAlong;
    const RowStatistics* rows = statistics_ + stage * kRows;
    LaneRows<Traits::kScoreTiles> lse, delta;
    Scores scores, slopes;
    tile::clear(scores);
    tile::multiply<Traits::kDim / 16, kAlong, kAlong>(
        scores, q(stage), score_row(), k_, score_key(), lane());
    lse.load(score_row() + lane() / 4, [&](int r) { return rows[r].lse; });
    scores_to_weights<Traits::kModified>(
        scores, slopes, score_place(first_row), lse, p_.forward, hides(first_row));
    const float keep_scale = p_.forward.keep_scale;
    tile::store_changed(scores, weights_, score_row(), score_key(), lane(), [=](float weight) {
      if constexpr (!Traits::kModified) return weight;
      return weight < 0.0f ? 0.0f : weight * keep_scale;
    });
    delta.load(score_row() + lane() / 4, [&](int r) { return rows[r].delta; });
    Scores dscores;
    tile::clear(dscores);
    tile::multiply<Traits::kValueDim / 16, kAlong, kAlong>(
        dscores, dout(stage), score_row(), v_, score_key(), lane());
    weights_to_gradients<Traits::kModified>(dscores, scores, slopes, delta, p_.forward);
    tile::store_changed(
        dscores, dscores_, score_row(), score_key(), lane(), [](float value) { return value; });
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K.
  VARSTREAM_DEVICE void add_products(Dk& dk, Dv& dv, int stage, int32_t first_row) const {
    constexpr auto kAlong = tile::Read::kAlong, kAcross = tile::Read::kAcross;
    tile::multiply<kRows / 16, kAcross, kAcross>(
        dv, weights_, key_row(), dout(stage), key_part() * (8 * Traits::kValueColumns), lane());
    if (p_.dq_sum != nullptr) {
      Dq dq;
      tile::clear(dq);
      tile::multiply<kKeys / 16, kAlong, kAcross>(
          dq, dscores_, query_row(), k_, query_part() * (8 * Traits::kQueryColumns), lane());
      add_dq(dq, first_row);
    }
    tile::multiply<kRows / 16, kAcross, kAcross>(
        dk, dscores_, key_row(), q(stage), key_part() * (8 * Traits::kKeyColumns), lane());
  }

  // Adds into (total_q, heads, dim) fp32, with as few instructions and sectors as the architecture
  // allows.
  VARSTREAM_DEVICE void add_dq(const Dq& dq, int32_t first_row) const {
    if constexpr (ptx::adds_four_at_once<!Traits::kSmall>()) {
      add_dq_by_fours(dq, first_row);
    } else {
      add_dq_by_pairs(dq, first_row);
    }
  }

  // Where row r of the sequence's has its dQ.
  VARSTREAM_DEVICE float* dq_row(int32_t r) const {
    const RowPlace at = order().at(r);
    return p_.dq_sum +
           (int64_t{work_->sequence.q0 + at.query} * p_.forward.heads + at.head) * p_.forward.dim;
  }

  // Neighbouring lanes swap halves: each then holds four columns of one row.
  VARSTREAM_DEVICE void add_dq_by_fours(const Dq& dq, int32_t first_row) const {
    const int lane = this->lane();
    const bool odd = lane % 2 != 0;
    const int column = query_part() * (8 * Traits::kQueryColumns) + lane % 4 / 2 * 4;
    const int row = first_row + query_row() + (odd ? 8 : 0) + lane / 4;
    VARSTREAM_UNROLL
    for (int i = 0; i < Traits::kQueryTiles; ++i) {
      const bool exists = row + 16 * i < work_->end_row;
      float* to = dq_row(exists ? row + 16 * i : first_row) + column;
      VARSTREAM_UNROLL
      for (int n = 0; n < Traits::kQueryColumns; ++n) {
        const float* d = dq[i][n];
        const float other0 = ptx::shuffle_xor(odd ? d[0] : d[2], 1);
        const float other1 = ptx::shuffle_xor(odd ? d[1] : d[3], 1);
        if (!exists || column + 8 * n >= p_.forward.dim) continue;
        ptx::add_atomic_4(to + 8 * n,
                          odd ? other0 : d[0],
                          odd ? other1 : d[1],
                          odd ? d[2] : other0,
                          odd ? d[3] : other1);
      }
    }
  }

  // Four lanes fill a 32-byte sector of one row with every addition. A lane whose row is past the
  // last adds zeros to the tile's first rows, each lane to its own, as a branch would cost more;
  // columns end for a whole warp at once.
  VARSTREAM_DEVICE void add_dq_by_pairs(const Dq& dq, int32_t first_row) const {
    const int lane = this->lane(), first_column = query_part() * (8 * Traits::kQueryColumns);
    const int row = first_row + query_row() + lane / 4, end_row = work_->end_row;
    if (first_row + query_row() >= end_row) return;
    const int other = first_row + lane / 4 < end_row ? first_row + lane / 4 : end_row - 1;
    bool exists[Traits::kQueryTiles][2];
    float* to[Traits::kQueryTiles][2];
    VARSTREAM_UNROLL
    for (int i = 0; i < Traits::kQueryTiles; ++i) {
      VARSTREAM_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int r = row + 16 * i + 8 * h;
        exists[i][h] = r < end_row;
        to[i][h] = dq_row(exists[i][h] ? r : other) + first_column + 2 * (lane % 4);
      }
    }
    VARSTREAM_UNROLL
    for (int n = 0; n < Traits::kQueryColumns; ++n) {
      if (first_column + 8 * n >= p_.forward.dim) break;
      VARSTREAM_UNROLL
      for (int i = 0; i < Traits::kQueryTiles; ++i) {
        VARSTREAM_UNROLL
        for (int h = 0; h < 2; ++h) {
          ptx::add_atomic(to[i][h] + 8 * n, exists[i][h] ? dq[i][n][2 * h] : 0.0f);
          ptx::add_atomic(to[i][h] + 8 * n + 1, exists[i][h] ? dq[i][n][2 * h + 1] : 0.0f);
        }
      }
    }
  }

  VARSTREAM_DEVICE void finish(Dk& dk, Dv& dv) const {
    const float scale = p_.forward.softmax_scale;
    const int keys = work_->sequence.sk - work_->first_key;  // that exist
    write(dk, p_.dk, k_, key_part() * (8 * Traits::kKeyColumns), p_.forward.dim, keys, scale);
    write(
        dv, p_.dv, v_, key_part() * (8 * Traits::kValueColumns), p_.forward.value_dim, keys, 1.0f);
  }

  // The block's rows of dK or dV: added to fp32 rows, or rounded and written through `staging`, a
  // tile that is no longer needed, in 16-byte words.
  template <int Columns, typename Tile>
  VARSTREAM_DEVICE void write(tile::Accumulator<Traits::kKeyTiles, Columns>& d,
                              const GradientRows& to,
                              const Tile& staging,
                              int column,
                              int dim,
                              int keys,
                              float scale) const {
    const int64_t first = (int64_t{work_->sequence.k0} + work_->first_key) * to.row_stride +
                          work_->kv_head * to.head_stride;
    if (p_.accumulate) {
      auto* data = static_cast<float*>(to.data) + first + column;
      const int64_t strides = to.row_stride | to.head_stride;
      const bool even = strides % 2 == 0 && reinterpret_cast<uintptr_t>(to.data) % 8 == 0;
      const int key = key_row();
      tile::add_rows(d, scale, dim - column, lane(), even, [&](int r) -> float* {
        return key + r < keys ? data + (key + r) * to.row_stride : nullptr;
      });
      return;
    }
    ptx::sync_block();  // nobody reads the tile any more
    tile::store_changed(
        d, staging, key_row(), column, lane(), [=](float value) { return scale * value; });
    ptx::sync_block();
    auto* data = static_cast<Element*>(to.data) + first;
    constexpr int kWarpKeys = kKeys / (kThreads / 32);
    tile::store_rows<kWarpKeys, Tile::kChunks>(
        staging, warp() * kWarpKeys, lane(), dim, [&](int r) -> Element* {
          return r < keys ? data + r * to.row_stride : nullptr;
        });
  }
};

}  // namespace varstream::attention
