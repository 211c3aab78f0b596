// Ring 3. Launches attention forward; declared without CUDA headers so bindings stay light.
#pragma once

#include "attention/forward_params.h"
#include "attention/head_dims.h"

namespace varstream::attention {

inline constexpr const char* kForwardKernels[] = {"attention_forward"};

// Tile sizes of the instance that serves these head dims.
struct ForwardShape {
  int tile_rows;
  int tile_keys;
};
ForwardShape forward_shape(int dim, int value_dim, bool modified);

// Launches the instance for dtype and head dims (multiples of 8, up to 256) on stream, a
// cudaStream_t of the current device. p.tiles must have been scheduled for forward_shape(). Throws
// std::runtime_error where the launch is refused.
void launch_forward(Dtype dtype, const ForwardParams& p, void* stream);

// One instance; defined in the source generated for it (forward_instance.cu.in).
template <typename Traits>
void launch_forward_instance(const ForwardParams& p, void* stream);

}  // namespace varstream::attention
