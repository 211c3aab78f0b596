// Ring 2. Products of tiles on tensor cores: fragments of mma.m16n8k16 and how tiles feed them.
//
// A warp holds a (16 Tiles, 8 Columns) block of fp32 accumulators as Accumulator<Tiles, Columns>.
// With g = lane / 4 and t = lane % 4, value [i][n][2 h + e] of a lane is row 16 i + 8 h + g, column
// 8 n + 2 t + e.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace varstream::tile {

template <int Tiles, int Columns>
using Accumulator = float[Tiles][Columns][4];

template <int Tiles, int Columns>
VARSTREAM_DEVICE void clear(Accumulator<Tiles, Columns>& d) {
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; ++n) {
      VARSTREAM_UNROLL
      for (int e = 0; e < 4; ++e) d[i][n][e] = 0.0f;
    }
  }
}

// Two fp32 values rounded to one register of 16-bit values, the first one low.
template <typename Element>
VARSTREAM_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    std::memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    std::memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

// The first operand of a product in registers: a (16 Tiles, 16 Steps) block of 16-bit values.
template <int Tiles, int Steps>
using Operand = uint32_t[Tiles][Steps][4];

// Accumulators, rounded, as an operand: two columns of 8 make a step of 16.
template <typename Element, int Tiles, int Steps>
VARSTREAM_DEVICE void round_to_operand(const Accumulator<Tiles, 2 * Steps>& d,
                                       Operand<Tiles, Steps>& a) {
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int step = 0; step < Steps; ++step) {
      VARSTREAM_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float* pair = &d[i][2 * step + r / 2][2 * (r % 2)];
        a[i][step][r] = pack_pair<Element>(pair[0], pair[1]);
      }
    }
  }
}

// d += a b: a's columns are b's rows; b is read across its rows.
// LDSM a 16-row step: Columns / 2; HMMA: Tiles * Columns.
template <int Tiles, int Steps, int Columns, typename TileB>
VARSTREAM_DEVICE void multiply_operand_by_columns(Accumulator<Tiles, Columns>& d,
                                                  const Operand<Tiles, Steps>& a,
                                                  const TileB& b,
                                                  int lane) {
  static_assert(TileB::kRows == 16 * Steps && Columns % 2 == 0);
  using Element = typename TileB::Element;
  VARSTREAM_UNROLL
  for (int step = 0; step < Steps; ++step) {
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; n += 2) {
      uint32_t b_regs[4];
      ptx::ldmatrix_x4<true>(b_regs, b.past(b.place(lane % 16, lane / 16), 16 * step, n));
      const uint32_t even[2] = {b_regs[0], b_regs[1]}, odd[2] = {b_regs[2], b_regs[3]};
      VARSTREAM_UNROLL
      for (int i = 0; i < Tiles; ++i) {
        ptx::mma_m16n8k16<Element>(d[i][n], a[i][step], even);
        ptx::mma_m16n8k16<Element>(d[i][n + 1], a[i][step], odd);
      }
    }
  }
}

}  // namespace varstream::tile
