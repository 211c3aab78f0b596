// The numbers an attention launch is made of: division by multiplication, heads that share a tile,
// heads of a section. Exits with 1 where one is wrong. Built by tests/test_attention_launch.py.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "attention/forward_params.h"

namespace vs = varstream;
namespace attention = varstream::attention;

constexpr int64_t kEnd = int64_t{1} << 31;
int failures = 0;

// Numbers around each multiple of `step`, each power of two and both ends, below `end`.
std::vector<int64_t> edges(int64_t step, int64_t end) {
  std::vector<int64_t> found;
  const auto around = [&](int64_t n) {
    for (int64_t m = n - 2; m <= n + 2; ++m) {
      if (0 <= m && m < end) found.push_back(m);
    }
  };
  for (int64_t power = 1; power <= end; power *= 2) around(power);
  for (int64_t times : {int64_t{1}, int64_t{2}, int64_t{3}, (end - 1) / step / 2}) {
    around(times * step);
  }
  around((end - 1) / step * step);
  around(end - 1);
  return found;
}

void check_divisor(int64_t value) {
  const vs::Divisor divisor = vs::divisor(static_cast<uint32_t>(value));
  for (int64_t n : edges(value, kEnd)) {
    if (divisor.quotient(static_cast<uint32_t>(n)) == n / value) continue;
    std::printf("%lld / %lld\n", static_cast<long long>(n), static_cast<long long>(value));
    ++failures;
  }
}

void check_packed(int64_t total_q, int64_t batch, int32_t group, int32_t tile_rows) {
  const int32_t pack = attention::packed_heads(total_q, batch, group, tile_rows);
  const bool known = pack == 1 || pack == group;
  // The last tile of a packed sequence ends before 2^31.
  const bool fits = total_q * pack <= attention::kMaxRows;
  // Never more tiles of the mean length than heads on their own would make.
  const int64_t mean = batch > 0 ? (total_q + batch - 1) / batch : 0;
  const auto tiles = [&](int64_t rows) { return (rows + tile_rows - 1) / tile_rows; };
  const bool pays = pack == 1 || tiles(mean * pack) < tiles(mean) * group;
  if (known && fits && pays) return;
  std::printf("pack %d of %lld rows in %lld sequences\n",
              pack,
              static_cast<long long>(total_q),
              static_cast<long long>(batch));
  ++failures;
}

void check_section(int32_t kv_heads, int32_t slots, int64_t max_k, int64_t dims) {
  const int32_t heads = attention::section_heads(kv_heads, slots, max_k, dims);
  const bool divides = heads > 0 && heads % slots == 0 && kv_heads * slots % heads == 0;
  const int64_t bytes = heads / std::max(slots, 1) * max_k * dims * 2;
  const bool fits = heads == slots || bytes <= attention::kSectionBytes;
  if (divides && fits) return;
  std::printf("section of %d heads: %d times %d, %lld keys\n",
              heads,
              kv_heads,
              slots,
              static_cast<long long>(max_k));
  ++failures;
}

int main() {
  for (int64_t value = 1; value <= 1024; ++value) check_divisor(value);
  for (int64_t value : edges(1, kEnd + 1)) {
    if (value > 0) check_divisor(value);
  }
  const int64_t rows[] = {0, 1, 127, 128, 129, 1000, kEnd / 8 - 32, kEnd / 8, attention::kMaxRows};
  for (int64_t total_q : rows) {
    for (int64_t batch : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{1000}, kEnd - 2}) {
      for (int32_t group : {1, 2, 3, 7, 8, 64, 128}) {
        for (int32_t tile_rows : {64, 128}) check_packed(total_q, batch, group, tile_rows);
      }
    }
  }
  for (int32_t kv_heads : {1, 2, 3, 7, 12, 13, 97, 128}) {
    for (int32_t slots : {1, 2, 5, 8}) {
      for (int64_t max_k : {int64_t{0}, int64_t{1}, int64_t{999}, int64_t{8192}, kEnd - 256}) {
        for (int64_t dims : {16, 128, 320, 512}) check_section(kv_heads, slots, max_k, dims);
      }
    }
  }
  return failures == 0 ? 0 : 1;
}
