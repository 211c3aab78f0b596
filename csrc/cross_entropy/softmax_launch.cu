// Ring 3. Picks the softmax's instance; the instances are compiled on their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cross_entropy/softmax_launch.h"

namespace varstream::cross_entropy {

void launch_softmax(
    Dtype values, Dtype gradient, const SoftmaxParams& p, int64_t rows, void* stream) {
  if (values == Dtype::kBfloat16) {
    launch_softmax_instance<__nv_bfloat16, __nv_bfloat16>(p, rows, stream);
  } else if (values == Dtype::kFloat16) {
    launch_softmax_instance<__half, __half>(p, rows, stream);
  } else if (gradient == Dtype::kBfloat16) {
    launch_softmax_instance<float, __nv_bfloat16>(p, rows, stream);
  } else if (gradient == Dtype::kFloat16) {
    launch_softmax_instance<float, __half>(p, rows, stream);
  } else {
    launch_softmax_instance<float, float>(p, rows, stream);
  }
}

}  // namespace varstream::cross_entropy
