// Ring 4. Arguments of the attention operators, which the emulated library defines as well.
#pragma once

// What comes after q, k, v and the saved tensors, in order.
#define VARSTREAM_ATTENTION_OPTIONS                                                           \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? alibi_slopes, "       \
  "Tensor? sinks, Tensor? rng_state, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, " \
  "SymInt window_left, SymInt window_right, float softmax_scale, float softcap, "             \
  "float dropout_p, bool deterministic"

#define VARSTREAM_ATTENTION_ARGS "Tensor q, Tensor k, Tensor v, " VARSTREAM_ATTENTION_OPTIONS

#define VARSTREAM_ATTENTION_BWD_ARGS                                            \
  "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? " \
  "dlse, " VARSTREAM_ATTENTION_OPTIONS
#define VARSTREAM_ATTENTION_BWD_RESULTS "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
// What the accumulating operator adds into.
#define VARSTREAM_ATTENTION_BWD_BUFFERS "Tensor(a!) dk, Tensor(b!) dv, Tensor(c!)? dsinks"
