// Ring 3. The divergence of the softmax p of a student's row from the softmax q of a teacher's, and
// its gradient over the student's values. A cluster works on one pair of rows as in
// softmax_kernel.cuh: both are read once where they fit on chip, else once for each pass.
//
//   beta 0: sum q (log q - log p),               dz = p - q
//   beta:   (1 - beta) P + beta Q with m = (1 - beta) p + beta q, P = sum p (log p - log m) and
//           Q = sum q (log q - log m),           dz = (1 - beta) p (log p - log m - P)
//   beta 1: P with m = q,                        dz = p (log p - log m - P)
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/macros.h"
#include "common/thread.h"
#include "common/vec.cuh"
#include "cross_entropy/distillation_params.h"
#include "cross_entropy/logit.cuh"
#include "cross_entropy/row_join.cuh"
#include "cross_entropy/row_sums.cuh"
#include "cross_entropy/row_words.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/global.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"

namespace varstream::cross_entropy {

// The sums of a student's and a teacher's row side by side.
struct PairSums {
  RowSums<false> student, teacher;

  VARSTREAM_DEVICE void join(const PairSums& other) {
    student.join(other.student), teacher.join(other.teacher);
  }
  VARSTREAM_DEVICE void join_lane(int distance) {
    student.join_lane(distance), teacher.join_lane(distance);
  }
};

struct DivergenceSums {
  float student = 0.0f;  // sum of p (log p - log m)
  float teacher = 0.0f;  // sum of q (log q - log m); log p for log m in kForward

  VARSTREAM_DEVICE void join(const DivergenceSums& other) {
    student += other.student, teacher += other.teacher;
  }
  VARSTREAM_DEVICE void join_lane(int distance) {
    join({ptx::shuffle_xor(student, distance), ptx::shuffle_xor(teacher, distance)});
  }
};

// What stands at one class.
struct Chance {
  float p, q;
  float p_gap, q_gap;  // log p - log m and log q - log m, 0 where p or q is
};

// m never becomes a sum of exponentials: with d = log q - log p, log m - log p is
// log1p(beta expm1(d)), and the like from q where d is positive, so equal p and q leave exactly 0.
VARSTREAM_DEVICE Chance chance_of(float logp, float logq, Divergence divergence, float beta) {
  Chance c{exp_approx(logp), exp_approx(logq), 0.0f, 0.0f};
  if (c.p == 0.0f && c.q == 0.0f) return c;
  const float d = logq - logp;
  float to_p, to_q;  // log m - log p, log m - log q
  if (divergence == Divergence::kForward) {
    to_p = 0.0f, to_q = -d;
  } else if (divergence == Divergence::kReverse) {
    to_p = d, to_q = 0.0f;
  } else if (d <= 0.0f) {
    to_p = log1pf(beta * expm1f(d)), to_q = to_p - d;
  } else {
    to_q = log1pf((1.0f - beta) * expm1f(-d)), to_p = to_q + d;
  }
  if (c.p != 0.0f) c.p_gap = -to_p;
  if (c.q != 0.0f) c.q_gap = -to_q;
  return c;
}

template <typename GradientType>
struct Distillation {
  using Params = DistillationParams;
  using Gradient = GradientType;
  static constexpr int kThreads = kRowThreads;
  static constexpr int kMinBlocks = 2;
  static constexpr int kValues = kWordValues<float>;
  static constexpr int kGradientBytes = kValues * static_cast<int>(sizeof(Gradient));
  static constexpr bool kNarrows = sizeof(Gradient) < sizeof(float);
  static constexpr size_t kDivergenceAt = kJoinBytes<PairSums>;
  static constexpr size_t kSlotsAt = kDivergenceAt + kJoinBytes<DivergenceSums>;

  static VARSTREAM_HOST_DEVICE size_t slot_bytes(int32_t slots) {
    return size_t{kWordBytes} * kRowThreads * slots;
  }

  // log e^z - log sum e^z
  struct Normaliser {
    float base, log_total;
    VARSTREAM_DEVICE float operator()(float z) const { return z - base - log_total; }
  };

  struct Pair {
    RowWords student, teacher;
    Normaliser logp, logq;
  };

  static VARSTREAM_DEVICE void run(const Params& p) {
    const auto rank = static_cast<int32_t>(block_index().x % p.residency.cluster);
    const auto row = static_cast<int64_t>(block_index().x / p.residency.cluster);
    const auto thread = static_cast<int32_t>(thread_index().x);
    float* values = p.student + row * p.row_stride;
    auto* words = reinterpret_cast<Vec<kGradientBytes>*>(values);
    Pair pair{share_of(p, values, rank, thread, 0),
              share_of(p, p.teacher + row * p.row_stride, rank, thread, 1),
              {},
              {}};
    if (p.count != nullptr && p.first_row + row >= *p.count) {
      return clear(p, row, rank, pair.student, words);
    }
    const PairSums sums = pair_sums(p, pair);
    pair.logp = {base_of(sums.student.top), logf(sums.student.total)};
    pair.logq = {base_of(sums.teacher.top), logf(sums.teacher.total)};
    const float upstream = p.dloss == nullptr ? 1.0f : p.dloss[row];
    // Without a mixture the gradient doesn't wait for the divergence.
    const bool together = p.divergence == Divergence::kForward;
    DivergenceSums found;
    again(pair, [&](int32_t first) {
      float g[kStepWords][kValues];
      VARSTREAM_UNROLL
      for (int u = 0; u < kStepWords; ++u) {
        visit_word(p, pair, first + u, g[u], [&](int i, const Chance& c, float slope) {
          found.student += c.p * c.p_gap, found.teacher += c.q * c.q_gap;
          g[u][i] = upstream * slope * (c.p - c.q);
        });
      }
      if (together && p.gradient) store(pair.student, first, words, g);
    });
    found = join_cluster(found, thread, p.residency.cluster, kDivergenceAt);
    if (p.residency.cluster > 1) ptx::cluster_arrive();  // this block has read the others' sums
    if (rank == 0 && thread == 0) {
      p.losses[row] = loss_of(p, found);
    }
    if (!together && p.gradient) {
      const bool mixture = p.divergence == Divergence::kMixture;
      const float share = upstream * (mixture ? 1.0f - p.beta : 1.0f);
      again(pair, [&](int32_t first) {
        float g[kStepWords][kValues];
        VARSTREAM_UNROLL
        for (int u = 0; u < kStepWords; ++u) {
          visit_word(p, pair, first + u, g[u], [&](int i, const Chance& c, float slope) {
            g[u][i] = c.p == 0.0f ? 0.0f : share * slope * c.p * (c.p_gap - found.student);
          });
        }
        store(pair.student, first, words, g);
      });
    }
    if (p.residency.cluster > 1) {
      ptx::sync_warp();
      ptx::cluster_wait();  // before its own shared memory goes
    }
  }

  static VARSTREAM_DEVICE float loss_of(const Params& p, const DivergenceSums& found) {
    if (p.divergence == Divergence::kForward) return found.teacher;
    if (p.divergence == Divergence::kReverse) return found.student;
    return (1.0f - p.beta) * found.student + p.beta * found.teacher;
  }

  static VARSTREAM_DEVICE RowWords
  share_of(const Params& p, const float* values, int32_t rank, int32_t thread, int which) {
    const int64_t words = ceil_div(p.classes, kValues), cluster = p.residency.cluster;
    const size_t bytes = slot_bytes(p.residency.slots);
    return {reinterpret_cast<const Vec<kWordBytes>*>(values),
            ptx::shared_array<Vec<kWordBytes>>(kSlotsAt + which * bytes, bytes),
            static_cast<int32_t>(words * rank / cluster),
            static_cast<int32_t>(words * (rank + 1) / cluster),
            thread,
            p.residency.kept};
  }

  static VARSTREAM_DEVICE void clear(const Params& p,
                                     int64_t row,
                                     int32_t rank,
                                     const RowWords& share,
                                     Vec<kGradientBytes>* words) {
    if (p.gradient) {
      for (int32_t at = share.begin + share.thread; at < share.end; at += kThreads) {
        ptx::store_global(words + at, Vec<kGradientBytes>{});
      }
    }
    if (rank == 0 && share.thread == 0) p.losses[row] = 0.0f;
  }

  // Both rows' steps side by side; visit as for RowWords.
  template <typename Visit>
  static VARSTREAM_DEVICE void stream(const Pair& pair, Visit visit) {
    const int32_t count = pair.student.steps();
    const auto fetch = [&](int32_t step) {
      pair.student.copy(step), pair.teacher.copy(step);
      ptx::cp_async_commit();
    };
    VARSTREAM_UNROLL
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    for (int32_t step = 0; step < count; ++step) {
      fetch(step + kStages - 1);
      ptx::cp_async_wait<kStages - 1>();
      visit(step * kStepWords);
    }
  }

  template <typename Visit>
  static VARSTREAM_DEVICE void again(const Pair& pair, Visit visit) {
    if (!pair.student.kept) return stream(pair, visit);
    const int32_t count = pair.student.steps();
    for (int32_t step = 0; step < count; ++step) visit(step * kStepWords);
  }

  static VARSTREAM_DEVICE PairSums pair_sums(const Params& p, const Pair& pair) {
    PairSums sums;
    stream(pair, [&](int32_t first) {
      VARSTREAM_UNROLL
      for (int u = 0; u < kStepWords; ++u) {
        const int32_t at = pair.student.word_at(first + u);
        if (at >= pair.student.end) continue;
        add_word(p.classes, pair.student.slot(first + u), at, p.student_logits, sums.student);
        add_word(p.classes, pair.teacher.slot(first + u), at, p.teacher_logits, sums.teacher);
      }
    });
    return join_cluster(sums, pair.student.thread, p.residency.cluster);
  }

  static VARSTREAM_DEVICE void add_word(int32_t classes,
                                        const Vec<kWordBytes>& word,
                                        int32_t at,
                                        const LogitMap& map,
                                        RowSums<false>& sums) {
    float z[kValues], slopes[kValues];
    unpack_word<float>(word, z);
    const int32_t column = at * kValues, count = classes - column;
    logits_of<true>(z, slopes, column, count, map);
    float top = sums.top;
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (i >= count) z[i] = -INFINITY;
      top = fmaxf(top, z[i]);
    }
    sums.raise(top);
    const float base = base_of(top);
    float total = 0.0f;
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) total += exp_approx(z[i] - base);
    sums.total += total;
  }

  // Calls visit(i, chance, slope) for each class of word number i of the thread; g (kValues,) is 0
  // for the others.
  template <typename Visit>
  static VARSTREAM_DEVICE void visit_word(
      const Params& p, const Pair& pair, int32_t number, float* g, Visit visit) {
    const int32_t at = pair.student.word_at(number);
    float student[kValues], teacher[kValues];
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) g[i] = 0.0f;
    if (at >= pair.student.end) return;
    unpack_word<float>(pair.student.slot(number), student);
    unpack_word<float>(pair.teacher.slot(number), teacher);
    const int32_t column = at * kValues, count = p.classes - column;
    float slopes[kValues], unused[kValues];
    logits_of<true>(student, slopes, column, count, p.student_logits);
    logits_of<true>(teacher, unused, column, count, p.teacher_logits);
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (i >= count) continue;
      const Chance chance =
          chance_of(pair.logp(student[i]), pair.logq(teacher[i]), p.divergence, p.beta);
      visit(i, chance, slopes[i]);
    }
  }

  static VARSTREAM_DEVICE void store(const RowWords& share,
                                     int32_t first,
                                     Vec<kGradientBytes>* words,
                                     const float (&g)[kStepWords][kValues]) {
    // All threads hold their values of this step before any of them is covered.
    if (kNarrows && !share.kept) ptx::sync_block();
    VARSTREAM_UNROLL
    for (int u = 0; u < kStepWords; ++u) {
      const int32_t at = share.word_at(first + u);
      if (at < share.end) ptx::store_global(words + at, pack_word<Gradient, kValues>(g[u]));
    }
  }
};

}  // namespace varstream::cross_entropy
