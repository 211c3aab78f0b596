// Ring 2. Problem and launch shape of the row copy kernel behind pack and unpack; plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "common/vec.cuh"

namespace varstream::varlen {

enum class RowCopy {
  kGather,   // packed[i] = padded[indices[i]], zero where the index is out of [0, rows)
  kScatter,  // padded[indices[i]] = packed[i], nothing where the index is out of [0, rows)
};

struct RowCopyParams {
  const void* src;         // gather: (rows, row_bytes), scatter: (n, row_bytes); contiguous
  void* dst;               // gather: (n, row_bytes), scatter: (rows, row_bytes); contiguous
  const int64_t* indices;  // (n,) padded row of each packed row; any value is safe
  int64_t n;               // packed rows
  int64_t rows;            // padded rows
  int64_t row_vecs;        // words of vec_bytes in one row
};

// Threads of a block: lanes along a row times rows side by side.
struct RowCopyShape {
  int lanes;       // power of two, 1 to 128
  int block_rows;  // kThreads / lanes
  int64_t blocks;  // grid size in x; the kernel strides when there are more rows
};

inline constexpr int kRowCopyThreads = 256;
inline constexpr int kRowCopyUnroll = 4;  // words a thread loads before it stores the first

// Narrow rows (token ids, labels) share a block, wide ones (hidden states) get up to 128 lanes.
// Lanes are kept to a quarter of the row so that each thread has kRowCopyUnroll loads in flight.
inline RowCopyShape row_copy_shape(int64_t n, int64_t row_vecs) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 20;
  int lanes = 1;
  while (lanes < 128 && int64_t{lanes} * kRowCopyUnroll < row_vecs) lanes *= 2;
  const int block_rows = kRowCopyThreads / lanes;
  return {lanes, block_rows, std::min(ceil_div<int64_t>(n, block_rows), kMaxBlocks)};
}

}  // namespace varstream::varlen
