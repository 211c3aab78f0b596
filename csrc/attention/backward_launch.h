// Ring 3. Launches the attention backward; declared without CUDA headers so bindings stay light.
#pragma once

#include "attention/backward_params.h"
#include "attention/head_dims.h"

namespace varstream::attention {

inline constexpr const char* kBackwardKernels[] = {"attention_backward_prepare",
                                                   "attention_backward",
                                                   "attention_backward_query",
                                                   "attention_backward_round",
                                                   "attention_backward_sinks"};

// Tile sizes of the instances that serve these head dims on the current device.
struct BackwardShape {
  int keys;        // the keys that a block of attention_backward owns
  int rows;        // the rows it walks at a time
  int query_rows;  // the rows that a block of attention_backward_query owns
  int query_keys;  // the keys it walks at a time
};
BackwardShape backward_shape(int dim, int value_dim, bool modified);

// In the order in which a backward runs them, each on stream, a cudaStream_t of the current device.
// Head dims are multiples of 8 up to 256. All throw std::runtime_error where a launch is refused.
//
// Row statistics from dout, out and lse.
void launch_backward_prepare(Dtype dtype, const PrepareParams& p, void* stream);
// dK, dV and, where p.dq_sum is given, dQ's sum; p.forward's tiles are scheduled over keys.
void launch_backward(Dtype dtype, const BackwardParams& p, void* stream);
// dQ, always the same; p.forward's tiles are scheduled over query_rows.
void launch_backward_query(Dtype dtype, const BackwardParams& p, void* stream);
// dQ's sum, scaled and rounded.
void launch_backward_round(Dtype dtype, const RoundParams& p, void* stream);
// The gradient of sinks.
void launch_backward_sinks(const SinkParams& p, void* stream);

// One instance each; defined in the source generated for it (backward_instance.cu.in).
template <typename Element, int Dim, int ValueDim>
void launch_backward_instance(const BackwardParams& p, bool small, void* stream);
template <typename Element, int Dim, int ValueDim>
void launch_backward_query_instance(const BackwardParams& p, void* stream);

}  // namespace varstream::attention
