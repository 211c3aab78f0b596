// Ring 3. Scores and their gradients in registers, the part that both backward kernels share.
#pragma once

#include <cmath>

#include "attention/backward_params.h"
#include "attention/score_modifiers.cuh"
#include "tile/fragment.cuh"

namespace varstream::attention {

// One number for each row that a lane holds, [i][h] as in ScorePlace.
template <int Tiles>
struct LaneRows {
  float of[Tiles][2];

  // number(r) of rows first + 16 i + 8 h.
  template <typename Number>
  VARSTREAM_DEVICE void load(int first, const Number& number) {
    VARSTREAM_UNROLL
    for (int i = 0; i < Tiles; ++i) {
      VARSTREAM_UNROLL
      for (int h = 0; h < 2; ++h) of[i][h] = number(first + 16 * i + 8 * h);
    }
  }
};

// q k becomes weights 2^(unit * score - lse), those that dropout drops negative, and in `slopes`
// (the modified kernel's) the capped score's slope 1 - tanh^2. hide: some score may be hidden.
template <bool Modified, int Tiles, int Columns>
VARSTREAM_DEVICE void scores_to_weights(tile::Accumulator<Tiles, Columns>& scores,
                                        tile::Accumulator<Tiles, Columns>& slopes,
                                        const ScorePlace& place,
                                        const LaneRows<Tiles>& lse,
                                        const ForwardParams& p,
                                        bool hide) {
  if constexpr (Modified) {
    modify_scores(scores, place, p, [&](int i, int n, int e, float tanh) {
      slopes[i][n][e] = 1.0f - tanh * tanh;
    });
  }
  if (hide) hide_keys(scores, place, p.window);
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; ++n) {
      VARSTREAM_UNROLL
      for (int e = 0; e < 4; ++e) {
        scores[i][n][e] = ptx::exp2_approx(scores[i][n][e] * p.score_unit - lse.of[i][e / 2]);
      }
    }
  }
  if constexpr (Modified) {
    if (p.rng_state != nullptr) {
      drop_weights(scores, place, p, [](float& weight) { weight = -weight; });
    }
  }
}

// dp = dout v becomes the gradient of q k, short of the softmax scale: weight * (dp - delta).
template <bool Modified, int Tiles, int Columns>
VARSTREAM_DEVICE void weights_to_gradients(tile::Accumulator<Tiles, Columns>& dp,
                                           const tile::Accumulator<Tiles, Columns>& weights,
                                           const tile::Accumulator<Tiles, Columns>& slopes,
                                           const LaneRows<Tiles>& deltas,
                                           const ForwardParams& p) {
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; ++n) {
      VARSTREAM_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float weight = weights[i][n][e], delta = deltas.of[i][e / 2];
        if constexpr (Modified) {
          const float kept = weight < 0.0f ? 0.0f : p.keep_scale;
          const float gradient = fabsf(weight) * (dp[i][n][e] * kept - delta);
          dp[i][n][e] = p.softcap > 0.0f ? gradient * slopes[i][n][e] : gradient;
        } else {
          dp[i][n][e] = weight * (dp[i][n][e] - delta);
        }
      }
    }
  }
}

}  // namespace varstream::attention
