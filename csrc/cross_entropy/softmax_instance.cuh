// Ring 3. The body of one generated source: the softmax kernels of a pair of dtypes.
#pragma once

#include "cross_entropy/row_launch.cuh"
#include "cross_entropy/softmax_kernel.cuh"
#include "cross_entropy/softmax_launch.h"

namespace varstream::cross_entropy {

template <typename Kernel>
void launch_softmax_kernel(const SoftmaxParams& p, int64_t rows, void* stream) {
  const int64_t words = ceil_div(p.classes, Kernel::kValues);
  const size_t fixed = Kernel::Shared::slots_at(p.targets);
  const bool once = !p.gradient || p.shard.given != nullptr;
  launch_rows<Kernel>("softmax_rows", p, rows, words, 1, fixed, once, stream);
}

template <typename Element, typename Gradient>
void launch_softmax_instance(const SoftmaxParams& p, int64_t rows, void* stream) {
  if (modified(p)) {
    launch_softmax_kernel<Softmax<Element, Gradient, true>>(p, rows, stream);
  } else {
    launch_softmax_kernel<Softmax<Element, Gradient, false>>(p, rows, stream);
  }
}

}  // namespace varstream::cross_entropy
