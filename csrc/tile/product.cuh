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

// The chunk `rows` rows and `part` times Width chunks past the one at (row, chunk). Where Parts is
// a power of two, chunk is a multiple of Width Parts (or 1 past it, Width being 2): no common bits.
template <int Parts, int Width, typename Tile>
VARSTREAM_DEVICE auto* chunk_of_part(const Tile& tile, int row, int chunk, int rows, int part) {
  if constexpr ((Parts & (Parts - 1)) == 0) {
    return tile.past(tile.place(row, chunk), rows, Width * part);
  }
  return tile.past(tile.place(row, chunk + Width * part), rows, 0);
}

// Four 8x8 matrices of an operand: 16 rows (first operand) or columns (second) of d, `part` of
// Parts such from `begin` on, by 16 of the product index. begin is the tile's row (kAlong) or
// column (kAcross), a multiple of 16 Parts. Of the second operand, registers 0 and 1 are the first
// eight columns', 2 and 3 the others'.
template <Read How, int Parts, typename Tile>
VARSTREAM_DEVICE void load_first(
    uint32_t (&regs)[4], const Tile& tile, int begin, int part, int step, int lane) {
  if constexpr (How == Read::kAlong) {
    const auto from = tile.place(begin + lane % 16, lane / 16);
    ptx::ldmatrix_x4(regs, tile.past(from, 16 * part, 2 * step));
  } else {
    const int row = lane / 16 * 8 + lane % 8, chunk = begin / 8 + lane / 8 % 2;
    ptx::ldmatrix_x4<true>(regs, chunk_of_part<Parts, 2>(tile, row, chunk, 16 * step, part));
  }
}

template <Read How, int Parts, typename Tile>
VARSTREAM_DEVICE void load_second(
    uint32_t (&regs)[4], const Tile& tile, int begin, int part, int step, int lane) {
  if constexpr (How == Read::kAlong) {
    const auto from = tile.place(begin + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    ptx::ldmatrix_x4(regs, tile.past(from, 16 * part, 2 * step));
  } else {
    const int row = lane % 16, chunk = begin / 8 + lane / 16;
    ptx::ldmatrix_x4<true>(regs, chunk_of_part<Parts, 2>(tile, row, chunk, 16 * step, part));
  }
}

// Steps in the order in which they are taken: those that lie a constant apart, 8 chunks (4 where
// rows have 12), follow each other, so that fewer addresses are held at once.
template <int Steps>
VARSTREAM_HOST_DEVICE constexpr int step_at(int i) {
  if constexpr (Steps == 6) return i % 3 * 2 + i / 3;
  return Steps % 8 == 0 ? i % 2 * (Steps / 2) + i / 2 : i;
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
  for (int s = 0; s < Steps; ++s) {
    const int step = step_at<Steps>(s);
    uint32_t a_regs[Tiles][4];
    VARSTREAM_UNROLL
    for (int i = 0; i < Tiles; ++i) {
      load_first<ReadA, Tiles>(a_regs[i], a, a_begin, i, step, lane);
    }
    VARSTREAM_UNROLL
    for (int n = 0; n < Columns; n += 2) {
      uint32_t b_regs[4];
      load_second<ReadB, Columns / 2>(b_regs, b, b_begin, n / 2, step, lane);
      const uint32_t even[2] = {b_regs[0], b_regs[1]}, odd[2] = {b_regs[2], b_regs[3]};
      VARSTREAM_UNROLL
      for (int i = 0; i < Tiles; ++i) {
        ptx::mma_m16n8k16<Element>(d[i][n], a_regs[i], even);
        ptx::mma_m16n8k16<Element>(d[i][n + 1], a_regs[i], odd);
      }
    }
  }
}

// Rounds change(value) of a warp's accumulators into a tile, from `row` and `column` on, multiples
// of 16 and of 8 Columns.
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
        auto* at = chunk_of_part<Columns, 1>(tile, row + lane / 4, column / 8, 16 * i + 8 * h, n) +
                   2 * (lane % 4);
        *reinterpret_cast<uint32_t*>(at) =
            pack_pair<typename Tile::Element>(change(d[i][n][2 * h]), change(d[i][n][2 * h + 1]));
      }
    }
  }
}

}  // namespace varstream::tile
