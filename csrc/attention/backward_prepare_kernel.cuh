// Ring 3. What every kernel of the attention backward needs of each row, in one pass over dout and
// out: a warp a row (query, head).
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
  static constexpr int kBlockRows = kThreads / 32;

  static VARSTREAM_DEVICE void run(const Params& p) {
    const int lane = static_cast<int>(thread_index().x) % 32;
    const int64_t row = int64_t{block_index().x} * kBlockRows + thread_index().x / 32;
    if (row >= int64_t{p.total_q} * p.heads) return;
    const int64_t query = row / p.heads, head = row % p.heads;
    const auto* dout = static_cast<const Element*>(p.dout.data) + query * p.dout.row_stride +
                       head * p.dout.head_stride;
    const auto* out = static_cast<const Element*>(p.out.data) + query * p.out.row_stride +
                      head * p.out.head_stride;
    float sum = 0.0f;
    const int first = 8 * lane;  // 8 values a lane: up to 256
    if (first < p.value_dim) {
      const auto a = *reinterpret_cast<const Vec<16>*>(dout + first);
      const auto b = *reinterpret_cast<const Vec<16>*>(out + first);
      VARSTREAM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const tile::FloatPair x = tile::unpack_pair<Element>(a.word[i]);
        const tile::FloatPair y = tile::unpack_pair<Element>(b.word[i]);
        sum += x.low * y.low + x.high * y.high;
      }
    }
    VARSTREAM_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) sum += ptx::shuffle_xor(sum, distance);
    if (lane != 0) return;
    const int64_t at = head * p.total_q + query;
    const float lse = p.lse[at];
    p.statistics[row] = {lse == -INFINITY ? INFINITY : lse * kLog2E,
                         p.dlse == nullptr ? sum : sum - p.dlse[at]};
  }
};

}  // namespace varstream::attention
