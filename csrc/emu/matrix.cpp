#include "emu/matrix.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <stdexcept>

#include "emu/block.h"

namespace varstream::emu {
namespace {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

struct LoadOperand {
  const uint8_t* row;
  uint32_t* registers;
};

uint16_t element(void* const* operands, int matrix, int row, int column) {
  const auto* from = static_cast<LoadOperand*>(operands[matrix * 8 + row])->row;
  uint16_t bits;
  std::memcpy(&bits, from + 2 * column, 2);
  return bits;
}

template <bool Transposed>
void load(void* const* operands, uint32_t) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      const uint32_t low = Transposed ? element(operands, matrix, minor, major)
                                      : element(operands, matrix, major, minor);
      const uint32_t high = Transposed ? element(operands, matrix, minor + 1, major)
                                       : element(operands, matrix, major, minor + 1);
      static_cast<LoadOperand*>(operands[lane])->registers[matrix] = low | high << 16;
    }
  }
}

struct ProductOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <bool Bfloat16>
float widen(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  if constexpr (Bfloat16) {
    return __bfloat162float(__nv_bfloat16_raw{bits});
  } else {
    return __half2float(__half_raw{bits});
  }
}

template <bool Bfloat16>
void multiply(void* const* operands, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto* own = static_cast<ProductOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = widen<Bfloat16>(own->a[i], half);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        b[2 * t + half + 8 * i][g] = widen<Bfloat16>(own->b[i], half);
      }
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    auto* own = static_cast<ProductOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = own->d[i];  // products of 16-bit values are exact in double
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[k][column];
      own->d[i] = float(sum);
    }
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    throw std::logic_error(describe(thread()) + ": ldmatrix of a row not aligned to 16 bytes");
  }
  if (thread().lane == 0) ++instruction_counts()["ldmatrix"];
  LoadOperand own{static_cast<const uint8_t*>(row), r};
  block().collective("ldmatrix", kFullWarp, &own, transposed ? load<true> : load<false>);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  if (thread().lane == 0) ++instruction_counts()["mma"];
  ProductOperand own{d, a, b};
  block().collective("mma", kFullWarp, &own, bfloat16 ? multiply<true> : multiply<false>);
}

}  // namespace varstream::emu
