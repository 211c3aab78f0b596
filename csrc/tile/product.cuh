// Ring 2. Products of two shared tiles into a warp's accumulators, each operand read along or
// across its rows.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "tile/fragment.cuh"
#include "tile/shared_tile.cuh"

namespace varstream::tile {

// How an operand lies: its product index runs along the tile's rows, or down its columns.
enum class Read { kAlong, kAcross };

// Where a warp's part of an operand begins: the row (kAlong) or column (kAcross) of the tile that
// is the block's first row of d (first operand) or first column of d (second).
//
// First operand, 16 rows of d by 16 of the product index.
template <Read How, typename Tile>
VARSTREAM_DEVICE void load_first(
    uint32_t (&regs)[4], const Tile& tile, int begin, int step, int lane) {
  if constexpr (How == Read::kAlong) {
    ptx::ldmatrix_x4(regs, tile.chunk(begin + lane % 16, 2 * step + lane / 16));
  } else {
    ptx::ldmatrix_x4<true>(
        regs, tile.chunk(16 * step + lane / 16 * 8 + lane % 8, begin / 8 + lane / 8 % 2));
  }
}

// Second operand, 16 columns of d by 16 of the product index: registers 0, 1 for the first eight
// columns, 2, 3 for the others.
template <Read How, typename Tile>
VARSTREAM_DEVICE void load_second(
    uint32_t (&regs)[4], const Tile& tile, int begin, int step, int lane) {
  if constexpr (How == Read::kAlong) {
    ptx::ldmatrix_x4(regs, tile.chunk(begin + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  } else {
    ptx::ldmatrix_x4<true>(regs, tile.chunk(16 * step + lane % 16, begin / 8 + lane / 16));
  }
}

// d += a b over 16 Steps of the product index.
// LDSM a step: Tiles + Columns / 2; HMMA: Tiles * Columns.
template <int Steps, Read ReadA, Read ReadB, int Tiles, int Columns, typename TileA, typename TileB>
VARSTREAM_DEVICE void multiply(Accumulator<Tiles, Columns>& d,
                               const TileA& a,
                               int a_begin,
                               const TileB& b,
                               int b_begin,
                               int lane) {
  static_assert(Columns % 2 == 0);
  using Element = typename TileA::Element;
  VARSTREAM_UNROLL
  for (int step = 0; step < Steps; ++step) {
    uint32_t a_regs[Tiles][4];
    VARSTREAM_UNROLL
    for (int i = 0; i < Tiles; ++i) load_first<ReadA>(a_regs[i], a, a_begin + 16 * i, step, lane);
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; n += 2) {
      uint32_t b_regs[4];
      load_second<ReadB>(b_regs, b, b_begin + 8 * n, step, lane);
      const uint32_t even[2] = {b_regs[0], b_regs[1]}, odd[2] = {b_regs[2], b_regs[3]};
      VARSTREAM_UNROLL
      for (int i = 0; i < Tiles; ++i) {
        ptx::mma_m16n8k16<Element>(d[i][n], a_regs[i], even);
        ptx::mma_m16n8k16<Element>(d[i][n + 1], a_regs[i], odd);
      }
    }
  }
}

// Rounds change(value) of a warp's accumulators into a tile, from `row` and `column` on.
template <int Tiles, int Columns, typename Tile, typename Change>
VARSTREAM_DEVICE void store_changed(const Accumulator<Tiles, Columns>& d,
                                    const Tile& tile,
                                    int row,
                                    int column,
                                    int lane,
                                    const Change& change) {
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; ++n) {
      VARSTREAM_UNROLL
      for (int h = 0; h < 2; ++h) {
        auto* at = tile.chunk(row + 16 * i + 8 * h + lane / 4, column / 8 + n) + 2 * (lane % 4);
        *reinterpret_cast<uint32_t*>(at) =
            pack_pair<typename Tile::Element>(change(d[i][n][2 * h]), change(d[i][n][2 * h + 1]));
      }
    }
  }
}

}  // namespace varstream::tile
