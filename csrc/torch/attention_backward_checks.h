// Ring 4. What the attention backward takes beside the forward's arguments, and its layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "torch/attention_checks.h"
#include "torch/checks.h"

namespace varstream {

// The forward's results and the gradients that arrive.
struct SavedTensors {
  torch::stable::Tensor dout, out;  // (total_q, heads, value_dim)
  torch::stable::Tensor lse;        // (heads, total_q) float32
  std::optional<torch::stable::Tensor> dlse;
};

struct BackwardOptions {
  AttentionOptions forward;
  int64_t max_seqlen_q;
  bool deterministic;
};

// Where the gradients of keys, values and sinks go.
struct Gradients {
  torch::stable::Tensor dk, dv;
  std::optional<torch::stable::Tensor> dsinks;  // float32, added into
  bool accumulate;                              // dk and dv are float32 and added into
};

inline bool has_shape(const torch::stable::Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t axis = 0;
  for (int64_t size : shape) {
    if (t.size(axis++) != size) return false;
  }
  return true;
}

inline void check_backward(const torch::stable::Tensor& q,
                           const torch::stable::Tensor& k,
                           const torch::stable::Tensor& v,
                           const SavedTensors& saved,
                           const AttentionOptions& o) {
  using torch::headeronly::ScalarType;
  check_attention(q, k, v, o);
  VARSTREAM_CHECK(q.size(0) * (q.size(1) / k.size(1)) <= attention::kMaxRows,
                  "q must have at most 2^31 - 256 rows times heads of a group, got ",
                  q.size(0) * (q.size(1) / k.size(1)));
  for (const auto& [t, name] : {std::pair{&saved.dout, "dout"}, std::pair{&saved.out, "out"}}) {
    VARSTREAM_CHECK(
        has_shape(*t, {q.size(0), q.size(1), v.size(2)}) && t->scalar_type() == q.scalar_type(),
        name,
        " must have q's dtype and shape (total_q, heads, value_dim), got shape ",
        shape_text(*t));
    check_same_device(*t, name, q, "q");
  }
  const auto check_lse = [&](const torch::stable::Tensor& t, const char* name) {
    VARSTREAM_CHECK(has_shape(t, {q.size(1), q.size(0)}) && t.scalar_type() == ScalarType::Float,
                    name,
                    " must be float32 of shape (heads, total_q), got shape ",
                    shape_text(t));
    check_same_device(t, name, q, "q");
  };
  check_lse(saved.lse, "lse");
  if (saved.dlse) check_lse(*saved.dlse, "dlse");
}

// First byte and one past the last that a strided tensor touches.
inline std::pair<const char*, const char*> extent(const torch::stable::Tensor& t) {
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

inline bool overlap(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a0, a1] = extent(a);
  const auto [b0, b1] = extent(b);
  return a0 < b1 && b0 < a1;
}

// Whether every element has its own place in memory: beyond all that smaller strides reach.
inline bool elements_apart(const torch::stable::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    if (t.size(axis) > 1) axes.push_back({t.stride(axis), t.size(axis)});
  }
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : axes) {
    if (stride <= reach) return false;
    reach += (size - 1) * stride;
  }
  return true;
}

// A buffer that is added into: float32, of the shape given, each element once in memory.
inline void check_accumulator(const torch::stable::Tensor& t,
                              const char* name,
                              std::initializer_list<int64_t> shape,
                              const torch::stable::Tensor& q) {
  VARSTREAM_CHECK(has_shape(t, shape) && t.scalar_type() == torch::headeronly::ScalarType::Float,
                  name,
                  " must be float32 and have the shape of what it is the gradient of, got shape ",
                  shape_text(t));
  check_same_device(t, name, q, "q");
  if (t.numel() == 0) return;
  VARSTREAM_CHECK(elements_apart(t),
                  name,
                  " must not be expanded or overlap itself: each element is added into on its own");
  const int64_t last = t.dim() - 1;
  VARSTREAM_CHECK(t.size(last) < 2 || t.stride(last) == 1,
                  name,
                  " must be contiguous in its last dimension on CUDA, got stride ",
                  t.stride(last));
}

inline void check_accumulators(const torch::stable::Tensor& q,
                               const torch::stable::Tensor& k,
                               const torch::stable::Tensor& v,
                               const SavedTensors& saved,
                               const AttentionOptions& o,
                               const Gradients& g) {
  check_accumulator(g.dk, "dk", {k.size(0), k.size(1), k.size(2)}, q);
  check_accumulator(g.dv, "dv", {v.size(0), v.size(1), v.size(2)}, q);
  VARSTREAM_CHECK(g.dsinks.has_value() == o.sinks.has_value(),
                  "dsinks must be given exactly when sinks is given");
  if (g.dsinks) check_accumulator(*g.dsinks, "dsinks", {q.size(1)}, q);
  const torch::stable::Tensor* read[] = {&q,
                                         &k,
                                         &v,
                                         &saved.dout,
                                         &saved.out,
                                         &saved.lse,
                                         saved.dlse ? &*saved.dlse : nullptr,
                                         o.sinks ? &*o.sinks : nullptr,
                                         o.alibi_slopes ? &*o.alibi_slopes : nullptr};
  const torch::stable::Tensor* written[] = {&g.dk, &g.dv, g.dsinks ? &*g.dsinks : nullptr};
  for (const auto* buffer : written) {
    if (buffer == nullptr) continue;
    for (const auto* t : read) {
      VARSTREAM_CHECK(t == nullptr || !overlap(*buffer, *t),
                      "dk, dv and dsinks must not share memory with an input (their address "
                      "ranges overlap)");
    }
    for (const auto* other : written) {
      VARSTREAM_CHECK(other == nullptr || other == buffer || !overlap(*buffer, *other),
                      "dk, dv and dsinks must not share memory (their address ranges overlap)");
    }
  }
}

// The same values where kernels can read them: gradients arrive in any layout.
inline SavedTensors in_kernel_layout(const SavedTensors& given) {
  SavedTensors saved = given;
  for (torch::stable::Tensor* t : {&saved.dout, &saved.out}) {
    if (t->stride(2) != 1) *t = torch::stable::contiguous(*t);
    if (!heads_aligned(*t)) *t = torch::stable::clone(torch::stable::contiguous(*t));
  }
  saved.lse = torch::stable::contiguous(saved.lse);
  if (saved.dlse) saved.dlse = torch::stable::contiguous(*saved.dlse);
  return saved;
}

}  // namespace varstream
