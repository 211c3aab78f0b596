// Ring 1. mma.sync m16n8k16: d (16, 8) fp32 += a (16, 16) b (16, 8), a row major, b column major.
//
// With g = lane / 4 and t = lane % 4, two 16-bit values to a register, lower column (row for b)
// low:
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)
//   b[0] (2t, g)  b[1] (2t + 8, g)
//   d[0], d[1] (g, 2t), (g, 2t + 1)  d[2], d[3] the same of row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/matrix.h"
#endif

namespace varstream::ptx {

template <typename Element>
VARSTREAM_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, __nv_bfloat16> || std::is_same_v<Element, __half>);
#if defined(VARSTREAM_EMULATED)
  emu::mma_m16n8k16(d, a, b, std::is_same_v<Element, __nv_bfloat16>);
#else
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace varstream::ptx
