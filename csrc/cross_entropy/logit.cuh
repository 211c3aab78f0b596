// Ring 3. From stored values to logits.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "cross_entropy/softmax_params.h"
#include "ptx/math.cuh"

namespace varstream::cross_entropy {

struct Logit {
  float z;
  float slope;  // dz/da
};

// The logit is rounded before its distance to the top is taken, so that the top's own is 0 however
// large a row's common offset.
template <bool Modified>
VARSTREAM_DEVICE Logit logit_of(float value, int32_t column, const LogitMap& map) {
  if constexpr (Modified) {
    if (map.bias != nullptr) value += map.bias[column];
    if (map.cap_scale != 0.0f) {
      const float u = tanhf(value * map.scale);
      return {ptx::rounded_product(map.cap_scale, u), map.slope * (1.0f - u * u)};
    }
  }
  return {ptx::rounded_product(value, map.scale), map.slope};
}

// The same of a word's Values values, those of `column` on, in place; of `count` of them there are
// classes, what the others become means nothing. Options are decided once for all of them.
template <bool Modified, int Values>
VARSTREAM_DEVICE void logits_of(float (&values)[Values],
                                float (&slopes)[Values],
                                int32_t column,
                                int32_t count,
                                const LogitMap& map) {
  if constexpr (Modified) {
    if (map.bias != nullptr) {
      VARSTREAM_UNROLL
      for (int i = 0; i < Values; ++i) {
        if (i < count) values[i] += map.bias[column + i];
      }
    }
    if (map.cap_scale != 0.0f) {
      VARSTREAM_UNROLL
      for (int i = 0; i < Values; ++i) {
        const float u = tanhf(values[i] * map.scale);
        values[i] = ptx::rounded_product(map.cap_scale, u);
        slopes[i] = map.slope * (1.0f - u * u);
      }
      return;
    }
  }
  VARSTREAM_UNROLL
  for (int i = 0; i < Values; ++i) {
    values[i] = ptx::rounded_product(values[i], map.scale);
    slopes[i] = map.slope;
  }
}

}  // namespace varstream::cross_entropy
