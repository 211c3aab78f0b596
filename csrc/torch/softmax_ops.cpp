// Ring 4. softmax_rows_ on CUDA: tensors become launch parameters.
//
// Built with VARSTREAM_EMULATED it defines varstream_emulated::softmax_rows_ instead, the same
// kernels over CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "cross_entropy/softmax_launch.h"
#include "torch/checks.h"
#include "torch/on_device.h"
#include "torch/softmax_schema.h"

namespace varstream {
namespace {

using cross_entropy::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kWordBytes = 16;
constexpr int64_t kMostClasses = int64_t{1} << 30;

Dtype dtype_of(ScalarType type, const char* name) {
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::BFloat16) return Dtype::kBfloat16;
  VARSTREAM_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return Dtype::kFloat16;
}

void check_logits(const Tensor& logits, int64_t classes) {
  VARSTREAM_CHECK(logits.dim() == 2,
                  "logits must have 2 dimensions (rows, padded classes), got shape ",
                  shape_text(logits));
  VARSTREAM_CHECK(1 <= classes && classes <= logits.size(1) && classes <= kMostClasses,
                  "classes must be in [1, ",
                  logits.size(1),
                  "], the columns of logits, and at most 2^30, got ",
                  classes);
  if (logits.size(0) == 0) return;
  const int64_t bytes = logits.element_size();
  VARSTREAM_CHECK(logits.stride(1) == 1 && logits.size(1) * bytes % kWordBytes == 0 &&
                      (logits.size(0) == 1 || (logits.stride(0) * bytes % kWordBytes == 0 &&
                                               logits.stride(0) >= logits.size(1))) &&
                      reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % kWordBytes == 0,
                  "logits must have contiguous rows of a multiple of 16 bytes that start at "
                  "multiples of 16 bytes, got shape ",
                  shape_text(logits));
}

// The data of an optional contiguous vector or matrix, null if absent.
template <typename T>
T* data_of(const MaybeTensor& t,
           const char* name,
           const Tensor& logits,
           ScalarType type,
           std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  bool fits = t->dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) fits = fits && t->size(axis++) == size;
  VARSTREAM_CHECK(fits, name, " has the wrong shape, got ", shape_text(*t));
  VARSTREAM_CHECK(
      t->scalar_type() == type && t->is_contiguous(),
      name,
      type == ScalarType::Long ? " must be contiguous int64" : " must be contiguous float32");
  check_same_device(*t, name, logits, "logits");
  return static_cast<T*>(const_cast<void*>(t->const_data_ptr()));
}

void softmax_rows_(Tensor logits,
                   int64_t classes,
                   int64_t first_row,
                   MaybeTensor count,
                   Tensor target,
                   double logit_scale,
                   double softcap,
                   double temperature,
                   MaybeTensor bias,
                   MaybeTensor class_weight,
                   MaybeTensor dnll,
                   MaybeTensor dsmooth,
                   MaybeTensor dlse,
                   MaybeTensor dentropy,
                   MaybeTensor lse_sq_scale,
                   std::optional<ScalarType> gradient,
                   MaybeTensor logp,
                   MaybeTensor lse,
                   MaybeTensor entropy,
                   MaybeTensor class_sum,
                   MaybeTensor log_sum_sq,
                   MaybeTensor argmax) {
  check_logits(logits, classes);
  VARSTREAM_CHECK(target.dim() == 2 && target.size(0) == logits.size(0),
                  "target must have shape (rows, targets), got ",
                  shape_text(target));
  const Dtype values = dtype_of(logits.scalar_type(), "logits");
  const Dtype result = gradient ? dtype_of(*gradient, "gradient") : values;
  VARSTREAM_CHECK(values == Dtype::kFloat32 || result == values,
                  "gradient must have the dtype of logits, or any where logits are float32");
  const int64_t rows = logits.size(0), targets = target.size(1);
  VARSTREAM_CHECK(targets <= 1024, "target must have at most 1024 columns, got ", targets);
  constexpr auto kFloat = ScalarType::Float;
  const auto vector = [&](const MaybeTensor& t, const char* name, int64_t size) {
    return data_of<float>(t, name, logits, kFloat, {size});
  };
  cross_entropy::SoftmaxParams p{};
  p.values = logits.mutable_data_ptr();
  p.row_stride = rows == 1 ? logits.size(1) : logits.stride(0);
  p.classes = static_cast<int32_t>(classes);
  p.targets = static_cast<int32_t>(targets);
  p.first_row = first_row;
  p.count = data_of<int64_t>(count, "count", logits, ScalarType::Long, {});
  p.target = data_of<int64_t>(target, "target", logits, ScalarType::Long, {rows, targets});
  p.class_weight = vector(class_weight, "class_weight", classes);
  const bool capped = softcap > 0;
  p.logits = {vector(bias, "bias", classes),
              static_cast<float>(logit_scale / (capped ? softcap : temperature)),
              capped ? static_cast<float>(softcap / temperature) : 0.0f,
              static_cast<float>(logit_scale / temperature)};
  p.upstream = {data_of<float>(dnll, "dnll", logits, kFloat, {rows, targets}),
                vector(dsmooth, "dsmooth", rows),
                vector(dlse, "dlse", rows),
                vector(dentropy, "dentropy", rows),
                data_of<float>(lse_sq_scale, "lse_sq_scale", logits, kFloat, {})};
  p.results = {data_of<float>(logp, "logp", logits, kFloat, {rows, targets}),
               vector(lse, "lse", rows),
               vector(entropy, "entropy", rows),
               vector(class_sum, "class_sum", rows),
               vector(log_sum_sq, "log_sum_sq", rows),
               data_of<int64_t>(argmax, "argmax", logits, ScalarType::Long, {rows})};
  p.gradient = gradient.has_value();
  if (rows == 0) return;
  on_device(logits,
            [&](void* stream) { cross_entropy::launch_softmax(values, result, p, rows, stream); });
}

}  // namespace
}  // namespace varstream

#if defined(VARSTREAM_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(varstream_emulated, m) {
  m.def(VARSTREAM_SOFTMAX_ROWS);
}
STABLE_TORCH_LIBRARY_IMPL(varstream_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(varstream, CUDA, m) {
#endif
  m.impl("softmax_rows_", TORCH_BOX(&varstream::softmax_rows_));
}
