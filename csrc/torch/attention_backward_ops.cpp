// Ring 4. varlen_attention's backward on CUDA: tensors become launch parameters. bfloat16 and
// float16 run in kernels; other dtypes are passed on to the composed operators.
//
// Built with VARSTREAM_EMULATED it defines the operators of varstream_emulated instead, the same
// kernels over CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "attention/backward_launch.h"
#include "torch/attention_backward_checks.h"
#include "torch/attention_params.h"
#include "torch/attention_schema.h"
#include "torch/call_operator.h"
#include "torch/on_device.h"

namespace varstream {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <size_t Axes>
Tensor empty(const Tensor& like, const std::array<int64_t, Axes>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

template <size_t Axes>
Tensor zeros(const Tensor& like, const std::array<int64_t, Axes>& size, ScalarType dtype) {
  return torch::stable::new_zeros(like, {size.data(), size.size()}, dtype);
}

attention::GradientRows as_gradient(Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1)};
}

// (total_q, heads) of attention::RowStatistics, as float32 (total_q, heads, 2).
Tensor row_statistics(const Tensor& q, const SavedTensors& saved, void* stream) {
  Tensor statistics = empty<3>(q, {q.size(0), q.size(1), 2}, ScalarType::Float);
  attention::PrepareParams p{};
  p.dout = as_rows(saved.dout), p.out = as_rows(saved.out);
  p.lse = saved.lse.const_data_ptr<float>();
  p.dlse = saved.dlse ? saved.dlse->const_data_ptr<float>() : nullptr;
  p.statistics = reinterpret_cast<attention::RowStatistics*>(statistics.mutable_data_ptr<float>());
  p.total_q = static_cast<int32_t>(q.size(0));
  p.heads = static_cast<int32_t>(q.size(1));
  p.value_dim = static_cast<int32_t>(saved.out.size(2));
  attention::launch_backward_prepare(kernel_dtype(q), p, stream);
  return statistics;
}

// dq (total_q, heads, dim) in q's dtype; dk and dv are added into (float32) or written.
Tensor backward_kernels(const Tensor& q,
                        const Tensor& k,
                        const Tensor& v,
                        const SavedTensors& given,
                        const BackwardOptions& o,
                        Gradients& gradients,
                        void* stream) {
  Tensor dq = empty<3>(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  if (q.size(0) == 0 || q.size(1) == 0) return dq;
  const SavedTensors saved = in_kernel_layout(given);
  const KernelOptions kept(o.forward);
  const Tensor statistics = row_statistics(q, saved, stream);
  const auto* rows =
      reinterpret_cast<const attention::RowStatistics*>(statistics.const_data_ptr<float>());
  attention::BackwardParams p{};
  p.forward = forward_params(q, k, v, o.forward, kept);
  p.dout = as_rows(saved.dout);
  p.statistics = rows;
  p.dk = as_gradient(gradients.dk), p.dv = as_gradient(gradients.dv);
  p.accumulate = gradients.accumulate;
  const auto dtype = kernel_dtype(q);
  const auto shape =
      attention::backward_shape(p.forward.dim, p.forward.value_dim, attention::modified(p.forward));
  if (o.deterministic) {
    p.dq = dq.mutable_data_ptr();
    const Tensor tiles = schedule_queries(
        p.forward, shape.query_rows, shape.query_keys, o.forward.max_seqlen_k, q, stream);
    attention::launch_backward_query(dtype, p, stream);
  }
  MaybeTensor sum;
  if (!o.deterministic) {
    sum = zeros<3>(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    p.dq_sum = sum->mutable_data_ptr<float>();
  }
  if (k.size(0) > 0) {
    const Tensor tiles =
        schedule_keys(p.forward, shape.keys, shape.rows, o.max_seqlen_q, q, stream);
    attention::launch_backward(dtype, p, stream);
  }
  if (sum) {
    attention::launch_backward_round(
        dtype, {p.dq_sum, dq.mutable_data_ptr(), q.numel(), p.forward.softmax_scale}, stream);
  }
  if (gradients.dsinks) {
    attention::launch_backward_sinks({rows,
                                      p.forward.sinks,
                                      gradients.dsinks->mutable_data_ptr<float>(),
                                      p.forward.lengths,
                                      p.forward.heads},
                                     stream);
  }
  return dq;
}

// The schema's arguments, once for both operators.
#define VARSTREAM_BACKWARD_PARAMETERS                                                       \
  Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, MaybeTensor dlse,      \
      Tensor cu_seqlens_q, Tensor cu_seqlens_k, MaybeTensor seqused_k, MaybeTensor slopes,  \
      MaybeTensor sinks, MaybeTensor rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k, \
      bool causal, int64_t window_left, int64_t window_right, double softmax_scale,         \
      double softcap, double dropout_p, bool deterministic
#define VARSTREAM_BACKWARD_ARGUMENTS                                                              \
  dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, seqused_k, slopes, sinks, rng_state, \
      max_seqlen_q, max_seqlen_k, causal, window_left, window_right, softmax_scale, softcap,      \
      dropout_p, deterministic
#define VARSTREAM_BACKWARD_OPTIONS  \
  BackwardOptions {                 \
    {cu_seqlens_q,                  \
     cu_seqlens_k,                  \
     seqused_k,                     \
     slopes,                        \
     sinks,                         \
     rng_state,                     \
     max_seqlen_k,                  \
     causal,                        \
     window_left,                   \
     window_right,                  \
     softmax_scale,                 \
     softcap,                       \
     dropout_p},                    \
        max_seqlen_q, deterministic \
  }

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_bwd(VARSTREAM_BACKWARD_PARAMETERS) {
#if defined(VARSTREAM_EMULATED)
  check_in_kernels(q);
#else
  if (!in_kernels(q)) {
    const auto [dq, dk, dv, dsinks] =
        call_operator<4>("varstream::varlen_attention_bwd_composed", VARSTREAM_BACKWARD_ARGUMENTS);
    return {dq, dk, dv, dsinks};
  }
#endif
  return on_device(q, [&](void* stream) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    const BackwardOptions options = VARSTREAM_BACKWARD_OPTIONS;
    const SavedTensors saved{dout, out, lse, dlse};
    check_backward(q, k, v, saved, options.forward);
    Gradients gradients{zeros<3>(k, {k.size(0), k.size(1), k.size(2)}, k.scalar_type()),
                        zeros<3>(v, {v.size(0), v.size(1), v.size(2)}, v.scalar_type()),
                        std::nullopt,
                        false};
    if (sinks) gradients.dsinks = zeros<1>(q, {q.size(1)}, ScalarType::Float);
    Tensor dq = backward_kernels(q, k, v, saved, options, gradients, stream);
    Tensor dsinks = sinks ? torch::stable::to(*gradients.dsinks, sinks->scalar_type())
                          : empty<1>(q, {0}, q.scalar_type());
    return {dq, gradients.dk, gradients.dv, dsinks};
  });
}

Tensor varlen_attention_bwd_accumulate(VARSTREAM_BACKWARD_PARAMETERS,
                                       Tensor dk,
                                       Tensor dv,
                                       MaybeTensor dsinks) {
#if defined(VARSTREAM_EMULATED)
  check_in_kernels(q);
#else
  if (!in_kernels(q)) {
    return call_operator<1>("varstream::varlen_attention_bwd_accumulate_composed",
                            VARSTREAM_BACKWARD_ARGUMENTS,
                            dk,
                            dv,
                            dsinks)[0];
  }
#endif
  return on_device(q, [&](void* stream) {
    const BackwardOptions options = VARSTREAM_BACKWARD_OPTIONS;
    const SavedTensors saved{dout, out, lse, dlse};
    check_backward(q, k, v, saved, options.forward);
    Gradients gradients{dk, dv, dsinks, true};
    check_accumulators(q, k, v, saved, options.forward, gradients);
    return backward_kernels(q, k, v, saved, options, gradients, stream);
  });
}

}  // namespace
}  // namespace varstream

#if defined(VARSTREAM_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(varstream_emulated, m) {
  m.def("varlen_attention_bwd(" VARSTREAM_ATTENTION_BWD_ARGS
        ") -> " VARSTREAM_ATTENTION_BWD_RESULTS);
  m.def("varlen_attention_bwd_accumulate(" VARSTREAM_ATTENTION_BWD_ARGS
        ", " VARSTREAM_ATTENTION_BWD_BUFFERS ") -> Tensor dq");
}
STABLE_TORCH_LIBRARY_IMPL(varstream_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(varstream, CUDA, m) {
#endif
  m.impl("varlen_attention_bwd", TORCH_BOX(&varstream::varlen_attention_bwd));
  m.impl("varlen_attention_bwd_accumulate", TORCH_BOX(&varstream::varlen_attention_bwd_accumulate));
}
