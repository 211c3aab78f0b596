// Ring 0. Integer helpers for sizes and grids, and constants.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace varstream {

template <typename Int>
VARSTREAM_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
  return (value + divisor - 1) / divisor;
}

// Natural logarithms are powers of two inside kernels.
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Division of numbers below 2^31 by a number of at least 1 that is known before a launch: a
// multiply and a shift (Granlund and Montgomery 1994).
struct Divisor {
  uint32_t value;
  uint32_t factor;
  uint32_t shift;

  VARSTREAM_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
};

inline Divisor divisor(uint32_t value) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < value) ++shift;
  const uint64_t factor = (uint64_t{1} << 32) * ((uint64_t{1} << shift) - value) / value + 1;
  return {value, static_cast<uint32_t>(factor), shift};
}

}  // namespace varstream
