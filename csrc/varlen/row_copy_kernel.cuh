// Ring 2. Copies whole rows by index: pack (gather) and unpack (scatter), any dtype.
//
// A block covers block_shape().y rows with block_shape().x lanes each and strides over the rest.
// Every output row is overwritten once (gather) or at most once (scatter, indices distinct). Out of
// range indices read and write nothing of the padded side, whatever they hold. Offsets are 64-bit.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/thread.h"
#include "common/vec.cuh"
#include "varlen/row_copy_params.h"

namespace varstream::varlen {

// Copies one row of row_vecs words, or writes zeros when src is null.
template <typename Word>
VARSTREAM_DEVICE void copy_row(Word* dst, const Word* src, int64_t row_vecs) {
  const int lanes = static_cast<int>(block_shape().x);
  const int64_t step = int64_t{lanes} * kRowCopyUnroll;
  for (int64_t first = thread_index().x; first < row_vecs; first += step) {
    Word words[kRowCopyUnroll] = {};
    VARSTREAM_UNROLL
    for (int u = 0; u < kRowCopyUnroll; ++u) {
      const int64_t at = first + int64_t{u} * lanes;
      if (src != nullptr && at < row_vecs) words[u] = src[at];
    }
    VARSTREAM_UNROLL
    for (int u = 0; u < kRowCopyUnroll; ++u) {
      const int64_t at = first + int64_t{u} * lanes;
      if (at < row_vecs) dst[at] = words[u];
    }
  }
}

template <RowCopy Kind, int VecBytes>
VARSTREAM_DEVICE void row_copy(const RowCopyParams& p) {
  using Word = Vec<VecBytes>;
  const auto* src = static_cast<const Word*>(p.src);
  auto* dst = static_cast<Word*>(p.dst);
  const int64_t stride = int64_t{grid_shape().x} * block_shape().y;
  int64_t i = int64_t{block_index().x} * block_shape().y + thread_index().y;
  for (; i < p.n; i += stride) {
    const int64_t row = p.indices[i];
    const bool inside = row >= 0 && row < p.rows;
    if constexpr (Kind == RowCopy::kGather) {
      copy_row(dst + i * p.row_vecs, inside ? src + row * p.row_vecs : nullptr, p.row_vecs);
    } else if (inside) {
      copy_row(dst + row * p.row_vecs, src + i * p.row_vecs, p.row_vecs);
    }
  }
}

}  // namespace varstream::varlen
