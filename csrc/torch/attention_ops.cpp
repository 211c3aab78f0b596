// Ring 4. varlen_attention on CUDA: tensors become launch parameters. bfloat16 and float16 run in
// kernels; other dtypes are passed on to varlen_attention_composed.
//
// Built with VARSTREAM_EMULATED it defines varstream_emulated::varlen_attention instead, the same
// kernels over CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/forward_launch.h"
#include "torch/attention_checks.h"
#include "torch/attention_schema.h"
#include "torch/checks.h"
#include "varlen/tile_schedule_launch.h"
#if !defined(VARSTREAM_EMULATED)
#include <torch/csrc/stable/accelerator.h>

#include "torch/cuda_shim.h"
#endif

namespace varstream {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A dimension of size 1 may have any stride, also one that isn't aligned: 0 keeps the addresses of
// rows past the end, which copies form and don't read, like those of the others.
attention::Rows as_rows(const Tensor& t) {
  const auto stride = [&](int64_t axis) { return t.size(axis) == 1 ? 0 : t.stride(axis); };
  return {t.const_data_ptr(), stride(0), stride(1)};
}

// A contiguous float32 copy of slopes or sinks, which may come in any floating dtype.
MaybeTensor as_float(const MaybeTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
}

const float* float_data(const MaybeTensor& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

varlen::PackedLengths packed_lengths(const Tensor& q,
                                     const Tensor& k,
                                     const Tensor& cu_q,
                                     const Tensor& cu_k,
                                     const MaybeTensor& used) {
  return {cu_q.const_data_ptr<int32_t>(),
          cu_k.const_data_ptr<int32_t>(),
          used ? used->const_data_ptr<int32_t>() : nullptr,
          static_cast<int32_t>(cu_q.size(0) - 1),
          static_cast<int32_t>(q.size(0)),
          static_cast<int32_t>(k.size(0))};
}

// The query tiles, longest first, in a tensor that must outlive the launch: (slots, 2) int32.
Tensor schedule_tiles(attention::ForwardParams& p,
                      int64_t max_seqlen_k,
                      void* stream,
                      const Tensor& q) {
  const auto shape = attention::forward_shape(p.dim, p.value_dim, attention::modified(p));
  const int32_t group = static_cast<int32_t>(p.group.value);
  const int32_t pack =
      attention::packed_heads(p.lengths.total_q, p.lengths.batch, group, shape.tile_rows);
  const int64_t slots =
      varlen::tile_slots(p.lengths.total_q, p.lengths.batch, pack, shape.tile_rows);
  VARSTREAM_CHECK(slots * (p.heads / pack) <= std::numeric_limits<int32_t>::max(),
                  "q must make fewer than 2^31 tiles, got ",
                  slots * (p.heads / pack));
  p.slots = divisor(static_cast<uint32_t>(slots));
  p.pack = divisor(static_cast<uint32_t>(pack));
  // The maximum is a bound the caller knows without reading lengths; the rows are another.
  const int64_t longest = varlen::clamp<int64_t>(max_seqlen_k, 0, p.lengths.total_k);
  p.section_heads = divisor(static_cast<uint32_t>(attention::section_heads(
      p.heads / group, group / pack, longest, int64_t{p.dim} + p.value_dim)));
  const std::array<int64_t, 2> size{slots, 2};
  Tensor tiles = torch::stable::new_empty(q, {size.data(), size.size()}, ScalarType::Int);
  auto* out = reinterpret_cast<varlen::QueryTile*>(tiles.mutable_data_ptr<int32_t>());
  p.tiles = out;
  const auto max_cost = static_cast<int32_t>(ceil_div(longest, int64_t{shape.tile_keys}));
  varlen::launch_tile_schedule({p.lengths,
                                p.window,
                                pack,
                                shape.tile_rows,
                                shape.tile_keys,
                                max_cost,
                                static_cast<int32_t>(slots),
                                out},
                               stream);
  return tiles;
}

// q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv) -> out (total_q, Hq, Dv), lse (Hq,
// total_q) float32
std::tuple<Tensor, Tensor> attention_kernel(
    const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o, void* stream) {
  check_attention(q, k, v, o);
  const std::array<int64_t, 3> out_size{q.size(0), q.size(1), v.size(2)};
  const std::array<int64_t, 2> lse_size{q.size(1), q.size(0)};
  Tensor out = torch::stable::new_empty(q, {out_size.data(), out_size.size()});
  Tensor lse = torch::stable::new_empty(q, {lse_size.data(), lse_size.size()}, ScalarType::Float);
  if (q.size(0) == 0 || q.size(1) == 0) return {out, lse};

  const MaybeTensor slopes = as_float(o.alibi_slopes), sinks = as_float(o.sinks);
  attention::ForwardParams p{};
  p.q = as_rows(q), p.k = as_rows(k), p.v = as_rows(v);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.lengths = packed_lengths(q, k, o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k);
  p.window = window_of(o);
  p.heads = static_cast<int32_t>(q.size(1));
  p.group = divisor(static_cast<uint32_t>(q.size(1) / k.size(1)));
  p.dim = static_cast<int32_t>(q.size(2));
  p.value_dim = static_cast<int32_t>(v.size(2));
  p.softmax_scale = static_cast<float>(o.softmax_scale);
  p.softcap = static_cast<float>(o.softcap);
  p.alibi_slopes = float_data(slopes);
  p.alibi_batch_stride = slopes && slopes->dim() == 2 ? slopes->size(1) : 0;
  p.sinks = float_data(sinks);
  p.keep_scale = 1.0f;
  if (o.dropout_p > 0.0) {
    p.rng_state = o.rng_state->const_data_ptr<int64_t>();
    const double below = std::nearbyint(o.dropout_p * 4294967296.0);
    p.drop_below = static_cast<uint32_t>(std::min(below, 4294967295.0));
    p.keep_scale = static_cast<float>(1.0 / (1.0 - o.dropout_p));
  }
  p.score_unit = attention::modified(p) ? 1.0f : p.softmax_scale * kLog2E;
  const Tensor tiles = schedule_tiles(p, o.max_seqlen_k, stream, q);
  const auto dtype = q.scalar_type() == ScalarType::BFloat16 ? attention::Dtype::kBfloat16
                                                             : attention::Dtype::kFloat16;
  attention::launch_forward(dtype, p, stream);
  return {out, lse};
}

bool in_kernels(const Tensor& q) {
  return q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half;
}

#if !defined(VARSTREAM_EMULATED)
// Calls an operator that returns two tensors.
template <typename... Args>
std::tuple<Tensor, Tensor> call_operator(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}
#endif

std::tuple<Tensor, Tensor> varlen_attention(Tensor q,
                                            Tensor k,
                                            Tensor v,
                                            Tensor cu_seqlens_q,
                                            Tensor cu_seqlens_k,
                                            MaybeTensor seqused_k,
                                            MaybeTensor alibi_slopes,
                                            MaybeTensor sinks,
                                            MaybeTensor rng_state,
                                            int64_t max_seqlen_q,
                                            int64_t max_seqlen_k,
                                            bool causal,
                                            int64_t window_left,
                                            int64_t window_right,
                                            double softmax_scale,
                                            double softcap,
                                            double dropout_p,
                                            bool deterministic) {
  const AttentionOptions options{cu_seqlens_q,
                                 cu_seqlens_k,
                                 seqused_k,
                                 alibi_slopes,
                                 sinks,
                                 rng_state,
                                 max_seqlen_k,
                                 causal,
                                 window_left,
                                 window_right,
                                 softmax_scale,
                                 softcap,
                                 dropout_p};
#if defined(VARSTREAM_EMULATED)
  static_cast<void>(max_seqlen_q), static_cast<void>(deterministic);
  VARSTREAM_CHECK(in_kernels(q), "q must be bfloat16 or float16");
  return attention_kernel(q, k, v, options, nullptr);
#else
  if (!in_kernels(q)) {
    return call_operator("varstream::varlen_attention_composed",
                         q,
                         k,
                         v,
                         cu_seqlens_q,
                         cu_seqlens_k,
                         seqused_k,
                         alibi_slopes,
                         sinks,
                         rng_state,
                         max_seqlen_q,
                         max_seqlen_k,
                         causal,
                         window_left,
                         window_right,
                         softmax_scale,
                         softcap,
                         dropout_p,
                         deterministic);
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return attention_kernel(q, k, v, options, shim::current_cuda_stream(q.get_device_index()));
#endif
}

}  // namespace
}  // namespace varstream

#if defined(VARSTREAM_EMULATED)
STABLE_TORCH_LIBRARY(varstream_emulated, m) {
  m.def("varlen_attention(" VARSTREAM_ATTENTION_ARGS ") -> (Tensor out, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(varstream_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(varstream, CUDA, m) {
#endif
  m.impl("varlen_attention", TORCH_BOX(&varstream::varlen_attention));
}
