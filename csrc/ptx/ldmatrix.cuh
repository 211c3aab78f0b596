// Ring 1. ldmatrix: four 8x8 matrices of 16-bit values from shared memory into mma fragments.
//
// Lane l passes the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned). Register i of
// lane l then holds elements (l / 4, 2 (l % 4)) and the next of matrix i; transposed, elements
// (2 (l % 4), l / 4) and the one below.
#pragma once

#include <cstdint>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/matrix.h"
#endif

namespace varstream::ptx {

template <bool Transposed = false>
VARSTREAM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(VARSTREAM_EMULATED)
  emu::ldmatrix_x4(r, row, Transposed);
#else
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

}  // namespace varstream::ptx
