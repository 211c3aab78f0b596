// Prints where chunk c of row r lies, in chunks from the tile's start: a line `Chunks r c place`.
#include "tile/swizzle.cuh"

#include <cstdio>

namespace {

template <int Chunks>
void print() {
  for (int row = 0; row < 32; ++row) {
    for (int chunk = 0; chunk < Chunks; ++chunk) {
      const int place = row * Chunks + varstream::tile::swizzled<Chunks>(row, chunk);
      std::printf("%d %d %d %d\n", Chunks, row, chunk, place);
    }
  }
}

}  // namespace

int main() {
  print<4>(), print<8>(), print<12>(), print<16>(), print<24>(), print<32>();
}
