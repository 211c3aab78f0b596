// Ring 4. Calling an operator by name, whoever implements it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>

namespace varstream {

// Calls the operator `name` (namespace::name, no overload) that returns Results tensors.
template <size_t Results, typename... Args>
std::array<torch::stable::Tensor, Results> call_operator(const char* name, const Args&... args) {
  std::array<StableIValue, std::max(Results, sizeof...(Args))> stack{
      torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  std::array<torch::stable::Tensor, Results> results;
  for (size_t i = 0; i < Results; ++i) {
    results[i] = torch::stable::detail::to<torch::stable::Tensor>(stack[i]);
  }
  return results;
}

}  // namespace varstream
