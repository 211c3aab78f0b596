// Ring 3. The body of one generated source: the softmax kernels of a pair of dtypes.
#pragma once

#include <limits>
#include <stdexcept>

#include "cross_entropy/softmax_kernel.cuh"
#include "cross_entropy/softmax_launch.h"
#include "ptx/cluster.cuh"
#include "ptx/launch.cuh"

namespace varstream::cross_entropy {

template <typename Kernel>
void launch_softmax_kernel(SoftmaxParams p, int64_t rows, void* stream) {
  using Shared = typename Kernel::Shared;
  const size_t fixed = Shared::slots_at(p.targets);
  p.residency = residency_of(ceil_div(p.classes, Kernel::kValues),
                             p.gradient,
                             {static_cast<int64_t>(ptx::max_shared_bytes()),
                              static_cast<int64_t>(fixed),
                              ptx::max_cluster_blocks()});
  const int64_t blocks = rows * p.residency.cluster;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("varstream: softmax over too many rows for one launch");
  }
  const size_t bytes = fixed + Shared::slot_bytes(p.residency.slots);
  ptx::launch<Kernel>(
      "softmax_rows", static_cast<uint32_t>(blocks), bytes, p, stream, p.residency.cluster);
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
