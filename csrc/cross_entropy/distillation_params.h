// Ring 3. What a launch of the distillation over rows of logits is told; plain data.
#pragma once

#include <cstdint>

#include "cross_entropy/residency.h"
#include "cross_entropy/softmax_params.h"

namespace varstream::cross_entropy {

enum class Divergence {
  kForward,  // KL(teacher || student)
  kReverse,  // KL(student || teacher)
  kMixture,  // Jensen-Shannon divergence with weight beta of the teacher
};

struct DistillationParams {
  float* student;        // (rows, row_stride), as SoftmaxParams::values
  const float* teacher;  // (rows, row_stride)
  int64_t row_stride;
  int32_t classes;
  int64_t first_row;
  const int64_t* count;
  LogitMap student_logits, teacher_logits;
  Divergence divergence;
  float beta;           // of kMixture, inside (0, 1)
  const float* dloss;   // (rows,) upstream gradient of a row's loss, null: ones
  float* losses;        // (rows,), 0 for rows that take no part
  bool gradient;        // whether the student's gradient replaces its values
  Residency residency;  // set by the launch
};

}  // namespace varstream::cross_entropy
