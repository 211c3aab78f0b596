// Host emulation. ldmatrix and mma.sync; lanes and registers as in csrc/ptx.
#pragma once

#include <cstdint>

namespace varstream::emu {

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);

}  // namespace varstream::emu
