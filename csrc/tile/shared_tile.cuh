// Ring 2. A tile of 16-bit values in shared memory, swizzled, and copies into and out of it.
#pragma once

#include <cstdint>
#if defined(VARSTREAM_EMULATED)
#include <stdexcept>
#endif

#include "common/macros.h"
#include "common/vec.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/opaque.cuh"
#include "tile/swizzle.cuh"

namespace varstream::tile {

inline constexpr int kChunkElements = 8;  // 16-bit values
inline constexpr int kChunkBytes = 16;

// Rows x Columns, each row in chunks of 8 values.
template <typename Element_, int Rows, int Columns>
struct SharedTile {
  using Element = Element_;
  static constexpr int kRows = Rows;
  static constexpr int kChunks = Columns / kChunkElements;
  static constexpr size_t kBytes = size_t{Rows} * Columns * sizeof(Element);
  static_assert(sizeof(Element) == 2 && Columns % kChunkElements == 0);
  static_assert(columns_without_conflict<kChunks>() && copies_without_conflict<kChunks>());
  static_assert(permutes_rows<kChunks>());

  Element* data;

  VARSTREAM_DEVICE Element* chunk(int row, int chunk) const {
    return data + (row * kChunks + swizzled<kChunks>(row, chunk)) * kChunkElements;
  }

  // Where a lane's accesses to the tile start. Those that follow lie at constants from there.
  struct Place {
    int bytes;  // into the tile
#if defined(VARSTREAM_EMULATED)
    int row, chunk;
#endif
  };

  VARSTREAM_DEVICE static Place place(int row, int chunk) {
    const int bytes = (row * kChunks + swizzled<kChunks>(row, chunk)) * kChunkBytes;
#if defined(VARSTREAM_EMULATED)
    return {bytes, row, chunk};
#else
    return {bytes};
#endif
  }

  // The chunk `rows` rows and `delta` chunks past a place, both known to the compiler: rows a
  // multiple of 8, so that swizzling does not see them, delta of no bit that the place's chunk has.
  // What is not a constant is one exclusive or, the same for all rows.
  VARSTREAM_DEVICE Element* past(const Place& from, int rows, int delta) const {
    constexpr int kSpan = kChunks % 8 == 0 ? 8 : 4;
    const int bytes = from.bytes ^ (delta % kSpan * kChunkBytes);
    auto* at = reinterpret_cast<Element*>(reinterpret_cast<uint8_t*>(data) + bytes +
                                          (rows * kChunks + delta / kSpan * kSpan) * kChunkBytes);
#if defined(VARSTREAM_EMULATED)
    if (at != chunk(from.row + rows, from.chunk + delta)) {
      throw std::logic_error("past: rows or chunks that are not at a constant");
    }
#endif
    return at;
  }
};

// Starts copying this thread's share of the row that is `rows` past `to`, its first chunk in the
// tile, a multiple of 8: `from` points at `columns` values (a multiple of 8, 16-byte aligned);
// where !valid the row becomes zero and nothing is read.
template <typename Tile>
VARSTREAM_DEVICE void copy_row_async(const Tile& tile,
                                     const typename Tile::Place& to,
                                     int rows,
                                     int thread,
                                     int columns,
                                     const typename Tile::Element* from,
                                     bool valid) {
  constexpr int kLanes = kCopyLanes<Tile::kChunks>;
  const int first = thread % kLanes * kChunkElements;
  from = ptx::settled(from + first);
  VARSTREAM_UNROLL
  for (int j = 0; j < Tile::kChunks; j += kLanes) {
    const bool take = valid && first + j * kChunkElements < columns;
    ptx::cp_async_16(tile.past(to, rows, j), from + j * kChunkElements, take);
  }
}

// Starts copying a tile: row r comes from from + r * stride, rows from `rows` on become zero: a NaN
// there would spread through products even where its weight is zero.
template <int Threads, typename Tile>
VARSTREAM_DEVICE void copy_rows_async(const Tile& tile,
                                      int thread,
                                      const typename Tile::Element* from,
                                      int64_t stride,
                                      int rows,
                                      int columns) {
  constexpr int kLanes = kCopyLanes<Tile::kChunks>, kStep = Threads / kLanes;
  static_assert(kStep % 8 == 0 && Tile::kRows % kStep == 0);
  const int row = thread / kLanes;
  const auto to = tile.place(row, thread % kLanes);
  from += row * stride;
  VARSTREAM_UNROLL
  for (int i = 0; i < Tile::kRows; i += kStep) {
    copy_row_async(tile, to, i, thread, columns, from, row + i < rows);
    from += kStep * stride;
  }
}

// The same, row r from source(r), which is asked for rows 0 to `rows` only.
template <int Threads, typename Tile, typename Source>
VARSTREAM_DEVICE void gather_rows_async(
    const Tile& tile, int thread, int rows, int columns, const Source& source) {
  constexpr int kLanes = kCopyLanes<Tile::kChunks>, kStep = Threads / kLanes;
  static_assert(kStep % 8 == 0 && Tile::kRows % kStep == 0);
  const auto to = tile.place(thread / kLanes, thread % kLanes);
  VARSTREAM_UNROLL
  for (int i = 0; i < Tile::kRows; i += kStep) {
    const int row = thread / kLanes + i;
    copy_row_async(tile, to, i, thread, columns, source(row < rows ? row : 0), row < rows);
  }
}

// Writes rows first to first + Rows of the tile, 16 bytes at a time, by one warp: row r goes to
// target(r), room for `columns` values, or nowhere where that is null.
template <int Rows, int Chunks, typename Tile, typename Target>
VARSTREAM_DEVICE void store_rows(
    const Tile& tile, int first, int lane, int columns, const Target& target) {
  constexpr int kLanes = kCopyLanes<Chunks>;
  constexpr int kStep = 32 / kLanes;
  static_assert(Rows % kStep == 0);
  const int own = lane % kLanes * kChunkElements;
  VARSTREAM_UNROLL
  for (int i = 0; i < Rows; i += kStep) {
    const int row = first + lane / kLanes + i;
    auto* to = target(row);
    VARSTREAM_UNROLL
    for (int j = 0; j < Chunks; j += kLanes) {
      if (to == nullptr || own + j * kChunkElements >= columns) continue;
      *reinterpret_cast<Vec<16>*>(to + own + j * kChunkElements) =
          *reinterpret_cast<const Vec<16>*>(tile.chunk(row, lane % kLanes + j));
    }
  }
}

}  // namespace varstream::tile
