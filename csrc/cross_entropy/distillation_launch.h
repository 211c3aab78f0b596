// Ring 3. The distillation over rows of logits on a stream.
#pragma once

#include <cstdint>

#include "cross_entropy/distillation_params.h"

namespace varstream::cross_entropy {

// Writes p.losses and, with p.gradient, replaces the student's rows by their gradient in dtype
// `gradient`. Chooses p.residency. stream: a cudaStream_t of the current device. Throws
// std::runtime_error where a launch fails.
void launch_distillation(Dtype gradient, const DistillationParams& p, int64_t rows, void* stream);

// One dtype of gradients; compiled on its own.
template <typename Gradient>
void launch_distillation_instance(DistillationParams p, int64_t rows, void* stream);

}  // namespace varstream::cross_entropy
