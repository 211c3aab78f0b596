// Ring 3. What happens to scores between q k and the softmax, and to weights after it: masks for
// every kernel; scale, softcap, ALiBi and dropout for the modified one.
#pragma once

#include "attention/forward_params.h"
#include "ptx/math.cuh"
#include "ptx/warp.cuh"
#include "tile/fragment.cuh"
#include "tile/online_softmax.cuh"
#include "tile/philox.cuh"
#include "varlen/sequence.h"

namespace varstream::attention {

// The query and head that a row of a sequence stands for.
struct RowPlace {
  int32_t query;
  int32_t head;
};

// Rows of a sequence: query by query, and for each the `pack` heads from `head` on.
struct RowOrder {
  Divisor pack;
  int32_t head;

  VARSTREAM_DEVICE RowPlace at(int32_t row) const {
    const auto query = static_cast<int32_t>(pack.quotient(row));
    return {query, head + (row - query * static_cast<int32_t>(pack.value))};
  }
};

// Where a warp's scores stand: accumulator [i][n][2 h + e] is row first_row + 16 i + 8 h + lane / 4
// of the sequence, key first_key + 8 n + 2 (lane % 4) + e.
struct ScorePlace {
  varlen::Sequence sequence;
  int32_t index;  // of the sequence in the batch
  RowOrder order;
  int32_t first_row;  // of the warp
  int32_t first_key;
  int lane;

  VARSTREAM_DEVICE int32_t row(int i, int h) const { return first_row + 16 * i + 8 * h + lane / 4; }
  VARSTREAM_DEVICE int32_t key() const { return first_key + 2 * (lane % 4); }  // n = e = 0
};

// Hides the keys that a row doesn't see.
template <int Tiles, int Columns>
VARSTREAM_DEVICE void hide_keys(tile::Accumulator<Tiles, Columns>& scores,
                                const ScorePlace& place,
                                varlen::Window window) {
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int32_t query = place.order.at(place.row(i, h)).query;
      const varlen::KeyRange seen =
          varlen::visible_keys(query, place.sequence.sq, place.sequence.sk, window);
      const int32_t begin = seen.begin - place.key(), end = seen.end - place.key();
      VARSTREAM_UNROLL
      for (int n = 0; n < Columns; ++n) {
        VARSTREAM_UNROLL
        for (int e = 0; e < 2; ++e) {
          if (8 * n + e < begin || 8 * n + e >= end) {
            scores[i][n][2 * h + e] = tile::minus_infinity();
          }
        }
      }
    }
  }
}

// tanh through one exponential: absolute error about 2^-22, so the capped score's is cap * 2^-22.
VARSTREAM_DEVICE float tanh_by_exp2(float x) {
  return 1.0f - 2.0f * ptx::reciprocal_approx(1.0f + ptx::exp2_approx(2.0f * kLog2E * x));
}

// q k into log2 units: log2(e) * (softcap(softmax_scale * q k) - slope * |distance|). Where scores
// are capped, seen(i, n, e, tanh) is told of each.
template <int Tiles, int Columns, typename Seen>
VARSTREAM_DEVICE void modify_scores(tile::Accumulator<Tiles, Columns>& scores,
                                    const ScorePlace& place,
                                    const ForwardParams& p,
                                    const Seen& seen) {
  const bool capped = p.softcap > 0.0f;
  const float inner = p.softmax_scale / (capped ? p.softcap : 1.0f);
  const float outer = p.softcap * kLog2E;
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; ++n) {
      if (capped) {
        VARSTREAM_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float t = tanh_by_exp2(scores[i][n][e] * inner);
          seen(i, n, e, t);
          scores[i][n][e] = outer * t;
        }
      } else {
        VARSTREAM_UNROLL
        for (int e = 0; e < 4; ++e) scores[i][n][e] *= inner * kLog2E;
      }
    }
  }
  if (p.alibi_slopes == nullptr) return;
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int h = 0; h < 2; ++h) {
      const RowPlace row = place.order.at(place.row(i, h));
      // Rows past the sequence's last are computed and dropped: their head may not exist.
      const bool exists = row.query < place.sequence.sq;
      const float slope =
          exists ? p.alibi_slopes[place.index * p.alibi_batch_stride + row.head] * kLog2E : 0.0f;
      const int32_t distance =  // the differences fit 31 bits, sums of lengths might not
          (place.key() - place.sequence.sk) + (place.sequence.sq - row.query);
      VARSTREAM_UNROLL
      for (int n = 0; n < Columns; ++n) {
        VARSTREAM_UNROLL
        for (int e = 0; e < 2; ++e) {
          scores[i][n][2 * h + e] -= slope * fabsf(static_cast<float>(distance + 8 * n + e));
        }
      }
    }
  }
}

// Calls drop on the weights that dropout picks: the decision for (sequence, head, query, key) is
// one of the four words of Philox at key / 4, so tiles don't matter. Neighbouring lanes hold the
// two halves of four keys; each makes the words of one of the lane's two rows and they swap.
template <int Tiles, int Columns, typename Drop>
VARSTREAM_DEVICE void drop_weights(tile::Accumulator<Tiles, Columns>& weights,
                                   const ScorePlace& place,
                                   const ForwardParams& p,
                                   const Drop& drop) {
  const auto seed = static_cast<uint64_t>(p.rng_state[0]);
  const auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t offset = static_cast<uint32_t>(p.rng_state[1]) ^ uint32_t(place.index);
  const bool odd = place.lane % 2 != 0;
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    const RowPlace row = place.order.at(place.row(i, odd ? 1 : 0));
    const auto query = uint32_t(row.query - place.sequence.sq) + uint32_t(place.sequence.sk);
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; ++n) {
      const uint32_t quad = uint32_t(place.first_key + 8 * n) / 4 + uint32_t(place.lane % 4 / 2);
      const tile::Words4 words =
          tile::philox4x32({{quad, query, uint32_t(row.head), offset}}, key0, key1);
      // The even lane keeps words 0, 1 of row h = 0, the odd one words 2, 3 of row h = 1.
      VARSTREAM_UNROLL
      for (int e = 0; e < 2; ++e) {
        const uint32_t own = odd ? words.word[2 + e] : words.word[e];
        const uint32_t other = ptx::shuffle_xor(odd ? words.word[e] : words.word[2 + e], 1);
        const uint32_t word0 = odd ? other : own, word1 = odd ? own : other;
        if (word0 < p.drop_below) drop(weights[i][n][e]);
        if (word1 < p.drop_below) drop(weights[i][n][2 + e]);
      }
    }
  }
}

}  // namespace varstream::attention
