// Ring 3. What every kernel of the attention backward needs of each row (query, head), in one pass
// over dout and out: 8 values a lane, as many rows a warp as its lanes hold.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "attention/backward_params.h"
#include "common/thread.h"
#include "common/vec.cuh"
#include "ptx/warp.cuh"
#include "tile/convert.cuh"

namespace varstream::attention {

template <typename Element_>
struct BackwardPrepare {
  using Params = PrepareParams;
  using Element = Element_;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  // Of the lanes that share a row of up to 256 values, 32, 16 or 8: a power of two.
  static VARSTREAM_HOST_DEVICE int lane_bits(int value_dim) {
    return value_dim > 128 ? 5 : (value_dim > 64 ? 4 : 3);
  }
  static VARSTREAM_HOST_DEVICE int block_rows(int value_dim) {
    return kThreads >> lane_bits(value_dim);
  }

  static VARSTREAM_DEVICE void run(const Params& p) {
    const int bits = lane_bits(p.value_dim), lanes = 1 << bits;
    const auto thread = static_cast<int>(thread_index().x);
    const int first = 8 * (thread & (lanes - 1));
    const int64_t row = (int64_t{block_index().x} * kThreads + thread) >> bits;
    const bool exists = row < int64_t{p.total_q} * p.heads;
    const auto query = static_cast<int32_t>(exists ? row / p.heads : 0);
    const auto head = static_cast<int32_t>(exists ? row - int64_t{query} * p.heads : 0);
    const int64_t at = int64_t{head} * p.total_q + query;
    const bool last = exists && first == 0;  // who writes, once all lanes have joined
    const float lse = last ? p.lse[at] : 0.0f;
    const float dlse = last && p.dlse != nullptr ? p.dlse[at] : 0.0f;
    float sum = 0.0f;
    if (exists && first < p.value_dim) {
      const auto a = *reinterpret_cast<const Vec<16>*>(row_of(p.dout, query, head) + first);
      const auto b = *reinterpret_cast<const Vec<16>*>(row_of(p.out, query, head) + first);
      VARSTREAM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const tile::FloatPair x = tile::unpack_pair<Element>(a.word[i]);
        const tile::FloatPair y = tile::unpack_pair<Element>(b.word[i]);
        sum += x.low * y.low + x.high * y.high;
      }
    }
    VARSTREAM_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = ptx::shuffle_xor(sum, distance);
      if (distance < lanes) sum += other;
    }
    if (last) p.statistics[row] = {lse == -INFINITY ? INFINITY : lse * kLog2E, sum - dlse};
  }

 private:
  static VARSTREAM_DEVICE const Element* row_of(const Rows& rows, int32_t query, int32_t head) {
    return static_cast<const Element*>(rows.data) + query * rows.row_stride +
           head * rows.head_stride;
  }
};

}  // namespace varstream::attention
