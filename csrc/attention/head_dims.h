// Ring 3. The padded head dims that attention kernels are compiled for.
#pragma once

#include <stdexcept>

namespace varstream::attention {

enum class Dtype { kBfloat16, kFloat16 };

template <int Dim, int ValueDim>
struct HeadDims {
  static constexpr int kDim = Dim, kValueDim = ValueDim;
};

// Calls run(HeadDims) with the smallest ones that hold dim and value_dim. The list is the one in
// csrc/cmake/attention.cmake.
template <typename Run>
auto with_head_dims(int dim, int value_dim, Run run) {
  const int larger = dim > value_dim ? dim : value_dim;
  if (larger <= 32) return run(HeadDims<32, 32>{});
  if (larger <= 64) return run(HeadDims<64, 64>{});
  if (larger <= 96) return run(HeadDims<96, 96>{});
  if (larger <= 128) return run(HeadDims<128, 128>{});
  if (larger <= 192 && value_dim <= 128) return run(HeadDims<192, 128>{});
  if (larger <= 192) return run(HeadDims<192, 192>{});
  if (larger <= 256) return run(HeadDims<256, 256>{});
  throw std::runtime_error("varstream: attention kernels take head dims up to 256");
}

}  // namespace varstream::attention
