// Ring 3. What the attention backward kernels are told; plain data.
#pragma once

#include <cstdint>

#include "attention/forward_params.h"

namespace varstream::attention {

// What the backward needs of a row (query, head), made by the prepare kernel.
struct alignas(8) RowStatistics {
  float lse;    // in powers of two; +inf where the row sees nothing: its weights become 0
  float delta;  // sum(dout * out) - dlse, which every score's gradient subtracts
};

struct PrepareParams {
  Rows dout;                  // (total_q, heads, value_dim)
  Rows out;                   // (total_q, heads, value_dim)
  const float* lse;           // (heads, total_q), natural log
  const float* dlse;          // (heads, total_q), or null
  RowStatistics* statistics;  // out (total_q, heads)
  int32_t total_q;
  int32_t heads;
  int32_t value_dim;
};

// Gradients of keys or values: added into a caller's float32 rows, or written as 16-bit values.
struct GradientRows {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct BackwardParams {
  ForwardParams forward;  // q, k, v, lengths, modifiers, schedule; out and lse are not used
  Rows dout;              // (total_q, heads, value_dim)
  const RowStatistics* statistics;  // (total_q, heads)
  float* dq_sum;    // (total_q, heads, dim), added into; null: another kernel makes dq
  void* dq;         // (total_q, heads, dim), of the kernel that owns query tiles
  GradientRows dk;  // (total_k, kv_heads, dim)
  GradientRows dv;  // (total_k, kv_heads, value_dim)
  bool accumulate;  // dk and dv are float32 and added into
};

struct RoundParams {
  const float* sum;  // (n,) n a multiple of 8, 16-byte aligned
  void* out;         // (n,) 16-bit values
  int64_t n;
  float scale;
};

struct SinkParams {
  const RowStatistics* statistics;  // (total_q, heads)
  const float* sinks;               // (heads,) natural log
  float* dsinks;                    // (heads,) added into
  varlen::PackedLengths lengths;    // of queries; rows after the last sequence don't count
  int32_t heads;
};

}  // namespace varstream::attention
