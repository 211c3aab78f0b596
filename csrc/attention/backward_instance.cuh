// Ring 3. The body of one generated source: instances of the backward kernels and their launch.
#pragma once

#include <type_traits>

#include "attention/backward_kernel.cuh"
#include "attention/backward_launch.h"
#include "attention/backward_query_kernel.cuh"
#include "ptx/launch.cuh"

namespace varstream::attention {

template <typename Kernel, typename Traits>
void launch_tiles(const char* name, uint32_t head_slots, const BackwardParams& p, void* stream) {
  ptx::launch<Kernel>(name, p.forward.slots.value * head_slots, Traits::kSharedBytes, p, stream);
}

template <typename Element, int Dim, int ValueDim>
void launch_backward_instance(const BackwardParams& p, bool small, void* stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    const uint32_t kv_heads = p.forward.heads / p.forward.group.value;
    launch_tiles<Backward<Traits>, Traits>("attention_backward", kv_heads, p, stream);
  };
  const auto run_for = [&](auto is_modified) {
    constexpr bool kModified = decltype(is_modified)::value;
    using Large = BackwardTraits<Element, Dim, ValueDim, kModified, false>;
    if constexpr (!Large::kFitsSmallDevices) {
      if (small) return run(BackwardTraits<Element, Dim, ValueDim, kModified, true>{});
    }
    run(Large{});
  };
  if (modified(p.forward)) return run_for(std::true_type{});
  run_for(std::false_type{});
}

template <typename Element, int Dim, int ValueDim>
void launch_backward_query_instance(const BackwardParams& p, void* stream) {
  const auto run = [&](auto traits) {
    using Traits = decltype(traits);
    const uint32_t head_slots = p.forward.heads / p.forward.pack.value;
    launch_tiles<BackwardQuery<Traits>, Traits>("attention_backward_query", head_slots, p, stream);
  };
  if (modified(p.forward)) return run(BackwardQueryTraits<Element, Dim, ValueDim, true>{});
  return run(BackwardQueryTraits<Element, Dim, ValueDim, false>{});
}

}  // namespace varstream::attention
