// Ring 4. The schema of softmax_rows_, which the emulated library defines as well.
#pragma once

// Rows i with first_row + i >= count take no part. Upstream gradients and results are float32.
#define VARSTREAM_SOFTMAX_ROWS                                                                  \
  "softmax_rows_(Tensor(a!) logits, SymInt classes, SymInt first_row, Tensor? count, "          \
  "Tensor target, float logit_scale, float softcap, float temperature, Tensor? bias, "          \
  "Tensor? class_weight, Tensor? dnll, Tensor? dsmooth, Tensor? dlse, Tensor? dentropy, "       \
  "Tensor? lse_sq_scale, ScalarType? gradient, Tensor(b!)? logp, Tensor(c!)? lse, Tensor(d!)? " \
  "entropy, Tensor(e!)? class_sum, Tensor(f!)? log_sum_sq, Tensor(g!)? argmax) -> ()"
