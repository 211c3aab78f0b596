// Ring 4. Tensors of the attention operators as launch parameters, and their tile schedules.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "attention/forward_params.h"
#include "attention/head_dims.h"
#include "torch/attention_checks.h"
#include "torch/checks.h"
#include "varlen/tile_schedule_launch.h"

namespace varstream {

using MaybeTensor = std::optional<torch::stable::Tensor>;

inline bool in_kernels(const torch::stable::Tensor& q) {
  using torch::headeronly::ScalarType;
  return q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half;
}

// For the emulated operators, which nothing composed stands in for.
inline void check_in_kernels(const torch::stable::Tensor& q) {
  VARSTREAM_CHECK(in_kernels(q), "q must be bfloat16 or float16");
}

inline attention::Dtype kernel_dtype(const torch::stable::Tensor& q) {
  return q.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? attention::Dtype::kBfloat16
                                                                    : attention::Dtype::kFloat16;
}

// A dimension of size 1 may have any stride, also one that isn't aligned: 0 keeps the addresses of
// rows past the end, which copies form and don't read, like those of the others.
inline attention::Rows as_rows(const torch::stable::Tensor& t) {
  const auto stride = [&](int64_t axis) { return t.size(axis) == 1 ? 0 : t.stride(axis); };
  return {t.const_data_ptr(), stride(0), stride(1)};
}

// A contiguous float32 copy of slopes or sinks, which may come in any floating dtype.
inline MaybeTensor as_float(const MaybeTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*t, torch::headeronly::ScalarType::Float));
}

// The options' tensors as kernels read them; they must outlive the launch.
struct KernelOptions {
  MaybeTensor slopes, sinks;

  explicit KernelOptions(const AttentionOptions& o)
      : slopes(as_float(o.alibi_slopes)), sinks(as_float(o.sinks)) {}
};

// Everything but results and schedule.
inline attention::ForwardParams forward_params(const torch::stable::Tensor& q,
                                               const torch::stable::Tensor& k,
                                               const torch::stable::Tensor& v,
                                               const AttentionOptions& o,
                                               const KernelOptions& kept) {
  attention::ForwardParams p{};
  p.q = as_rows(q), p.k = as_rows(k), p.v = as_rows(v);
  p.lengths = {o.cu_seqlens_q.const_data_ptr<int32_t>(),
               o.cu_seqlens_k.const_data_ptr<int32_t>(),
               o.seqused_k ? o.seqused_k->const_data_ptr<int32_t>() : nullptr,
               static_cast<int32_t>(o.cu_seqlens_q.size(0) - 1),
               static_cast<int32_t>(q.size(0)),
               static_cast<int32_t>(k.size(0))};
  p.window = window_of(o);
  p.heads = static_cast<int32_t>(q.size(1));
  p.group = divisor(static_cast<uint32_t>(q.size(1) / k.size(1)));
  p.dim = static_cast<int32_t>(q.size(2));
  p.value_dim = static_cast<int32_t>(v.size(2));
  p.softmax_scale = static_cast<float>(o.softmax_scale);
  p.softcap = static_cast<float>(o.softcap);
  p.alibi_slopes = kept.slopes ? kept.slopes->const_data_ptr<float>() : nullptr;
  p.alibi_batch_stride = kept.slopes && kept.slopes->dim() == 2 ? kept.slopes->size(1) : 0;
  p.sinks = kept.sinks ? kept.sinks->const_data_ptr<float>() : nullptr;
  p.keep_scale = 1.0f;
  if (o.dropout_p > 0.0) {
    p.rng_state = o.rng_state->const_data_ptr<int64_t>();
    const double below = std::nearbyint(o.dropout_p * 4294967296.0);
    p.drop_below = static_cast<uint32_t>(std::min(below, 4294967295.0));
    p.keep_scale = static_cast<float>(1.0 / (1.0 - o.dropout_p));
  }
  p.score_unit = attention::modified(p) ? 1.0f : p.softmax_scale * kLog2E;
  return p;
}

// Fills p's schedule: tiles over s.lengths' queries, longest first, for blocks of head_slots heads
// of which section_heads run side by side. s.max_tiles, s.max_cost and s.tiles are set here;
// longest is a bound of s's key lengths. The tensor returned, (slots, 2) int32, must outlive the
// launch.
inline torch::stable::Tensor schedule_tiles(attention::ForwardParams& p,
                                            varlen::TileScheduleParams s,
                                            int64_t longest,
                                            int32_t head_slots,
                                            int32_t section_heads,
                                            const torch::stable::Tensor& like,
                                            void* stream) {
  const int64_t slots =
      varlen::tile_slots(s.lengths.total_q, s.lengths.batch, s.rows_per_query, s.tile_rows);
  VARSTREAM_CHECK(slots * head_slots <= std::numeric_limits<int32_t>::max(),
                  "attention must make fewer than 2^31 tiles, got ",
                  slots * head_slots);
  const std::array<int64_t, 2> size{slots, 2};
  torch::stable::Tensor tiles = torch::stable::new_empty(
      like, {size.data(), size.size()}, torch::headeronly::ScalarType::Int);
  s.max_tiles = static_cast<int32_t>(slots);
  s.max_cost = static_cast<int32_t>(ceil_div(longest, int64_t{s.tile_keys}));
  s.tiles = reinterpret_cast<varlen::QueryTile*>(tiles.mutable_data_ptr<int32_t>());
  p.tiles = s.tiles;
  p.slots = divisor(static_cast<uint32_t>(slots));
  p.section_heads = divisor(static_cast<uint32_t>(section_heads));
  varlen::launch_tile_schedule(s, stream);
  return tiles;
}

// Tiles over queries, in which heads may share rows, for kernels that walk the keys.
inline torch::stable::Tensor schedule_queries(attention::ForwardParams& p,
                                              int32_t tile_rows,
                                              int32_t tile_keys,
                                              int64_t max_seqlen_k,
                                              const torch::stable::Tensor& like,
                                              void* stream) {
  const auto group = static_cast<int32_t>(p.group.value);
  const int32_t pack =
      attention::packed_heads(p.lengths.total_q, p.lengths.batch, group, tile_rows);
  p.pack = divisor(static_cast<uint32_t>(pack));
  // The maximum is a bound the caller knows without reading lengths; the rows are another.
  const int64_t longest = varlen::clamp<int64_t>(max_seqlen_k, 0, p.lengths.total_k);
  const int32_t section = attention::section_heads(
      p.heads / group, group / pack, longest, int64_t{p.dim} + p.value_dim);
  return schedule_tiles(p,
                        {p.lengths, p.window, pack, tile_rows, tile_keys, 0, 0, nullptr},
                        longest,
                        p.heads / pack,
                        section,
                        like,
                        stream);
}

// Tiles over keys, one K/V head a block, for kernels that walk the group's queries.
inline torch::stable::Tensor schedule_keys(attention::ForwardParams& p,
                                           int32_t tile_keys,
                                           int32_t tile_rows,
                                           int64_t max_seqlen_q,
                                           const torch::stable::Tensor& like,
                                           void* stream) {
  const auto group = static_cast<int32_t>(p.group.value);
  const varlen::PackedLengths& l = p.lengths;
  // Queries and keys change places, so the window turns round.
  const varlen::PackedLengths turned{
      l.cu_seqlens_k, l.cu_seqlens_q, nullptr, l.batch, l.total_k, l.total_q, l.seqused_k};
  const int64_t longest = varlen::clamp<int64_t>(max_seqlen_q, 0, l.total_q);
  const int32_t section =
      attention::section_heads(p.heads / group, 1, longest * group, int64_t{p.dim} + p.value_dim);
  return schedule_tiles(p,
                        {turned,
                         {p.window.right, p.window.left},
                         1,
                         tile_keys,
                         std::max(1, tile_rows / group),
                         0,
                         0,
                         nullptr},
                        longest,
                        p.heads / group,
                        section,
                        like,
                        stream);
}

}  // namespace varstream
