// Ring 3. Picks the instances of the attention backward, which are compiled on their own, and
// launches its row-wise kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/backward_launch.h"
#include "attention/backward_prepare_kernel.cuh"
#include "attention/backward_rows_kernel.cuh"
#include "attention/backward_traits.h"
#include "common/math.h"
#include "ptx/launch.cuh"

namespace varstream::attention {
namespace {

// Whether the current device lacks the shared memory of the larger tiles.
bool small_device(size_t bytes) {
  return ptx::max_shared_bytes() < bytes;
}

template <typename Run>
void with_element(Dtype dtype, Run run) {
  if (dtype == Dtype::kBfloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

template <bool Modified, typename Dims>
BackwardShape shape(Dims) {
  constexpr int kDim = Dims::kDim, kValueDim = Dims::kValueDim;
  using Query = BackwardQueryTraits<__nv_bfloat16, kDim, kValueDim, Modified>;
  using Large = BackwardTraits<__nv_bfloat16, kDim, kValueDim, Modified, false>;
  using Small = BackwardTraits<__nv_bfloat16, kDim, kValueDim, Modified, true>;
  if (small_device(Large::kSharedBytes)) {
    return {Small::kKeys, Small::kRows, Query::kRows, Query::kKeys};
  }
  return {Large::kKeys, Large::kRows, Query::kRows, Query::kKeys};
}

}  // namespace

BackwardShape backward_shape(int dim, int value_dim, bool modified) {
  return with_head_dims(
      dim, value_dim, [&](auto dims) { return modified ? shape<true>(dims) : shape<false>(dims); });
}

void launch_backward_prepare(Dtype dtype, const PrepareParams& p, void* stream) {
  with_element(dtype, [&](auto element) {
    using Kernel = BackwardPrepare<decltype(element)>;
    const int64_t rows = int64_t{p.total_q} * p.heads;
    const int64_t block_rows = Kernel::block_rows(p.value_dim);
    const auto blocks = static_cast<uint32_t>(ceil_div(rows, block_rows));
    ptx::launch<Kernel>("attention_backward_prepare", blocks, 0, p, stream);
  });
}

void launch_backward(Dtype dtype, const BackwardParams& p, void* stream) {
  with_head_dims(p.forward.dim, p.forward.value_dim, [&](auto dims) {
    constexpr int kDim = decltype(dims)::kDim, kValueDim = decltype(dims)::kValueDim;
    with_element(dtype, [&](auto element) {
      using Element = decltype(element);
      using Plain = BackwardTraits<Element, kDim, kValueDim, false, false>;
      using Modified = BackwardTraits<Element, kDim, kValueDim, true, false>;
      const size_t bytes = modified(p.forward) ? Modified::kSharedBytes : Plain::kSharedBytes;
      launch_backward_instance<Element, kDim, kValueDim>(p, small_device(bytes), stream);
    });
  });
}

void launch_backward_query(Dtype dtype, const BackwardParams& p, void* stream) {
  with_head_dims(p.forward.dim, p.forward.value_dim, [&](auto dims) {
    constexpr int kDim = decltype(dims)::kDim, kValueDim = decltype(dims)::kValueDim;
    with_element(dtype, [&](auto element) {
      launch_backward_query_instance<decltype(element), kDim, kValueDim>(p, stream);
    });
  });
}

void launch_backward_round(Dtype dtype, const RoundParams& p, void* stream) {
  with_element(dtype, [&](auto element) {
    using Kernel = BackwardRound<decltype(element)>;
    const auto blocks = static_cast<uint32_t>(ceil_div(p.n, int64_t{Kernel::kBlockValues}));
    ptx::launch<Kernel>("attention_backward_round", blocks, 0, p, stream);
  });
}

void launch_backward_sinks(const SinkParams& p, void* stream) {
  ptx::launch<BackwardSinks>("attention_backward_sinks",
                             static_cast<uint32_t>(p.heads),
                             BackwardSinks::kSharedBytes,
                             p,
                             stream);
}

}  // namespace varstream::attention
