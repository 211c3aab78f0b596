// Ring 2. Softmax over key tiles that arrive one after another (Milakov and Gimelshein 2018), in
// powers of two, on accumulators of fragment.cuh.
#pragma once

#include <cmath>

#include "common/macros.h"
#include "ptx/math.cuh"
#include "ptx/warp.cuh"
#include "tile/fragment.cuh"

namespace varstream::tile {

VARSTREAM_DEVICE float minus_infinity() {
  return -INFINITY;
}

// The running state of 2 Tiles rows a lane: row 16 i + 8 h + lane / 4 at [i][h].
template <int Tiles>
struct OnlineSoftmax {
  float top[Tiles][2];    // largest score so far in log2 units, rounded; -inf: none
  float total[Tiles][2];  // this lane's share of the sum of 2^(unit * score - top)

  VARSTREAM_DEVICE void reset() {
    VARSTREAM_UNROLL
    for (int i = 0; i < Tiles; ++i) {
      VARSTREAM_UNROLL
      for (int h = 0; h < 2; ++h) top[i][h] = minus_infinity(), total[i][h] = 0.0f;
    }
  }

  // Turns scores into weights 2^(unit * score - top) and shrinks what came before to the new top.
  // A score of -inf weighs nothing, also where the whole row is hidden so far.
  //
  // Tops are compared after they were multiplied and rounded: an unchanged top then shrinks by
  // exactly 1. A product fused into the difference would not, and each tile would add its error.
  template <int Columns, int OutColumns>
  VARSTREAM_DEVICE void update(Accumulator<Tiles, Columns>& scores,
                               Accumulator<Tiles, OutColumns>& out,
                               float unit) {
    VARSTREAM_UNROLL
    for (int i = 0; i < Tiles; ++i) {
      VARSTREAM_UNROLL
      for (int h = 0; h < 2; ++h) {
        float largest = fmaxf(scores[i][0][2 * h], scores[i][0][2 * h + 1]);
        VARSTREAM_UNROLL
        for (int n = 1; n < Columns; ++n) {
          largest = fmaxf(largest, fmaxf(scores[i][n][2 * h], scores[i][n][2 * h + 1]));
        }
        largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
        largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
        const float before = top[i][h];
        top[i][h] = fmaxf(before, largest * unit);
        const float base = top[i][h] == minus_infinity() ? 0.0f : top[i][h];
        const float shrink = ptx::exp2_approx(before - base);
        float sum = 0.0f;  // of the tile alone: a long row's total rounds off less
        VARSTREAM_UNROLL
        for (int n = 0; n < Columns; ++n) {
          VARSTREAM_UNROLL
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            scores[i][n][e] = ptx::exp2_approx(scores[i][n][e] * unit - base);
            sum += scores[i][n][e];
          }
        }
        total[i][h] = total[i][h] * shrink + sum;
        VARSTREAM_UNROLL
        for (int n = 0; n < OutColumns; ++n) {
          out[i][n][2 * h] *= shrink;
          out[i][n][2 * h + 1] *= shrink;
        }
      }
    }
  }

  // The whole row's sum, in every lane that holds the row.
  VARSTREAM_DEVICE float row_total(int i, int h) const {
    float sum = total[i][h];
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    return sum;
  }
};

// log2 of the row's sum with its sink (log2 units, -inf: none) and the factor that turns the
// unnormalised output into the result: what the row sums to 1 with.
struct RowResult {
  float log2_total;
  float factor;
};

VARSTREAM_DEVICE RowResult finish_row(float top, float total, float sink) {
  const float own = total == 0.0f ? minus_infinity() : top + ptx::log2_approx(total);
  if (sink == minus_infinity()) return {own, total == 0.0f ? 0.0f : 1.0f / total};
  // The smaller share over the larger one: 0 where only one of them is infinite.
  const float ratio = ptx::exp2_approx(-fabsf(own - sink));
  const float both = 1.0f + ratio;
  const float share = own >= sink ? 1.0f : ratio;
  return {fmaxf(own, sink) + ptx::log2_approx(both), total == 0.0f ? 0.0f : share / (both * total)};
}

}  // namespace varstream::tile
