// Ring 1. Hiding a value's origin from the compiler.
#pragma once

#include "common/macros.h"
#include "ptx/warp.cuh"

namespace varstream::ptx {

// The same value, as if it had just been read: what is derived from it is worked out again where it
// is used, in place of being held in registers over a whole loop. A shuffle, since the assembler
// looks through empty statements; all lanes of the warp must call. Never negative: divisions of it
// by powers of two are shifts.
VARSTREAM_DEVICE int opaque(int value) {
#if defined(VARSTREAM_EMULATED)
  return value;
#else
  asm volatile("shfl.sync.bfly.b32 %0, %0, 0, 0x1f, 0xffffffff;" : "+r"(value));
  __builtin_assume(value >= 0);
  return value;
#endif
}

// The same pointer, out of which the compiler moves no addition: constants that follow are those of
// the instruction that uses it. Costs nothing, as the assembler looks through it.
template <typename T>
VARSTREAM_DEVICE T* settled(T* pointer) {
#if !defined(VARSTREAM_EMULATED)
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

}  // namespace varstream::ptx
