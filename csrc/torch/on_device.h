// Ring 4. Running a launch on a tensor's device and its current stream; emulated: on the host.
#pragma once

#include <torch/csrc/stable/tensor.h>
#if !defined(VARSTREAM_EMULATED)
#include <torch/csrc/stable/accelerator.h>

#include "torch/cuda_shim.h"
#endif

namespace varstream {

// Returns body(stream), a cudaStream_t or null.
template <typename Body>
auto on_device(const torch::stable::Tensor& like, const Body& body) {
#if defined(VARSTREAM_EMULATED)
  static_cast<void>(like);
  return body(static_cast<void*>(nullptr));
#else
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return body(shim::current_cuda_stream(like.get_device_index()));
#endif
}

}  // namespace varstream
