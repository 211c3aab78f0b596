// Ring 4. The head's row kernels on CUDA: tensors become launch parameters.
//
// Built with VARSTREAM_EMULATED it defines operators of varstream_emulated instead, the same
// kernels over CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "cross_entropy/distillation_launch.h"
#include "cross_entropy/softmax_launch.h"
#include "torch/checks.h"
#include "torch/head_rows_schema.h"
#include "torch/on_device.h"

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

cross_entropy::LogitMap logit_map(const float* bias,
                                  double logit_scale,
                                  double softcap,
                                  double temperature) {
  const bool capped = softcap > 0;
  return {bias,
          static_cast<float>(logit_scale / (capped ? softcap : temperature)),
          capped ? static_cast<float>(softcap / temperature) : 0.0f,
          static_cast<float>(logit_scale / temperature)};
}

void check_logits(const Tensor& logits, const char* name, int64_t classes) {
  VARSTREAM_CHECK(logits.dim() == 2,
                  name,
                  " must have 2 dimensions (rows, padded classes), got shape ",
                  shape_text(logits));
  VARSTREAM_CHECK(1 <= classes && classes <= logits.size(1) && classes <= kMostClasses,
                  "classes must be in [1, ",
                  logits.size(1),
                  "], the columns of ",
                  name,
                  ", and at most 2^30, got ",
                  classes);
  if (logits.size(0) == 0) return;
  const int64_t bytes = logits.element_size();
  VARSTREAM_CHECK(logits.stride(1) == 1 && logits.size(1) * bytes % kWordBytes == 0 &&
                      (logits.size(0) == 1 || (logits.stride(0) * bytes % kWordBytes == 0 &&
                                               logits.stride(0) >= logits.size(1))) &&
                      reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % kWordBytes == 0,
                  name,
                  " must have contiguous rows of a multiple of 16 bytes that start at "
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
                   MaybeTensor argmax,
                   MaybeTensor shard_sums,
                   MaybeTensor shard_target_z,
                   MaybeTensor shard_given) {
  check_logits(logits, "logits", classes);
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
  p.logits = logit_map(vector(bias, "bias", classes), logit_scale, softcap, temperature);
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
  using cross_entropy::kRowGiven, cross_entropy::kRowSums;
  p.shard = {data_of<float>(shard_sums, "shard_sums", logits, kFloat, {rows, kRowSums}),
             data_of<float>(shard_target_z, "shard_target_z", logits, kFloat, {rows, targets}),
             data_of<float>(shard_given, "shard_given", logits, kFloat, {rows, kRowGiven})};
  VARSTREAM_CHECK((p.shard.sums == nullptr) == (p.shard.target_z == nullptr),
                  "shard_sums and shard_target_z must be given together");
  VARSTREAM_CHECK(p.shard.given == nullptr || (p.shard.sums == nullptr && !logp && !lse &&
                                               !entropy && !class_sum && !log_sum_sq && !argmax),
                  "shard_given excludes every result: nothing but the gradient is formed");
  p.gradient = gradient.has_value();
  if (rows == 0) return;
  on_device(logits,
            [&](void* stream) { cross_entropy::launch_softmax(values, result, p, rows, stream); });
}

void distillation_rows_(Tensor student,
                        Tensor teacher,
                        int64_t classes,
                        int64_t first_row,
                        MaybeTensor count,
                        double beta,
                        double temperature,
                        double logit_scale,
                        double softcap,
                        double teacher_logit_scale,
                        double teacher_softcap,
                        MaybeTensor bias,
                        MaybeTensor teacher_bias,
                        MaybeTensor dloss,
                        std::optional<ScalarType> gradient,
                        Tensor losses) {
  check_logits(student, "student", classes);
  check_logits(teacher, "teacher", classes);
  const int64_t rows = student.size(0);
  VARSTREAM_CHECK(student.scalar_type() == ScalarType::Float &&
                      teacher.scalar_type() == ScalarType::Float && teacher.size(0) == rows &&
                      teacher.size(1) == student.size(1) &&
                      (rows < 2 || teacher.stride(0) == student.stride(0)),
                  "student and teacher must be float32 with the same shape and strides, got ",
                  shape_text(student),
                  " and ",
                  shape_text(teacher));
  check_same_device(teacher, "teacher", student, "student");
  VARSTREAM_CHECK(0 <= beta && beta <= 1, "beta must be in [0, 1], got ", beta);
  constexpr auto kFloat = ScalarType::Float;
  const auto vector = [&](const MaybeTensor& t, const char* name, int64_t size) {
    return data_of<float>(t, name, student, kFloat, {size});
  };
  cross_entropy::DistillationParams p{};
  p.student = student.mutable_data_ptr<float>();
  p.teacher = teacher.const_data_ptr<float>();
  p.row_stride = rows == 1 ? student.size(1) : student.stride(0);
  p.classes = static_cast<int32_t>(classes);
  p.first_row = first_row;
  p.count = data_of<int64_t>(count, "count", student, ScalarType::Long, {});
  p.student_logits = logit_map(vector(bias, "bias", classes), logit_scale, softcap, temperature);
  p.teacher_logits = logit_map(vector(teacher_bias, "teacher_bias", classes),
                               teacher_logit_scale,
                               teacher_softcap,
                               temperature);
  using cross_entropy::Divergence;
  p.divergence = beta == 0   ? Divergence::kForward
                 : beta == 1 ? Divergence::kReverse
                             : Divergence::kMixture;
  constexpr float kLeast = std::numeric_limits<float>::min();  // rounding must not leave (0, 1)
  p.beta = std::clamp(static_cast<float>(beta), kLeast, std::nextafter(1.0f, 0.0f));
  p.dloss = vector(dloss, "dloss", rows);
  p.losses = vector(losses, "losses", rows);
  p.gradient = gradient.has_value();
  const Dtype result = gradient ? dtype_of(*gradient, "gradient") : Dtype::kFloat32;
  if (rows == 0) return;
  on_device(student,
            [&](void* stream) { cross_entropy::launch_distillation(result, p, rows, stream); });
}

}  // namespace
}  // namespace varstream

#if defined(VARSTREAM_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(varstream_emulated, m) {
  m.def(VARSTREAM_SOFTMAX_ROWS);
  m.def(VARSTREAM_DISTILLATION_ROWS);
}
STABLE_TORCH_LIBRARY_IMPL(varstream_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(varstream, CUDA, m) {
#endif
  m.impl("softmax_rows_", TORCH_BOX(&varstream::softmax_rows_));
  m.impl("distillation_rows_", TORCH_BOX(&varstream::distillation_rows_));
}
