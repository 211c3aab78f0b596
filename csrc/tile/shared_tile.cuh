// Ring 2. A tile of 16-bit values in shared memory, swizzled, and copies into and out of it.
#pragma once

#include <cstdint>
#if defined(VARSTREAM_EMULATED)
#include <stdexcept>
#endif

#include "common/macros.h"
#include "common/vec.cuh"
#include "ptx/cp_async.cuh"
#include "tile/swizzle.cuh"

namespace varstream::tile {

inline constexpr int kChunkElements = 8;  // 16 bytes of 16-bit values

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

  // chunk(row, chunk + delta) where delta is known to the compiler and shares no bit with chunk:
  // one exclusive or away from chunk(row, chunk), as swizzling is one as well.
  VARSTREAM_DEVICE Element* chunk_beside(int row, int chunk, int delta) const {
    constexpr int kSpan = kChunks % 8 == 0 ? 8 : 4, kBytes16 = 16;
    const int bytes = (row * kChunks + swizzled<kChunks>(row, chunk)) * kBytes16;
    const int flipped = bytes ^ (delta % kSpan * kBytes16);
#if defined(VARSTREAM_EMULATED)
    if ((chunk & delta) != 0) throw std::logic_error("chunk_beside: chunk and delta share a bit");
#endif
    return reinterpret_cast<Element*>(reinterpret_cast<uint8_t*>(data) + flipped +
                                      delta / kSpan * kSpan * kBytes16);
  }
};

// Starts copying one row's share of this thread: `from` points at `columns` values (a multiple of
// 8, 16-byte aligned); where !valid the row becomes zero and nothing is read.
template <typename Tile>
VARSTREAM_DEVICE void copy_row_async(const Tile& tile,
                                     int row,
                                     int thread,
                                     int columns,
                                     const typename Tile::Element* from,
                                     bool valid) {
  constexpr int kLanes = kCopyLanes<Tile::kChunks>;
  VARSTREAM_UNROLL
  for (int j = 0; j < Tile::kChunks / kLanes; ++j) {
    const int chunk = thread % kLanes + j * kLanes;
    const bool take = valid && chunk * kChunkElements < columns;
    ptx::cp_async_16(tile.chunk(row, chunk), from + chunk * kChunkElements, take);
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
  constexpr int kStep = Threads / kCopyLanes<Tile::kChunks>;
  static_assert(Threads % kCopyLanes<Tile::kChunks> == 0 && Tile::kRows % kStep == 0);
  int row = thread / kCopyLanes<Tile::kChunks>;
  from += row * stride;
  VARSTREAM_UNROLL
  for (int i = 0; i < Tile::kRows / kStep; ++i) {
    copy_row_async(tile, row, thread, columns, from, row < rows);
    row += kStep;
    from += kStep * stride;
  }
}

// The same, row r from source(r), which is asked for rows 0 to `rows` only.
template <int Threads, typename Tile, typename Source>
VARSTREAM_DEVICE void gather_rows_async(
    const Tile& tile, int thread, int rows, int columns, const Source& source) {
  constexpr int kStep = Threads / kCopyLanes<Tile::kChunks>;
  static_assert(Threads % kCopyLanes<Tile::kChunks> == 0 && Tile::kRows % kStep == 0);
  VARSTREAM_UNROLL
  for (int i = 0; i < Tile::kRows / kStep; ++i) {
    const int row = thread / kCopyLanes<Tile::kChunks> + i * kStep;
    copy_row_async(tile, row, thread, columns, source(row < rows ? row : 0), row < rows);
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
  VARSTREAM_UNROLL
  for (int i = 0; i < Rows / kStep; ++i) {
    const int row = first + lane / kLanes + i * kStep;
    auto* to = target(row);
    VARSTREAM_UNROLL
    for (int j = 0; j < Chunks / kLanes; ++j) {
      const int chunk = lane % kLanes + j * kLanes;
      if (to == nullptr || chunk * kChunkElements >= columns) continue;
      *reinterpret_cast<Vec<16>*>(to + chunk * kChunkElements) =
          *reinterpret_cast<const Vec<16>*>(tile.chunk(row, chunk));
    }
  }
}

}  // namespace varstream::tile
