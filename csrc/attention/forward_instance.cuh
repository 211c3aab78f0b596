// Ring 3. The body of one generated source: an instance of the forward kernel and its launch.
#pragma once

#include <limits>
#include <stdexcept>

#include "attention/forward_kernel.cuh"
#include "attention/forward_launch.h"
#include "ptx/launch.cuh"

namespace varstream::attention {

template <typename Traits>
void launch_forward_instance(const ForwardParams& p, void* stream) {
  const int64_t blocks = int64_t{p.slots.value} * (p.heads / static_cast<int32_t>(p.pack.value));
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("varstream: attention over too many tiles and heads for one launch");
  }
  ptx::launch<Forward<Traits>>(
      "attention_forward", static_cast<uint32_t>(blocks), Traits::kSharedBytes, p, stream);
}

}  // namespace varstream::attention
