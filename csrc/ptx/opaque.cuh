// Ring 1. Hiding a value's origin from the compiler.
#pragma once

#include "common/macros.h"
#include "ptx/warp.cuh"

namespace varstream::ptx {

// The same value, as if it had just been read: what is derived from it is worked out again where it
// is used, in place of being held in registers over a whole loop. A shuffle, since the assembler
// looks through empty statements; all lanes of the warp must call.
VARSTREAM_DEVICE int opaque(int value) {
#if defined(VARSTREAM_EMULATED)
  return value;
#else
  asm volatile("shfl.sync.bfly.b32 %0, %0, 0, 0x1f, 0xffffffff;" : "+r"(value));
  return value;
#endif
}

}  // namespace varstream::ptx
