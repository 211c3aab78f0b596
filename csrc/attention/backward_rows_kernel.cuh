// Ring 3. The row-wise ends of the attention backward: dQ's sum scaled and rounded, and the
// gradient of sinks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/backward_params.h"
#include "common/thread.h"
#include "common/vec.cuh"
#include "ptx/barrier.cuh"
#include "ptx/math.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"
#include "tile/fragment.cuh"
#include "varlen/sequence.h"

namespace varstream::attention {

// out = scale * sum, 8 values a thread.
template <typename Element>
struct BackwardRound {
  using Params = RoundParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kBlockValues = 8 * kThreads;

  static VARSTREAM_DEVICE void run(const Params& p) {
    const int64_t first = int64_t{block_index().x} * kBlockValues + 8 * thread_index().x;
    if (first >= p.n) return;
    const auto* from = reinterpret_cast<const Vec<16>*>(p.sum + first);
    float values[8];
    const Vec<16> low = from[0], high = from[1];  // values, so that each is one load
    std::memcpy(values, &low, 16);
    std::memcpy(values + 4, &high, 16);
    Vec<16> words;
    VARSTREAM_UNROLL
    for (int i = 0; i < 4; ++i) {
      words.word[i] =
          tile::pack_pair<Element>(p.scale * values[2 * i], p.scale * values[2 * i + 1]);
    }
    *reinterpret_cast<Vec<16>*>(static_cast<Element*>(p.out) + first) = words;
  }
};

// dsinks -= sum over rows of weight of the sink * delta: a block a head, always in the same order.
struct BackwardSinks {
  using Params = SinkParams;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr size_t kSharedBytes = kThreads / 32 * sizeof(float);

  static VARSTREAM_DEVICE void run(const Params& p) {
    auto* sums = ptx::shared_array<float>(0, kSharedBytes);
    const auto head = static_cast<int32_t>(block_index().x);
    const int thread = static_cast<int>(thread_index().x);
    const float sink = p.sinks[head] * kLog2E;
    const int32_t queries = varlen::sequence_at(p.lengths, p.lengths.batch).q0;
    float sum = 0.0f;
    for (int32_t query = thread; query < queries; query += kThreads) {
      const RowStatistics row = p.statistics[int64_t{query} * p.heads + head];
      const bool empty = sink == -INFINITY || row.lse == INFINITY;
      sum += empty ? 0.0f : ptx::exp2_approx(sink - row.lse) * row.delta;
    }
    VARSTREAM_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) sum += ptx::shuffle_xor(sum, distance);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    ptx::sync_block();
    if (thread != 0) return;
    float total = 0.0f;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += sums[warp];
    p.dsinks[head] -= total;
  }
};

}  // namespace varstream::attention
