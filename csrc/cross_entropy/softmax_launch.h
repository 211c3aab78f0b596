// Ring 3. The softmax over rows of logits on a stream.
#pragma once

#include <cstdint>

#include "cross_entropy/softmax_params.h"

namespace varstream::cross_entropy {

// Replaces rows of logits by their gradient, in dtype `gradient`, or leaves them (p.gradient) and
// writes p.results. `values` float32: gradient in any dtype; else in theirs. Chooses p.residency.
// stream: a cudaStream_t of the current device. Throws std::runtime_error where a launch fails.
void launch_softmax(
    Dtype values, Dtype gradient, const SoftmaxParams& p, int64_t rows, void* stream);

// One pair of dtypes; compiled on its own.
template <typename Element, typename Gradient>
void launch_softmax_instance(const SoftmaxParams& p, int64_t rows, void* stream);

}  // namespace varstream::cross_entropy
