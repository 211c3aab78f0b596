// Ring 2. Where a sequence of a packed batch lies, and which keys its queries see; plain functions
// of the lengths, the same on host and device.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace varstream::varlen {

template <typename Int>
VARSTREAM_HOST_DEVICE constexpr Int clamp(Int value, Int low, Int high) {
  return value < low ? low : (value > high ? high : value);
}

// Cumulative lengths of a packed batch, and how many rows its tensors really have.
struct PackedLengths {
  const int32_t* cu_seqlens_q;  // (batch + 1,)
  const int32_t* cu_seqlens_k;  // (batch + 1,)
  const int32_t* seqused_k;     // (batch,) keys in use, or null for all
  int32_t batch;
  int32_t total_q;
  int32_t total_k;
  const int32_t* seqused_q = nullptr;  // (batch,) the same for queries
};

// Rows q0 to q0 + sq of the queries stand against rows k0 to k0 + sk of the keys.
struct Sequence {
  int32_t q0, sq;
  int32_t k0, sk;
};

// Sequence b of the batch; b == batch is the inert tail, the query rows after the last sequence,
// which have no keys. Whatever the lengths hold, the rows lie inside the tensors.
VARSTREAM_HOST_DEVICE Sequence sequence_at(const PackedLengths& lengths, int32_t b) {
  Sequence s{};
  s.q0 = clamp(lengths.cu_seqlens_q[b], int32_t{0}, lengths.total_q);
  if (b == lengths.batch) {
    s.sq = lengths.total_q - s.q0;
    return s;
  }
  s.sq = clamp(lengths.cu_seqlens_q[b + 1], s.q0, lengths.total_q) - s.q0;
  if (lengths.seqused_q != nullptr) s.sq = clamp(lengths.seqused_q[b], int32_t{0}, s.sq);
  s.k0 = clamp(lengths.cu_seqlens_k[b], int32_t{0}, lengths.total_k);
  s.sk = clamp(lengths.cu_seqlens_k[b + 1], s.k0, lengths.total_k) - s.k0;
  if (lengths.seqused_k != nullptr) s.sk = clamp(lengths.seqused_k[b], int32_t{0}, s.sk);
  return s;
}

// How far a query sees to both sides of its aligned position; -1: to the end.
struct Window {
  int32_t left, right;
};

// Keys begin to end, within the sequence.
struct KeyRange {
  int32_t begin, end;
};

// The keys that query i of sq sees among sk: bottom-right aligned, so it stands at i + sk - sq.
// Empty ranges have begin >= end.
VARSTREAM_HOST_DEVICE KeyRange visible_keys(int32_t i, int32_t sq, int32_t sk, Window window) {
  const int64_t at = int64_t{i} + sk - sq;
  const int64_t begin = window.left < 0 ? 0 : at - window.left;
  const int64_t end = window.right < 0 ? sk : at + window.right + 1;
  return {static_cast<int32_t>(clamp<int64_t>(begin, 0, sk)),
          static_cast<int32_t>(clamp<int64_t>(end, 0, sk))};
}

// The keys that any of the queries first to last (included) sees: both ends only grow with i.
VARSTREAM_HOST_DEVICE KeyRange
visible_keys(int32_t first, int32_t last, int32_t sq, int32_t sk, Window window) {
  return {visible_keys(first, sq, sk, window).begin, visible_keys(last, sq, sk, window).end};
}

}  // namespace varstream::varlen
