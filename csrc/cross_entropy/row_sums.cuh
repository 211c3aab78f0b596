// Ring 3. Sums over a row of logits, built word by word and joined across threads (Milakov and
// Gimelshein 2018), with those that label smoothing, the entropy and metrics take.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/macros.h"
#include "common/math.h"
#include "ptx/math.cuh"
#include "ptx/warp.cuh"

namespace varstream::cross_entropy {

VARSTREAM_DEVICE float exp_approx(float x) {
  return ptx::exp2_approx(x * kLog2E);
}

// What exponents are taken relative to: the largest logit, 0 where all are -inf.
VARSTREAM_DEVICE float base_of(float top) {
  return top == -INFINITY ? 0.0f : top;
}

// Logits are subtracted from the top before anything is multiplied, so that a common offset of a
// row, however large, costs no digits.
template <bool Modified>
struct RowSums {
  float top = -INFINITY;  // the largest logit z
  float total = 0.0f;     // sum of e^(z - top)

  VARSTREAM_DEVICE void raise(float to) {
    total *= exp_approx(top - base_of(to));
    top = to;
  }

  VARSTREAM_DEVICE void join(RowSums other) {
    const float to = fmaxf(top, other.top);
    raise(to), other.raise(to);
    total += other.total;
  }

  // The value of this lane joined with lane ^ distance's.
  VARSTREAM_DEVICE void join_lane(int distance) {
    RowSums other;
    other.top = ptx::shuffle_xor(top, distance);
    other.total = ptx::shuffle_xor(total, distance);
    join(other);
  }
};

template <>
struct RowSums<true> {
  float top = -INFINITY;
  float total = 0.0f;
  float moment = 0.0f;   // sum of e^(z - top) (z - top)
  float squares = 0.0f;  // sum of e^(2 (z - top))
  float gap = 0.0f;      // sum of w (top - z)
  float weight = 0.0f;   // sum of w
  int32_t argmax = std::numeric_limits<int32_t>::max();

  VARSTREAM_DEVICE void raise(float to) {
    const float before = base_of(top), now = base_of(to);
    const float shrink = exp_approx(top - now);
    moment = shrink * (moment + total * (before - now));
    total *= shrink;
    squares *= shrink * shrink;
    gap += weight * (now - before);
    top = to;
  }

  VARSTREAM_DEVICE void join(RowSums other) {
    const float to = fmaxf(top, other.top);
    const bool take = other.top > top || (other.top == top && other.argmax < argmax);
    if (take) argmax = other.argmax;
    raise(to), other.raise(to);
    total += other.total;
    moment += other.moment;
    squares += other.squares;
    gap += other.gap;
    weight += other.weight;
  }

  VARSTREAM_DEVICE void join_lane(int distance) {
    RowSums other;
    other.top = ptx::shuffle_xor(top, distance);
    other.total = ptx::shuffle_xor(total, distance);
    other.moment = ptx::shuffle_xor(moment, distance);
    other.squares = ptx::shuffle_xor(squares, distance);
    other.gap = ptx::shuffle_xor(gap, distance);
    other.weight = ptx::shuffle_xor(weight, distance);
    other.argmax = ptx::shuffle_xor(argmax, distance);
    join(other);
  }
};

}  // namespace varstream::cross_entropy
