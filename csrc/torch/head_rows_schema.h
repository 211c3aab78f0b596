// Ring 4. Schemas of the head's row kernels, which the emulated library defines as well.
#pragma once

// Rows i with first_row + i >= count take no part. Upstream gradients and results are float32;
// shard_* are cross_entropy::RowShard's.
#define VARSTREAM_SOFTMAX_ROWS                                                               \
  "softmax_rows_(Tensor(a!) logits, SymInt classes, SymInt first_row, Tensor? count, "       \
  "Tensor target, float logit_scale, float softcap, float temperature, Tensor? bias, "       \
  "Tensor? class_weight, Tensor? dnll, Tensor? dsmooth, Tensor? dlse, Tensor? dentropy, "    \
  "Tensor? lse_sq_scale, ScalarType? gradient, Tensor(b!)? logp, Tensor(c!)? lse, "          \
  "Tensor(d!)? entropy, Tensor(e!)? class_sum, Tensor(f!)? log_sum_sq, Tensor(g!)? argmax, " \
  "Tensor(h!)? shard_sums, Tensor(i!)? shard_target_z, Tensor? shard_given) -> ()"

// Divergence of the softmax of student rows from that of teacher rows, and its gradient over the
// student's; dloss (rows,) multiplies it, losses do without.
#define VARSTREAM_DISTILLATION_ROWS                                                           \
  "distillation_rows_(Tensor(a!) student, Tensor teacher, SymInt classes, SymInt first_row, " \
  "Tensor? count, float beta, float temperature, float logit_scale, float softcap, "          \
  "float teacher_logit_scale, float teacher_softcap, Tensor? bias, Tensor? teacher_bias, "    \
  "Tensor? dloss, ScalarType? gradient, Tensor(b!) losses) -> ()"
