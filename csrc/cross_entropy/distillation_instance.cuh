// Ring 3. The body of one generated source: the distillation kernel of a dtype of gradients.
#pragma once

#include "cross_entropy/distillation_kernel.cuh"
#include "cross_entropy/distillation_launch.h"
#include "cross_entropy/row_launch.cuh"

namespace varstream::cross_entropy {

template <typename Gradient>
void launch_distillation_instance(DistillationParams p, int64_t rows, void* stream) {
  using Kernel = Distillation<Gradient>;
  const int64_t words = ceil_div(p.classes, Kernel::kValues);
  launch_rows<Kernel>("distillation_rows", p, rows, words, 2, Kernel::kSlotsAt, false, stream);
}

}  // namespace varstream::cross_entropy
