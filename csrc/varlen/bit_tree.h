// Ring 2. A set of small integers with a fast "next member": a bitset under 64-ary summaries.
#pragma once

#include <cstdint>
#include <vector>

namespace varstream::varlen {

// Members are 0 .. size - 1. Each level has one bit per word of the level below, set when that word
// is not zero, so a search touches two words per level: 2 levels reach 4,096, 4 reach 16 million.
class BitTree {
 public:
  explicit BitTree(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(int64_t member) {
    for (auto& level : levels_) {
      const uint64_t before = level[member / 64];
      level[member / 64] = before | bit(member);
      if (before != 0) return;  // the summaries know already
      member /= 64;
    }
  }

  void erase(int64_t member) {
    for (auto& level : levels_) {
      if ((level[member / 64] &= ~bit(member)) != 0) return;
      member /= 64;
    }
  }

  // The smallest member >= from, or -1.
  int64_t next(int64_t from) const {
    size_t depth = 0;
    for (;; ++depth, from = from / 64 + 1) {  // up, until a word holds a later bit
      if (depth == levels_.size()) return -1;
      const auto& level = levels_[depth];
      const size_t word = from / 64;
      if (word >= level.size()) return -1;
      const uint64_t later = level[word] & (~uint64_t{0} << (from % 64));
      if (later != 0) {
        from = word * 64 + __builtin_ctzll(later);
        break;
      }
    }
    while (depth-- > 0) from = from * 64 + __builtin_ctzll(levels_[depth][from]);  // down again
    return from;
  }

 private:
  static uint64_t bit(int64_t member) { return uint64_t{1} << (member % 64); }

  std::vector<std::vector<uint64_t>> levels_;  // from one bit per member to one word
};

}  // namespace varstream::varlen
