// Ring 3. Softmax over rows of logits: log-sum-exp, log-probabilities of targets and what else the
// losses need, and the gradient of any weighted sum of them, written over the logits.
//
// A cluster of blocks works on one row (one block where rows are short or clusters don't exist).
// The row is read once where the blocks' shared memory holds it, else once for the sums and once
// for the gradient; the gradient is written once. With z the logits, p their softmax, and the
// upstream gradients n_k, s, f', h of RowUpstream,
//
//   G_c = dz_c/da_c (a p_c - sum_k n_k [c = t_k] - s w_c - h p_c log p_c),
//   a = sum_k n_k + s sum_c w_c + f' - h entropy
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "common/thread.h"
#include "common/vec.cuh"
#include "cross_entropy/logit.cuh"
#include "cross_entropy/row_join.cuh"
#include "cross_entropy/row_sums.cuh"
#include "cross_entropy/row_words.cuh"
#include "cross_entropy/softmax_params.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/global.cuh"
#include "ptx/math.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"

namespace varstream::cross_entropy {

// Shared memory of a block: partial sums of the warps, the row's, the targets' values, the slots.
template <bool Modified>
struct SoftmaxShared {
  static constexpr size_t kTargetsAt = kJoinBytes<RowSums<Modified>>;
  static VARSTREAM_HOST_DEVICE size_t target_bytes(int32_t targets) {
    return (targets + 4) / 4 * size_t{16};  // never empty: no two arrays share a place
  }
  static VARSTREAM_HOST_DEVICE size_t slots_at(int32_t targets) {
    return kTargetsAt + target_bytes(targets);
  }
  static VARSTREAM_HOST_DEVICE size_t slot_bytes(int32_t slots) {
    return size_t{kWordBytes} * kRowThreads * slots;
  }
};

template <typename ElementType, typename GradientType, bool kModified>
struct Softmax {
  using Params = SoftmaxParams;
  using Element = ElementType;
  using Gradient = GradientType;
  using Shared = SoftmaxShared<kModified>;
  using Sums = RowSums<kModified>;
  static constexpr int kThreads = kRowThreads;
  static constexpr int kMinBlocks = kModified ? 2 : 3;
  static constexpr int kValues = kWordValues<Element>;
  static constexpr int kGradientBytes = kValues * static_cast<int>(sizeof(Gradient));
  // Gradients narrower than the values they replace lie over values of words before them.
  static constexpr bool kNarrows = sizeof(Gradient) < sizeof(Element);

  // What every thread knows of the row once its sums are.
  struct Row {
    float base;                    // what exponents are taken relative to
    float log_total;               // log sum e^(z - base)
    float share;                   // 1 / sum e^(z - base)
    float rest;                    // a - sum_k n_k
    float factor;                  // a
    float smooth, entropy_factor;  // s, h

    VARSTREAM_DEVICE float logp(float z) const { return z - base - log_total; }
    VARSTREAM_DEVICE float p(float z) const { return exp_approx(z - base) * share; }
  };

  static VARSTREAM_DEVICE void run(const Params& p) {
    const auto rank = static_cast<int32_t>(block_index().x % p.residency.cluster);
    const auto row = static_cast<int64_t>(block_index().x / p.residency.cluster);
    const auto thread = static_cast<int32_t>(thread_index().x);
    const int64_t words = ceil_div(p.classes, kValues);
    const int64_t cluster = p.residency.cluster;
    auto* values = static_cast<Element*>(p.values) + row * p.row_stride;
    const RowWords share{reinterpret_cast<const Vec<kWordBytes>*>(values),
                         ptx::shared_array<Vec<kWordBytes>>(Shared::slots_at(p.targets),
                                                            Shared::slot_bytes(p.residency.slots)),
                         static_cast<int32_t>(words * rank / cluster),
                         static_cast<int32_t>(words * (rank + 1) / cluster),
                         thread,
                         p.residency.kept};
    auto* gradient = reinterpret_cast<Gradient*>(values);
    if (p.count != nullptr && p.first_row + row >= *p.count) {
      return clear(p, row, rank, share, gradient);
    }

    auto* target_values =
        ptx::shared_array<float>(Shared::kTargetsAt, Shared::target_bytes(p.targets));
    put_targets_aside(p, row, share, values, target_values);
    Row known;
    if (kModified && p.shard.given != nullptr) {
      ptx::sync_block();
      known = given(p, row);
    } else {
      const Sums sums = row_sums(p, share);
      if (p.residency.cluster > 1) ptx::cluster_arrive();  // this block has read the others' sums
      known = finish(p, row, sums);
      if (rank == 0) write_results(p, row, thread, sums, known, target_values);
    }
    if (p.gradient) {
      write_gradient(p, share, known, gradient);
      ptx::sync_block();
      correct_targets(p, row, share, known, target_values, gradient);
    }
    if (p.residency.cluster > 1) {
      ptx::sync_warp();
      ptx::cluster_wait();  // before its own shared memory goes
    }
  }

  // A row that takes no part: nothing of it is read.
  static VARSTREAM_DEVICE void clear(
      const Params& p, int64_t row, int32_t rank, const RowWords& share, Gradient* gradient) {
    auto* words = reinterpret_cast<Vec<kGradientBytes>*>(gradient);
    if (p.gradient) {
      for (int32_t at = share.begin + share.thread; at < share.end; at += kThreads) {
        ptx::store_global(words + at, Vec<kGradientBytes>{});
      }
    }
    if (rank != 0) return;
    const RowResults& out = p.results;
    for (int32_t k = share.thread; k < p.targets; k += kThreads) {
      if (out.logp != nullptr) out.logp[row * p.targets + k] = 0.0f;
      if (p.shard.target_z != nullptr) p.shard.target_z[row * p.targets + k] = 0.0f;
    }
    if (share.thread != 0) return;
    if (p.shard.sums != nullptr) {
      for (int i = 0; i < kRowSums; ++i) p.shard.sums[row * kRowSums + i] = 0.0f;
    }
    if (out.lse != nullptr) out.lse[row] = 0.0f;
    if (out.entropy != nullptr) out.entropy[row] = 0.0f;
    if (out.class_sum != nullptr) out.class_sum[row] = 0.0f;
    if (out.log_sum_sq != nullptr) out.log_sum_sq[row] = 0.0f;
    if (out.argmax != nullptr) out.argmax[row] = -1;
  }

  // The targets' stored values, before the gradient covers them.
  static VARSTREAM_DEVICE void put_targets_aside(const Params& p,
                                                 int64_t row,
                                                 const RowWords& share,
                                                 const Element* values,
                                                 float* target_values) {
    for (int32_t k = share.thread; k < p.targets; k += kThreads) {
      const int64_t t = p.target[row * p.targets + k];
      target_values[k] = t >= 0 && t < p.classes ? static_cast<float>(values[t]) : 0.0f;
    }
  }

  // The row's sums, the same in every thread of the cluster.
  static VARSTREAM_DEVICE Sums row_sums(const Params& p, const RowWords& share) {
    Sums sums;
    share.stream([&](int32_t first) {
      VARSTREAM_UNROLL
      for (int u = 0; u < kStepWords; ++u) {
        const int32_t at = share.word_at(first + u);
        if (at < share.end) add_word(p, share.slot(first + u), at * kValues, sums);
      }
    });
    return join_cluster(sums, share.thread, p.residency.cluster);
  }

  static VARSTREAM_DEVICE void add_word(const Params& p,
                                        const Vec<kWordBytes>& word,
                                        int32_t column,
                                        Sums& sums) {
    float z[kValues], slopes[kValues];
    unpack_word<Element>(word, z);
    const int32_t count = p.classes - column;  // more than kValues but for the last word
    logits_of<kModified>(z, slopes, column, count, p.logits);
    float top = sums.top;
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (i >= count) z[i] = -INFINITY;
      if constexpr (kModified) {
        if (z[i] > top) sums.argmax = column + i;
      }
      top = fmaxf(top, z[i]);
    }
    sums.raise(top);
    const float base = base_of(top);
    float total = 0.0f;  // of the word alone: a long row's total rounds off less
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const float below = z[i] - base, e = exp_approx(below);
      total += e;
      if constexpr (kModified) {
        if (e != 0.0f) sums.moment += e * below;
        sums.squares += e * e;
        z[i] = below;
      }
    }
    sums.total += total;
    if constexpr (kModified) add_weights(p, z, column, count, sums);
  }

  static VARSTREAM_DEVICE void add_weights(const Params& p,
                                           const float (&below)[kValues],
                                           int32_t column,
                                           int32_t count,
                                           RowSums<true>& sums) {
    if (p.class_weight == nullptr) {
      VARSTREAM_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (i < count) sums.gap -= below[i];
      }
      sums.weight += static_cast<float>(count < kValues ? count : kValues);
      return;
    }
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      const float w = i < count ? p.class_weight[column + i] : 0.0f;
      if (w != 0.0f) sums.gap -= w * below[i];  // weight 0, logit -inf: adds nothing
      sums.weight += w;
    }
  }

  // Of a word's classes, 0 past the last.
  static VARSTREAM_DEVICE void weights_of(const Params& p,
                                          int32_t column,
                                          int32_t count,
                                          float (&w)[kValues]) {
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) w[i] = i < count ? 1.0f : 0.0f;
    if (p.class_weight == nullptr) return;
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (i < count) w[i] = p.class_weight[column + i];
    }
  }

  static VARSTREAM_DEVICE Row finish(const Params& p, int64_t row, const Sums& sums) {
    Row known = row_of(p, row, sums.top, sums.total);
    const RowUpstream& up = p.upstream;
    if (up.lse != nullptr) known.rest += up.lse[row];
    if (up.lse_sq_scale != nullptr) {
      known.rest += 2.0f * *up.lse_sq_scale * (known.base + known.log_total);
    }
    if constexpr (kModified) {
      known.rest += known.smooth * sums.weight;
      if (up.entropy != nullptr) known.rest -= known.entropy_factor * entropy_of(sums, known);
    }
    known.factor += known.rest;
    return known;
  }

  // With sum_k n_k for the factor a.
  static VARSTREAM_DEVICE Row row_of(const Params& p, int64_t row, float top, float total) {
    Row known{base_of(top), logf(total), 1.0f / total, 0.0f, 0.0f, 0.0f, 0.0f};
    const RowUpstream& up = p.upstream;
    for (int32_t k = 0; k < p.targets; ++k) {
      known.factor += up.nll == nullptr ? 1.0f : up.nll[row * p.targets + k];
    }
    if (up.smooth != nullptr) known.smooth = up.smooth[row];
    if (up.entropy != nullptr) known.entropy_factor = up.entropy[row];
    return known;
  }

  // What a first launch and the caller found over all classes.
  static VARSTREAM_DEVICE Row given(const Params& p, int64_t row) {
    const float* from = p.shard.given + row * kRowGiven;
    Row known = row_of(p, row, from[0], from[1]);
    known.rest = from[2];
    known.factor += known.rest;
    return known;
  }

  static VARSTREAM_DEVICE float entropy_of(const RowSums<true>& sums, const Row& known) {
    return known.log_total - sums.moment / sums.total;
  }

  static VARSTREAM_DEVICE void write_results(const Params& p,
                                             int64_t row,
                                             int32_t thread,
                                             const Sums& sums,
                                             const Row& known,
                                             const float* target_values) {
    const RowResults& out = p.results;
    if constexpr (kModified) {
      if (p.shard.sums != nullptr) write_sums(p, row, thread, sums, target_values);
    }
    if (out.logp != nullptr) {
      for (int32_t k = thread; k < p.targets; k += kThreads) {
        const int64_t t = p.target[row * p.targets + k];
        const bool inside = t >= 0 && t < p.classes;
        const auto column = static_cast<int32_t>(inside ? t : 0);
        const float z = logit_of<kModified>(target_values[k], column, p.logits).z;
        out.logp[row * p.targets + k] = inside ? known.logp(z) : NAN;
      }
    }
    if (thread != 0) return;
    if (out.lse != nullptr) out.lse[row] = sums.top + known.log_total;
    if constexpr (kModified) {
      if (out.entropy != nullptr) out.entropy[row] = entropy_of(sums, known);
      if (out.class_sum != nullptr) {
        out.class_sum[row] = -(sums.gap + sums.weight * known.log_total);
      }
      if (out.log_sum_sq != nullptr) {
        out.log_sum_sq[row] = logf(sums.squares) - 2.0f * known.log_total;
      }
      if (out.argmax != nullptr) out.argmax[row] = sums.argmax < p.classes ? sums.argmax : 0;
    }
  }

  static VARSTREAM_DEVICE void write_sums(const Params& p,
                                          int64_t row,
                                          int32_t thread,
                                          const RowSums<true>& sums,
                                          const float* target_values) {
    for (int32_t k = thread; k < p.targets; k += kThreads) {
      const int64_t t = p.target[row * p.targets + k];
      const bool inside = t >= 0 && t < p.classes;
      const auto column = static_cast<int32_t>(inside ? t : 0);
      const float z = logit_of<kModified>(target_values[k], column, p.logits).z;
      p.shard.target_z[row * p.targets + k] = inside ? z : 0.0f;
    }
    if (thread != 0) return;
    float* out = p.shard.sums + row * kRowSums;
    out[0] = sums.top, out[1] = sums.total, out[2] = sums.moment, out[3] = sums.squares;
    out[4] = sums.gap, out[5] = sums.weight;
    const int32_t argmax = sums.argmax < p.classes ? sums.argmax : 0;
    std::memcpy(
        out + 6, &argmax, sizeof(argmax));  // its bits: a float holds no number of 2^24 and more
  }

  static VARSTREAM_DEVICE void write_gradient(const Params& p,
                                              const RowWords& share,
                                              const Row& known,
                                              Gradient* gradient) {
    auto* words = reinterpret_cast<Vec<kGradientBytes>*>(gradient);
    const float plain = known.factor * p.logits.slope * known.share;
    share.again([&](int32_t first) {
      float g[kStepWords][kValues];
      VARSTREAM_UNROLL
      for (int u = 0; u < kStepWords; ++u) {
        const int32_t at = share.word_at(first + u);
        if (at >= share.end) continue;
        unpack_word<Element>(share.slot(first + u), g[u]);
        entries(p, at * kValues, known, plain, g[u]);
      }
      // All threads hold their values of this step before any of them is covered.
      if (kNarrows && !share.kept) ptx::sync_block();
      VARSTREAM_UNROLL
      for (int u = 0; u < kStepWords; ++u) {
        const int32_t at = share.word_at(first + u);
        if (at < share.end) ptx::store_global(words + at, pack_word<Gradient, kValues>(g[u]));
      }
    });
  }

  // A word of values becomes entries of G apart from their share of the targets.
  static VARSTREAM_DEVICE void entries(
      const Params& p, int32_t column, const Row& known, float plain, float (&g)[kValues]) {
    const int32_t count = p.classes - column;
    float slopes[kValues];
    logits_of<kModified>(g, slopes, column, count, p.logits);
    if constexpr (!kModified) {
      VARSTREAM_UNROLL
      for (int i = 0; i < kValues; ++i) g[i] = plain * exp_approx(g[i] - known.base);
      return;
    }
    float z[kValues], e[kValues];
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) {
      z[i] = g[i], e[i] = known.p(z[i]);
      g[i] = known.factor * e[i];
    }
    if (known.entropy_factor != 0.0f) {
      VARSTREAM_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (e[i] != 0.0f) g[i] -= known.entropy_factor * e[i] * known.logp(z[i]);
      }
    }
    if (known.smooth != 0.0f) {
      float w[kValues];
      weights_of(p, column, count, w);
      VARSTREAM_UNROLL
      for (int i = 0; i < kValues; ++i) g[i] -= known.smooth * w[i];
    }
    VARSTREAM_UNROLL
    for (int i = 0; i < kValues; ++i) g[i] = i < count ? g[i] * slopes[i] : 0.0f;
  }

  // The targets' entries once more, from p - 1 without a rounding of p, in fp32 until stored.
  static VARSTREAM_DEVICE void correct_targets(const Params& p,
                                               int64_t row,
                                               const RowWords& share,
                                               const Row& known,
                                               const float* target_values,
                                               Gradient* gradient) {
    const int64_t* target = p.target + row * p.targets;
    const float* nll = p.upstream.nll == nullptr ? nullptr : p.upstream.nll + row * p.targets;
    for (int32_t k = share.thread; k < p.targets; k += kThreads) {
      const int64_t t = target[k];
      if (t < int64_t{share.begin} * kValues || t >= int64_t{share.end} * kValues ||
          t >= p.classes) {
        continue;
      }
      float own = 0.0f, others = 0.0f;  // n of this target and its duplicates, and of the rest
      for (int32_t j = 0; j < p.targets; ++j) {
        (target[j] == t ? own : others) += nll == nullptr ? 1.0f : nll[j];
      }
      const auto column = static_cast<int32_t>(t);
      const Logit logit = logit_of<kModified>(target_values[k], column, p.logits);
      const float logp = known.logp(logit.z), e = known.p(logit.z);
      // a p - own = own (p - 1) + (sum_k n_k - own + rest) p
      float g = own * expm1f(logp) + (others + known.rest) * e;
      if constexpr (kModified) {
        if (known.entropy_factor != 0.0f && e != 0.0f) g -= known.entropy_factor * e * logp;
        if (known.smooth != 0.0f) {
          g -= known.smooth * (p.class_weight == nullptr ? 1.0f : p.class_weight[column]);
        }
      }
      gradient[t] = static_cast<Gradient>(g * logit.slope);
    }
  }
};

}  // namespace varstream::cross_entropy
