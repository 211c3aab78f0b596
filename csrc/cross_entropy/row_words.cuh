// Ring 3. A row of stored values as 16-byte words in shared memory, read once or twice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"
#include "common/math.h"
#include "common/vec.cuh"
#include "cross_entropy/residency.h"
#include "ptx/cp_async.cuh"
#include "tile/convert.cuh"
#include "tile/fragment.cuh"

namespace varstream::cross_entropy {

template <typename Element>
inline constexpr int kWordValues = kWordBytes / static_cast<int>(sizeof(Element));

// The values of a word in fp32.
template <typename Element>
VARSTREAM_DEVICE void unpack_word(const Vec<kWordBytes>& word, float* values) {
  if constexpr (std::is_same_v<Element, float>) {
    std::memcpy(values, &word, kWordBytes);
  } else {
    VARSTREAM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const tile::FloatPair pair = tile::unpack_pair<Element>(word.word[i]);
      values[2 * i] = pair.low, values[2 * i + 1] = pair.high;
    }
  }
}

// Count values as Count elements, rounded.
template <typename Element, int Count>
VARSTREAM_DEVICE Vec<Count* static_cast<int>(sizeof(Element))> pack_word(const float* values) {
  Vec<Count* static_cast<int>(sizeof(Element))> word;
  if constexpr (std::is_same_v<Element, float>) {
    std::memcpy(&word, values, sizeof(word));
  } else {
    VARSTREAM_UNROLL
    for (int i = 0; i < Count / 2; ++i) {
      word.word[i] = tile::pack_pair<Element>(values[2 * i], values[2 * i + 1]);
    }
  }
  return word;
}

// The words [begin, end) of a row; thread t of the block takes begin + t, begin + t +
// kRowThreads... Each thread copies and reads its own slots only, so none of this needs a barrier:
// a slot of the ring is read before its next copy is issued, and a thread's accesses are in order.
struct RowWords {
  const Vec<kWordBytes>* row;  // in global memory
  Vec<kWordBytes>* slots;      // in shared memory, word i of a thread at slots[i * kRowThreads]
  int32_t begin, end;
  int32_t thread;
  bool kept;  // slots hold every word of the thread; else the last kRingSlots

  VARSTREAM_DEVICE int32_t steps() const { return ceil_div(end - begin, kRowThreads * kStepWords); }
  VARSTREAM_DEVICE int32_t word_at(int32_t i) const { return begin + thread + i * kRowThreads; }
  VARSTREAM_DEVICE Vec<kWordBytes>& slot(int32_t i) const {
    return slots[(kept ? i : i % kRingSlots) * kRowThreads + thread];
  }

  // Starts the copies of a step.
  VARSTREAM_DEVICE void copy(int32_t step) const {
    VARSTREAM_UNROLL
    for (int u = 0; u < kStepWords; ++u) {
      const int32_t i = step * kStepWords + u, at = word_at(i);
      if (at < end) ptx::cp_async_16(&slot(i), row + at, true);
    }
  }

  // Calls visit(i) for each step's first word i, in order, when the step's words are in their
  // slots.
  template <typename Visit>
  VARSTREAM_DEVICE void stream(Visit visit) const {
    const int32_t count = steps();
    VARSTREAM_UNROLL
    for (int step = 0; step < kStages - 1; ++step) copy(step), ptx::cp_async_commit();
    for (int32_t step = 0; step < count; ++step) {
      copy(step + kStages - 1), ptx::cp_async_commit();
      ptx::cp_async_wait<kStages - 1>();
      visit(step * kStepWords);
    }
  }

  // The same once the slots hold the row, or by reading it again.
  template <typename Visit>
  VARSTREAM_DEVICE void again(Visit visit) const {
    if (!kept) return stream(visit);
    const int32_t count = steps();
    for (int32_t step = 0; step < count; ++step) visit(step * kStepWords);
  }
};

}  // namespace varstream::cross_entropy
