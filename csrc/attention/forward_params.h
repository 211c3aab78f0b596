// Ring 3. What an attention forward launch is told; plain data.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "varlen/sequence.h"
#include "varlen/tile_schedule_params.h"

namespace varstream::attention {

// Most rows of a tensor, and of a sequence where heads share a tile: the rows and keys of a tile
// that reaches past the last one are still counted in 32 bits.
inline constexpr int64_t kMaxRows = (int64_t{1} << 31) - 256;

// Rows of (total, heads, dim) 16-bit values; the last dimension is contiguous, rows and heads
// start at multiples of 16 bytes. Strides in elements.
struct Rows {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct ForwardParams {
  Rows q;      // (total_q, heads, dim)
  Rows k;      // (total_k, kv_heads, dim)
  Rows v;      // (total_k, kv_heads, value_dim)
  void* out;   // (total_q, heads, value_dim), contiguous
  float* lse;  // (heads, total_q), natural log
  varlen::PackedLengths lengths;
  varlen::Window window;
  int32_t heads;
  Divisor group;      // heads that share a K/V head
  int32_t dim;        // a multiple of 8
  int32_t value_dim;  // a multiple of 8

  // Which block does what: block = (section, slot, head of the section).
  const varlen::QueryTile* tiles;  // (slots,)
  Divisor slots;
  Divisor pack;           // heads of a group that share a tile's rows: 1 or group
  Divisor section_heads;  // head slots (heads / pack) whose K/V stay in L2 together

  float score_unit;           // scores in registers times this are in powers of two
  const float* sinks;         // (heads,) natural log, or null
  float softmax_scale;        // the rest is for the modified kernel only
  float softcap;              // 0: none
  const float* alibi_slopes;  // (heads,) or (batch, heads), or null
  int64_t alibi_batch_stride;
  const int64_t* rng_state;  // (2,) seed and offset, or null: no dropout
  uint32_t drop_below;       // random words below this drop their score
  float keep_scale;          // 1 / (1 - dropout_p)
};

// Whether scores need more than a positive scale before the softmax.
inline bool modified(const ForwardParams& p) {
  return p.softmax_scale <= 0.0f || p.softcap > 0.0f || p.alibi_slopes != nullptr ||
         p.rng_state != nullptr;
}

// Heads of a group share the rows of a tile where queries are too few to fill it: K and V are then
// loaded once for the group. The mean length decides; lengths are not read.
inline int32_t packed_heads(int64_t total_q, int64_t batch, int32_t group, int32_t tile_rows) {
  const int64_t mean = batch > 0 ? ceil_div(total_q, batch) : 0;
  const int64_t apart = ceil_div(mean, int64_t{tile_rows}) * group;
  const int64_t together = ceil_div(mean * group, int64_t{tile_rows});
  const bool rows_fit = total_q * group <= kMaxRows;
  return together < apart && rows_fit ? group : 1;
}

// Blocks of as many head slots run side by side as keep the longest sequence's K and V within
// kSectionBytes; a divisor of all head slots.
inline constexpr int64_t kSectionBytes = int64_t{8} << 20;
inline int32_t section_heads(int32_t kv_heads, int32_t slots_per_kv, int64_t max_k, int64_t dims) {
  const int64_t head_bytes = max_k * dims * 2;
  int32_t kv =
      head_bytes > 0
          ? static_cast<int32_t>(varlen::clamp<int64_t>(kSectionBytes / head_bytes, 1, kv_heads))
          : kv_heads;
  while (kv_heads % kv != 0) --kv;
  return kv * slots_per_kv;
}

}  // namespace varstream::attention
