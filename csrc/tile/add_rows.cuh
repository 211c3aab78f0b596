// Ring 2. A warp's accumulators added into fp32 rows of global memory that nobody else adds to.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(VARSTREAM_EMULATED)
#include <stdexcept>
#endif

#include "common/macros.h"
#include "common/vec.cuh"
#include "tile/fragment.cuh"

namespace varstream::tile {

// Row r of the warp's goes to target(r), the warp's first column there, or nowhere where that is
// null; `columns` of them exist, a multiple of 8. In words of Values values, aligned to them.
//
// A warp's 16 rows are loaded before any of them is stored: one wait for memory in place of one for
// each word, as loads would not pass a store that may be to the same place.
template <int Values, int Tiles, int Columns, typename Target>
VARSTREAM_DEVICE void add_words(const Accumulator<Tiles, Columns>& d,
                                float scale,
                                int columns,
                                int lane,
                                const Target& target) {
  static_assert(Values == 1 || Values == 2);
  using Word = Vec<4 * Values>;
  const auto word_at = [&](float* row, int n, int e) {
    float* at = row + 8 * n + 2 * (lane % 4) + e;
#if defined(VARSTREAM_EMULATED)
    if (reinterpret_cast<uintptr_t>(at) % sizeof(Word) != 0) {
      throw std::logic_error("add_words: a word that is not aligned to its size");
    }
#endif
    return reinterpret_cast<Word*>(at);
  };
  VARSTREAM_UNROLL
  for (int i = 0; i < Tiles; ++i) {
    float* to[2];
    float sums[2][Columns][2];
    VARSTREAM_UNROLL
    for (int h = 0; h < 2; ++h) {
      to[h] = target(16 * i + 8 * h + lane / 4);
      VARSTREAM_UNROLL
      for (int n = 0; n < Columns; ++n) {
        VARSTREAM_UNROLL
        for (int e = 0; e < 2; e += Values) {
          if (to[h] == nullptr || 8 * n >= columns) continue;
          const Word word = *word_at(to[h], n, e);
          std::memcpy(&sums[h][n][e], &word, sizeof(word));
        }
      }
    }
    VARSTREAM_UNROLL
    for (int h = 0; h < 2; ++h) {
      VARSTREAM_UNROLL
      for (int n = 0; n < Columns; ++n) {
        VARSTREAM_UNROLL
        for (int e = 0; e < 2; e += Values) {
          if (to[h] == nullptr || 8 * n >= columns) continue;
          Word word;
          VARSTREAM_UNROLL
          for (int j = 0; j < Values; ++j) {
            const float sum = sums[h][n][e + j] + scale * d[i][n][2 * h + e + j];
            std::memcpy(&word.word[j], &sum, sizeof(sum));
          }
          *word_at(to[h], n, e) = word;
        }
      }
    }
  }
}

// The same in the widest words; even: every row starts at a multiple of 8 bytes. A sector of 32
// bytes is then asked for once.
template <int Tiles, int Columns, typename Target>
VARSTREAM_DEVICE void add_rows(const Accumulator<Tiles, Columns>& d,
                               float scale,
                               int columns,
                               int lane,
                               bool even,
                               const Target& target) {
  if (even) return add_words<2>(d, scale, columns, lane, target);
  add_words<1>(d, scale, columns, lane, target);
}

}  // namespace varstream::tile
