// Every operator schema of the namespace varstream, grouped by topic; nothing else.
//
// CUDA implementations are boxed beside their kernels' bindings (pack_ops.cpp, ...). CPU
// implementations, fakes and autograd attach from Python (varstream/ops, varstream/reference), so
// the operators exist whatever the module was built with.
#include <torch/csrc/stable/library.h>

#include "torch/attention_schema.h"
#include "torch/head_rows_schema.h"

// What comes after q, k and v in attention with relative bias, in order.
#define VARSTREAM_RELATIVE_OPTIONS                                                   \
  "Tensor cu_seqlens, Tensor buckets, Tensor? table, Tensor? key_table, "            \
  "Tensor? query_table, Tensor? rng_state, SymInt max_seqlen, float softmax_scale, " \
  "float dropout_p, bool deterministic"

// The arguments that the head's operators share, in order, and which gradients are wanted.
#define VARSTREAM_HEAD_ARGS                                                  \
  "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, " \
  "int ignore_index, float logit_scale, float softcap, float temperature, "  \
  "SymInt chunk_size, SymInt? max_rows, ScalarType? logits_dtype"
#define VARSTREAM_HEAD_UPSTREAM \
  "Tensor? dlogp, Tensor? dentropy, Tensor? dlse, Tensor? dclass_sum, Tensor? entropy, "
#define VARSTREAM_HEAD_NEEDS "bool need_input_grad, bool need_weight_grad, bool need_bias_grad"

STABLE_TORCH_LIBRARY(varstream, m) {
  // Packed batches. indices int64 (n,): row of x that packed row i comes from, negative: no row.
  m.def("pack(Tensor x, Tensor indices) -> Tensor");
  m.def("unpack(Tensor values, Tensor indices, SymInt rows, float fill) -> Tensor");

  // Attention over packed rows.
  m.def("varlen_attention(" VARSTREAM_ATTENTION_ARGS ") -> (Tensor out, Tensor lse)");
  // The same from ATen calls: what CUDA kernels don't take, float32 and float64.
  m.def("varlen_attention_composed(" VARSTREAM_ATTENTION_ARGS ") -> (Tensor out, Tensor lse)");
  m.def("varlen_attention_bwd(" VARSTREAM_ATTENTION_BWD_ARGS
        ") -> " VARSTREAM_ATTENTION_BWD_RESULTS);
  m.def("varlen_attention_bwd_composed(" VARSTREAM_ATTENTION_BWD_ARGS
        ") -> " VARSTREAM_ATTENTION_BWD_RESULTS);
  m.def("varlen_attention_bwd_accumulate(" VARSTREAM_ATTENTION_BWD_ARGS
        ", " VARSTREAM_ATTENTION_BWD_BUFFERS ") -> Tensor dq");
  m.def("varlen_attention_bwd_accumulate_composed(" VARSTREAM_ATTENTION_BWD_ARGS
        ", " VARSTREAM_ATTENTION_BWD_BUFFERS ") -> Tensor dq");
  // With bias by relative position. A table's gradient that is not needed comes back empty.
  m.def("relative_attention(Tensor q, Tensor k, Tensor v, " VARSTREAM_RELATIVE_OPTIONS
        ") -> Tensor out");
  m.def("relative_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, "  //
        VARSTREAM_RELATIVE_OPTIONS
        ", bool need_table_grads) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, "
        "Tensor dkey_table, Tensor dquery_table)");

  // The head: logits never exist as a whole. target (N,) or (N, K).
  m.def("linear_cross_entropy(" VARSTREAM_HEAD_ARGS
        ", Tensor? class_weight, Tensor? nll_scale, Tensor? smooth_scale, Tensor? lse_sq_scale, "
        "bool return_metrics, " VARSTREAM_HEAD_NEEDS
        ") -> (Tensor loss_sum, Tensor dinput, Tensor dweight, Tensor dbias, Tensor lse_sq_sum, "
        "Tensor logp, Tensor argmax)");
  m.def("token_logprobs(" VARSTREAM_HEAD_ARGS
        ", Tensor? class_weight, bool return_entropy, bool return_class_sum, bool return_argmax, "
        "bool return_log_sum_sq) -> (Tensor logp, Tensor entropy, Tensor lse, Tensor class_sum, "
        "Tensor log_sum_sq, Tensor argmax)");
  m.def("token_logprobs_bwd(" VARSTREAM_HEAD_UPSTREAM VARSTREAM_HEAD_ARGS
        ", Tensor? class_weight, " VARSTREAM_HEAD_NEEDS
        ") -> (Tensor dinput, Tensor dweight, Tensor dbias)");
  // The same with the weight's gradient added to a buffer of the caller's.
  m.def("token_logprobs_bwd_accumulate(" VARSTREAM_HEAD_UPSTREAM VARSTREAM_HEAD_ARGS
        ", Tensor? class_weight, bool need_input_grad, bool need_bias_grad, "
        "Tensor(a!) weight_grad) -> (Tensor dinput, Tensor dbias)");

  // What a chunk of logits yields, and their gradient in place; for the head's drivers.
  m.def(VARSTREAM_SOFTMAX_ROWS);
  m.def(VARSTREAM_DISTILLATION_ROWS);

  // The encoder layer's row-wise parts. Rows are every dimension but the last; a gradient that is
  // not needed comes back empty.
  m.def(
      "bias_residual_layer_norm(Tensor x, Tensor? bias, Tensor? residual, Tensor? weight, "
      "Tensor? ln_bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "bias_residual_layer_norm_bwd(Tensor dy, Tensor x, Tensor? bias, Tensor? residual, "
      "Tensor? weight, Tensor mean, Tensor rstd, bool need_input_grad, bool need_bias_grad, "
      "bool need_weight_grad, bool need_ln_bias_grad) -> "
      "(Tensor dx, Tensor dbias, Tensor dweight, Tensor dln_bias)");
  m.def(
      "linear_bias_gelu(Tensor x, Tensor weight, Tensor? bias, str approximate, bool keep_pre) -> "
      "(Tensor y, Tensor pre)");
  m.def(
      "linear_bias_gelu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor pre, str approximate, "
      "bool need_input_grad, bool need_weight_grad, bool need_bias_grad) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)");

  // Divergence of a student's head from a teacher's, chunk by chunk. The gradients are those of
  // loss_sum = sum(token_weight * losses) over the rows in mask.
  m.def(
      "linear_distillation(Tensor input, Tensor linear_weight, Tensor? linear_bias, "
      "Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias, Tensor? mask, "
      "Tensor? token_weight, float beta, float temperature, float logit_scale, float softcap, "
      "float teacher_logit_scale, float teacher_softcap, SymInt chunk_size, SymInt? max_rows, "
      "bool need_input_grad, bool need_weight_grad, bool need_bias_grad) -> "
      "(Tensor losses, Tensor loss_sum, Tensor valid_count, Tensor dinput, Tensor dweight, "
      "Tensor dbias)");
}
