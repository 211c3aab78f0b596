// Ring 1. Approximate functions of the special function unit, and fp32 additions to memory.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace varstream::ptx {

// 2^x, relative error 2^-22; subnormal results are 0, 2^-inf is 0.
VARSTREAM_DEVICE float exp2_approx(float x) {
#if defined(VARSTREAM_EMULATED)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, relative error 2^-23; 0 for infinite and infinite for subnormal x.
VARSTREAM_DEVICE float reciprocal_approx(float x) {
#if defined(VARSTREAM_EMULATED)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2 x, absolute error 2^-22 near 1.
VARSTREAM_DEVICE float log2_approx(float x) {
#if defined(VARSTREAM_EMULATED)
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// a * b, rounded even where an addition follows: never fused with it.
VARSTREAM_DEVICE float rounded_product(float a, float b) {
#if defined(VARSTREAM_EMULATED)
  float y = a * b;
  asm("" : "+m"(y));  // hides the product from what comes next
  return y;
#else
  return __fmul_rn(a, b);
#endif
}

// *at += value, atomically, in global memory; no result.
VARSTREAM_DEVICE void add_atomic(float* at, float value) {
#if defined(VARSTREAM_EMULATED)
  *at += value;  // emulated threads never run at the same time
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(value) : "memory");
#endif
}

// Whether the architecture adds four neighbours in one instruction; emulated, both ways are tested:
// the caller says which.
template <bool WhenEmulated>
VARSTREAM_HOST_DEVICE constexpr bool adds_four_at_once() {
#if defined(VARSTREAM_EMULATED)
  return WhenEmulated;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// Four neighbours at once, 16-byte aligned: one instruction on sm_90, four before.
VARSTREAM_DEVICE void add_atomic_4(float* at, float a, float b, float c, float d) {
#if !defined(VARSTREAM_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
#else
  add_atomic(at, a);
  add_atomic(at + 1, b);
  add_atomic(at + 2, c);
  add_atomic(at + 3, d);
#endif
}

}  // namespace varstream::ptx
