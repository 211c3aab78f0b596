// Ring 3. Picks the instance of attention forward; the instances are compiled on their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/forward_launch.h"
#include "attention/forward_traits.h"

namespace varstream::attention {
namespace {

template <typename Element, typename Dims>
void launch(Dims, const ForwardParams& p, void* stream) {
  constexpr int kDim = Dims::kDim, kValueDim = Dims::kValueDim;
  if (modified(p)) {
    launch_forward_instance<ForwardTraits<Element, kDim, kValueDim, true>>(p, stream);
  } else {
    launch_forward_instance<ForwardTraits<Element, kDim, kValueDim, false>>(p, stream);
  }
}

}  // namespace

ForwardShape forward_shape(int dim, int value_dim, bool modified) {
  return with_head_dims(dim, value_dim, [&](auto dims) -> ForwardShape {
    using Dims = decltype(dims);
    using Plain = ForwardTile<Dims::kDim, Dims::kValueDim, false>;
    using Modified = ForwardTile<Dims::kDim, Dims::kValueDim, true>;
    if (modified) return {Modified::kRows, Modified::kKeys};
    return {Plain::kRows, Plain::kKeys};
  });
}

void launch_forward(Dtype dtype, const ForwardParams& p, void* stream) {
  with_head_dims(p.dim, p.value_dim, [&](auto dims) {
    if (dtype == Dtype::kBfloat16) {
      launch<__nv_bfloat16>(dims, p, stream);
    } else {
      launch<__half>(dims, p, stream);
    }
  });
}

}  // namespace varstream::attention
