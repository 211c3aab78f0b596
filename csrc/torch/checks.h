// Ring 4. Checks of operator arguments: each message names the argument, the contract, the value.
//
// Python wrappers check first and raise TypeError or ValueError; these guard direct torch.ops
// calls (RuntimeError) and everything a kernel relies on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#define VARSTREAM_CHECK(condition, ...) STD_TORCH_CHECK(condition, "varstream: ", __VA_ARGS__)

namespace varstream {

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(tensor.size(axis));
  }
  return text + ")";
}

inline void check_same_device(const torch::stable::Tensor& tensor,
                              const char* name,
                              const torch::stable::Tensor& like,
                              const char* like_name) {
  VARSTREAM_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
      name,
      " must be on the device of ",
      like_name);
}

inline void check_same_cuda_device(const torch::stable::Tensor& tensor,
                                   const char* name,
                                   const torch::stable::Tensor& like,
                                   const char* like_name) {
  VARSTREAM_CHECK(tensor.is_cuda(), name, " must be a CUDA tensor like ", like_name);
  VARSTREAM_CHECK(tensor.get_device_index() == like.get_device_index(),
                  name,
                  " must be on the device of ",
                  like_name,
                  ", cuda:",
                  like.get_device_index(),
                  ", got cuda:",
                  tensor.get_device_index());
}

inline void check_indices(const torch::stable::Tensor& indices) {
  VARSTREAM_CHECK(
      indices.dim() == 1, "indices must have 1 dimension (n,), got shape ", shape_text(indices));
  VARSTREAM_CHECK(indices.scalar_type() == torch::headeronly::ScalarType::Long,
                  "indices must have dtype int64");
}

}  // namespace varstream
