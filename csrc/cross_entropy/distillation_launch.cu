// Ring 3. Picks the distillation's instance; the instances are compiled on their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cross_entropy/distillation_launch.h"

namespace varstream::cross_entropy {

void launch_distillation(Dtype gradient, const DistillationParams& p, int64_t rows, void* stream) {
  if (gradient == Dtype::kBfloat16) {
    launch_distillation_instance<__nv_bfloat16>(p, rows, stream);
  } else if (gradient == Dtype::kFloat16) {
    launch_distillation_instance<__half>(p, rows, stream);
  } else {
    launch_distillation_instance<float>(p, rows, stream);
  }
}

}  // namespace varstream::cross_entropy
