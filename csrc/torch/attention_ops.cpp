// Ring 4. varlen_attention on CUDA: tensors become launch parameters. bfloat16 and float16 run in
// kernels; other dtypes are passed on to varlen_attention_composed.
//
// Built with VARSTREAM_EMULATED it defines varstream_emulated::varlen_attention instead, the same
// kernels over CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "attention/forward_launch.h"
#include "torch/attention_params.h"
#include "torch/attention_schema.h"
#include "torch/call_operator.h"
#include "torch/on_device.h"

namespace varstream {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

  const KernelOptions kept(o);
  attention::ForwardParams p = forward_params(q, k, v, o, kept);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  const auto shape = attention::forward_shape(p.dim, p.value_dim, attention::modified(p));
  const Tensor tiles =
      schedule_queries(p, shape.tile_rows, shape.tile_keys, o.max_seqlen_k, q, stream);
  attention::launch_forward(kernel_dtype(q), p, stream);
  return {out, lse};
}

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
  check_in_kernels(q);
#else
  if (!in_kernels(q)) {
    const auto [out, lse] = call_operator<2>("varstream::varlen_attention_composed",
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
    return {out, lse};
  }
#endif
  return on_device(q, [&](void* stream) { return attention_kernel(q, k, v, options, stream); });
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
