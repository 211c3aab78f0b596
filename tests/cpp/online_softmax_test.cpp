// The online softmax of one warp over many tiles of keys, compiled with fused multiply-adds as the
// device's compiler makes them: prints, for each case, its name, the LSE (log2 units) and the exact
// one. Built by tests/test_online_softmax.py.
#include "tile/online_softmax.cuh"

#include <cmath>
#include <cstdio>
#include <vector>

#include "emu/launch.h"

namespace vs = varstream;
namespace tile = varstream::tile;

constexpr int kColumns = 2;  // accumulators of 8 keys: 16 keys a tile
constexpr float kUnit = 0.18033688f;

// Score of every key of tile `number` of `tiles`.
using Score = float (*)(int number, int tiles, float size);

float constant(int, int, float size) {
  return size;
}
float rising(int number, int tiles, float size) {
  return size * static_cast<float>(number) / static_cast<float>(tiles);
}
float falling(int number, int tiles, float size) {
  return rising(tiles - number, tiles, size);
}
// The largest score once, at the start; the rest a little below it.
float early(int number, int, float size) {
  return number == 0 ? size : size - 3.0f;
}

float lse_of(Score score, int tiles, float size) {
  float found[32];
  vs::emu::launch({1, 1, 1}, {32, 1, 1}, 0, vs::emu::schedule(), [&] {
    tile::OnlineSoftmax<1> softmax;
    softmax.reset();
    tile::Accumulator<1, 1> out = {};
    for (int number = 0; number < tiles; ++number) {
      tile::Accumulator<1, kColumns> scores;
      for (auto& column : scores[0]) {
        for (float& value : column) value = score(number, tiles, size);
      }
      softmax.update(scores, out, kUnit);
    }
    const auto result =
        tile::finish_row(softmax.top[0][0], softmax.row_total(0, 0), tile::minus_infinity());
    found[vs::thread_index().x] = result.log2_total;
  });
  for (float value : found) {
    if (value != found[0]) return NAN;  // every row is the same
  }
  return found[0];
}

double exact(Score score, int tiles, float size) {
  double top = -INFINITY, total = 0.0;
  for (int i = 0; i < tiles; ++i) top = std::fmax(top, double{score(i, tiles, size)} * kUnit);
  for (int i = 0; i < tiles; ++i) {
    total += 8 * kColumns * std::exp2(double{score(i, tiles, size)} * kUnit - top);
  }
  return top + std::log2(total);
}

int main() {
  struct Case {
    const char* name;
    Score score;
  };
  const Case cases[] = {
      {"constant", constant}, {"rising", rising}, {"falling", falling}, {"early", early}};
  for (const Case& c : cases) {
    for (float size : {1.0f, 77.7f, -77.7f, 5001.3f, -5001.3f, 81237.0f}) {
      const int tiles = 300;
      std::printf("%s %.9g %.17g\n",
                  c.name,
                  double{lse_of(c.score, tiles, size)},
                  exact(c.score, tiles, size));
    }
  }
}
