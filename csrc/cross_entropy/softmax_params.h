// Ring 3. What a launch of the softmax over rows of logits is told; plain data.
#pragma once

#include <cstdint>

#include "cross_entropy/residency.h"

namespace varstream::cross_entropy {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

// How stored values a of a row become logits: with a softcap cap_scale * tanh(scale * (a + b)),
// else scale * (a + b).
struct LogitMap {
  const float* bias;  // (classes,) b, or null
  float scale;
  float cap_scale;  // 0: no softcap
  float slope;      // d logit / d a, apart from the softcap's 1 - tanh^2
};

// Upstream gradients of what a row yields, null: see each. G = d (their sum) / d a.
struct RowUpstream {
  const float* nll;           // (rows, targets) of -log p(target), null: ones
  const float* smooth;        // (rows,) of sum_c w_c (-log p_c), null: zeros
  const float* lse;           // (rows,) of the log-sum-exp, null: zeros
  const float* entropy;       // (rows,) of the entropy, null: zeros
  const float* lse_sq_scale;  // (1,) of lse^2, null: zero
};

// Results of a row, those not wanted null. 0 (argmax -1) for rows that take no part.
struct RowResults {
  float* logp;        // (rows, targets) log p(target), NaN for targets outside [0, classes)
  float* lse;         // (rows,) log sum e^z
  float* entropy;     // (rows,)
  float* class_sum;   // (rows,) sum_c w_c log p_c
  float* log_sum_sq;  // (rows,) log sum p^2
  int64_t* argmax;    // (rows,) the first of equals
};

// Where a row's classes are spread over several calls (shards of the vocabulary), the sums of each
// are written by a first launch, joined by the caller and given to a second one.
struct RowShard {
  float* sums;      // (rows, kRowSums), or null: top, total, moment, squares, gap, weight, argmax
  float* target_z;  // (rows, targets) logits of targets, 0 for those outside [0, classes)
  const float* given;  // (rows, kRowGiven), or null: top and total of all classes, a - sum_k n_k
};
inline constexpr int kRowSums = 7;
inline constexpr int kRowGiven = 3;

struct SoftmaxParams {
  void* values;  // (rows, row_stride), 16-byte aligned; the gradient's rows start where they do
  int64_t row_stride;         // in elements, a multiple of 16 bytes
  int32_t classes;            // of them, at the front of a row
  int32_t targets;            // a row has
  int64_t first_row;          // row i takes part where first_row + i < *count
  const int64_t* count;       // null: all rows take part
  const int64_t* target;      // (rows, targets)
  const float* class_weight;  // (classes,) w, null: ones
  LogitMap logits;
  RowUpstream upstream;
  RowResults results;
  RowShard shard;
  bool gradient;        // whether G replaces the values
  Residency residency;  // set by the launch
};

// Whether more than a positive factor stands between stored values and the plain loss.
inline bool modified(const SoftmaxParams& p) {
  return p.shard.sums != nullptr || p.shard.given != nullptr || p.logits.bias != nullptr ||
         p.logits.cap_scale != 0.0f || p.upstream.smooth != nullptr ||
         p.upstream.entropy != nullptr || p.results.entropy != nullptr ||
         p.results.class_sum != nullptr || p.results.log_sum_sq != nullptr ||
         p.results.argmax != nullptr;
}

}  // namespace varstream::cross_entropy
