// Ring 4. The arguments of the attention operators, and everything a kernel relies on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "attention/forward_params.h"
#include "torch/checks.h"
#include "varlen/sequence.h"

namespace varstream {

struct AttentionOptions {
  torch::stable::Tensor cu_seqlens_q, cu_seqlens_k;
  std::optional<torch::stable::Tensor> seqused_k, alibi_slopes, sinks, rng_state;
  int64_t max_seqlen_k;
  bool causal;
  int64_t window_left, window_right;
  double softmax_scale, softcap, dropout_p;
};

inline varlen::Window window_of(const AttentionOptions& o) {
  const auto bounded = [](int64_t side) {
    return static_cast<int32_t>(std::min<int64_t>(side, std::numeric_limits<int32_t>::max()));
  };
  return {bounded(o.window_left), o.causal ? 0 : bounded(o.window_right)};
}

inline constexpr int64_t kWord = 8;  // 16-bit values in the 16 bytes that a kernel moves at a time

// Whether the heads of t (rows, heads, dim) start at multiples of 16 bytes.
inline bool heads_aligned(const torch::stable::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
         (t.size(0) == 1 || t.stride(0) % kWord == 0) &&
         (t.size(1) == 1 || t.stride(1) % kWord == 0);
}

// q, k or v: (rows, heads, dim) whose heads start at multiples of 16 bytes.
inline void check_rows(const torch::stable::Tensor& t, const char* name) {
  VARSTREAM_CHECK(
      t.dim() == 3, name, " must have 3 dimensions (rows, heads, dim), got shape ", shape_text(t));
  VARSTREAM_CHECK(t.size(0) <= attention::kMaxRows,
                  name,
                  " must have at most 2^31 - 256 rows, got ",
                  t.size(0));
  VARSTREAM_CHECK(t.size(1) <= std::numeric_limits<int32_t>::max(),
                  name,
                  " must have fewer than 2^31 heads, got ",
                  t.size(1));
  VARSTREAM_CHECK(t.size(2) >= kWord && t.size(2) <= 256 && t.size(2) % kWord == 0,
                  name,
                  " must have a head dim that is a multiple of 8, from 8 to 256, in bfloat16 and "
                  "float16 on CUDA; got ",
                  t.size(2));
  if (t.numel() == 0) return;
  VARSTREAM_CHECK(t.stride(2) == 1,
                  name,
                  " must be contiguous in its last dimension (stride 1), got stride ",
                  t.stride(2),
                  "; call .contiguous()");
  VARSTREAM_CHECK(heads_aligned(t),
                  name,
                  " must have heads that start at multiples of 16 bytes, got strides (",
                  t.stride(0),
                  ", ",
                  t.stride(1),
                  ", 1); call .contiguous()");
}

inline void check_int32_vector(const torch::stable::Tensor& t,
                               const char* name,
                               const torch::stable::Tensor& q) {
  VARSTREAM_CHECK(t.dim() == 1 && t.scalar_type() == torch::headeronly::ScalarType::Int &&
                      (t.numel() < 2 || t.stride(0) == 1),
                  name,
                  " must be a contiguous int32 vector, got shape ",
                  shape_text(t));
  check_same_device(t, name, q, "q");
}

inline bool is_floating(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_attention_options(const torch::stable::Tensor& q, const AttentionOptions& o) {
  const int64_t heads = q.size(1);
  check_int32_vector(o.cu_seqlens_q, "cu_seqlens_q", q);
  check_int32_vector(o.cu_seqlens_k, "cu_seqlens_k", q);
  const int64_t batch = o.cu_seqlens_q.size(0) - 1;
  VARSTREAM_CHECK(batch >= 0, "cu_seqlens_q must have at least 1 entry, got 0");
  VARSTREAM_CHECK(batch < std::numeric_limits<int32_t>::max(),
                  "cu_seqlens_q must have fewer than 2^31 entries, got ",
                  batch + 1);
  VARSTREAM_CHECK(o.cu_seqlens_k.size(0) == batch + 1,
                  "cu_seqlens_k must have ",
                  batch + 1,
                  " entries like cu_seqlens_q, got ",
                  o.cu_seqlens_k.size(0));
  if (o.seqused_k) {
    check_int32_vector(*o.seqused_k, "seqused_k", q);
    VARSTREAM_CHECK(o.seqused_k->size(0) == batch,
                    "seqused_k must have shape (",
                    batch,
                    "), got ",
                    shape_text(*o.seqused_k));
  }
  if (o.alibi_slopes) {
    const auto& t = *o.alibi_slopes;
    const bool fits = (t.dim() == 1 && t.size(0) == heads) ||
                      (t.dim() == 2 && t.size(0) == batch && t.size(1) == heads);
    VARSTREAM_CHECK(fits && is_floating(t),
                    "alibi_slopes must be floating, of shape (heads) or (batch, heads), got shape ",
                    shape_text(t));
    check_same_device(t, "alibi_slopes", q, "q");
  }
  if (o.sinks) {
    const auto& t = *o.sinks;
    VARSTREAM_CHECK(t.dim() == 1 && t.size(0) == heads && is_floating(t),
                    "sinks must be floating, of shape (",
                    heads,
                    "), got shape ",
                    shape_text(t));
    check_same_device(t, "sinks", q, "q");
  }
  VARSTREAM_CHECK(o.window_left >= -1 && o.window_right >= -1,
                  "window must be at least -1 on both sides, got (",
                  o.window_left,
                  ", ",
                  o.window_right,
                  ")");
  VARSTREAM_CHECK(o.softcap >= 0.0, "softcap must be at least 0, got ", o.softcap);
  VARSTREAM_CHECK(
      o.dropout_p >= 0.0 && o.dropout_p < 1.0, "dropout_p must be in [0, 1), got ", o.dropout_p);
  if (o.dropout_p > 0.0) {
    VARSTREAM_CHECK(o.rng_state.has_value(), "rng_state must be given when dropout_p > 0");
    VARSTREAM_CHECK(o.rng_state->dim() == 1 && o.rng_state->size(0) == 2 &&
                        o.rng_state->stride(0) == 1 &&
                        o.rng_state->scalar_type() == torch::headeronly::ScalarType::Long,
                    "rng_state must be an int64 vector of 2");
    check_same_device(*o.rng_state, "rng_state", q, "q");
  }
}

inline void check_attention(const torch::stable::Tensor& q,
                            const torch::stable::Tensor& k,
                            const torch::stable::Tensor& v,
                            const AttentionOptions& o) {
  VARSTREAM_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  check_rows(q, "q");
  check_rows(k, "k");
  check_rows(v, "v");
  check_same_device(k, "k", q, "q");
  check_same_device(v, "v", q, "q");
  VARSTREAM_CHECK(k.size(2) == q.size(2),
                  "k must have q's head dim ",
                  q.size(2),
                  ", got shape ",
                  shape_text(k));
  VARSTREAM_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1),
                  "v must have k's rows and heads, got shapes ",
                  shape_text(v),
                  " and ",
                  shape_text(k));
  VARSTREAM_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "q must have a multiple of k's ",
                  k.size(1),
                  " heads, got ",
                  q.size(1));
  check_attention_options(q, o);
}

}  // namespace varstream
