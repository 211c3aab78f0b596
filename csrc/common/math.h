// Ring 0. Integer helpers for sizes and grids.
#pragma once

#include "common/macros.h"

namespace varstream {

template <typename Int>
VARSTREAM_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace varstream
