// Ring 2. Where a tile's 16-byte chunks lie in shared memory so that no access meets a bank
// conflict: 128 bytes of shared memory, 8 chunks, move at a time.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace varstream::tile {

// The place within its row of a chunk, for rows of Chunks chunks: 8 rows that are read at the same
// chunk (ldmatrix) fall on 8 different places modulo 8.
template <int Chunks>
VARSTREAM_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
  static_assert(Chunks % 4 == 0, "rows of whole 64 bytes");
  return Chunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

// Threads that copy one row side by side, each a chunk, before the next row's.
template <int Chunks>
inline constexpr int kCopyLanes = Chunks % 8 == 0 ? 8 : 4;

// --- proofs, evaluated by the compiler ----------------------------------------------------------

template <int Chunks>
constexpr int bank_group(int row, int chunk) {
  return (row * Chunks + swizzled<Chunks>(row, chunk)) % 8;
}

// ldmatrix, and the stores of mma fragments: 8 neighbouring rows, one chunk.
template <int Chunks>
constexpr bool columns_without_conflict() {
  for (int first = 0; first < 32; first += 8) {
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      int groups = 0;
      for (int row = first; row < first + 8; ++row) groups |= 1 << bank_group<Chunks>(row, chunk);
      if (groups != 0xFF) return false;
    }
  }
  return true;
}

// Copies: 8 neighbouring threads, kCopyLanes of them to a row.
template <int Chunks>
constexpr bool copies_without_conflict() {
  constexpr int kLanes = kCopyLanes<Chunks>;
  for (int first = 0; first < 8 * kLanes; first += 8) {
    for (int base = 0; base < Chunks; base += kLanes) {
      int groups = 0;
      for (int t = first; t < first + 8; ++t) {
        groups |= 1 << bank_group<Chunks>(t / kLanes, base + t % kLanes);
      }
      if (groups != 0xFF) return false;
    }
  }
  return true;
}

// The permutation stays within the row.
template <int Chunks>
constexpr bool permutes_rows() {
  for (int row = 0; row < 8; ++row) {
    uint64_t places = 0;
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      const int place = swizzled<Chunks>(row, chunk);
      if (place < 0 || place >= Chunks) return false;
      places |= uint64_t{1} << place;
    }
    if (places != (uint64_t{1} << Chunks) - 1) return false;
  }
  return true;
}

}  // namespace varstream::tile
