// Ring 2. 16-bit values in 32-bit words to fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/macros.h"

namespace varstream::tile {

struct FloatPair {
  float low, high;
};

template <typename Element>
VARSTREAM_DEVICE FloatPair unpack_pair(uint32_t word) {
  const auto low = static_cast<uint16_t>(word), high = static_cast<uint16_t>(word >> 16);
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return {__bfloat162float(__nv_bfloat16_raw{low}), __bfloat162float(__nv_bfloat16_raw{high})};
  } else {
    return {__half2float(__half_raw{low}), __half2float(__half_raw{high})};
  }
}

}  // namespace varstream::tile
