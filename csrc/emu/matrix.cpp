#include "emu/matrix.h"

#include <cstring>
#include <stdexcept>

#include "emu/block.h"
#include "emu/unchecked.h"

namespace varstream::emu {
namespace {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// --- ldmatrix -----------------------------------------------------------------------------------

struct LoadOperand {
  const uint8_t* row;
  uint32_t* registers;
};

// Rows of one matrix that lie in one 16-byte column of the banks are read one after another.
VARSTREAM_UNCHECKED int bank_conflicts(void* const* operands, int matrix) {
  const uint8_t* rows[8];
  uint32_t columns = 0;
  for (int i = 0; i < 8; ++i) {
    rows[i] = static_cast<LoadOperand*>(operands[8 * matrix + i])->row;
    columns |= 1u << (reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8);
  }
  if (columns == 0xFF) return 0;
  int in_column[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) {
    bool again = false;  // the same row twice is read once
    for (int j = 0; j < i; ++j) again |= rows[j] == rows[i];
    int& here = in_column[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8];
    here += !again;
    most = here > most ? here : most;
  }
  return most - 1;
}

template <bool Transposed>
void load(Block& block, void* const* operands, uint32_t) {
  block.counts().add(Count::kLdmatrix);
  for (int matrix = 0; matrix < 4; ++matrix) {
    block.counts().add(Count::kBankConflict, bank_conflicts(operands, matrix));
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(element[row], static_cast<LoadOperand*>(operands[8 * matrix + row])->row, 16);
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      const uint32_t low = Transposed ? element[minor][major] : element[major][minor];
      const uint32_t high = Transposed ? element[minor + 1][major] : element[major][minor + 1];
      static_cast<LoadOperand*>(operands[lane])->registers[matrix] = low | high << 16;
    }
  }
}

// --- mma ----------------------------------------------------------------------------------------

struct ProductOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Row after row.
struct Fragments {
  uint16_t a[16 * 16], b[16 * 8];
  float d[16 * 8];
};

template <bool Bfloat16>
VARSTREAM_UNCHECKED inline double widen(uint16_t bits) {
  uint32_t word;
  float value;
  if constexpr (Bfloat16) {
    word = uint32_t{bits} << 16;
    std::memcpy(&value, &word, 4);
    return value;
  } else {
    // Exponent and mantissa moved into place; the product corrects the bias, subnormals included.
    word = (bits & 0x7FFFu) << 13;
    std::memcpy(&value, &word, 4);
    value *= 0x1p112f;
    std::memcpy(&word, &value, 4);
    if ((bits & 0x7C00u) == 0x7C00u) word |= 0x7F800000u;
    word |= (bits & 0x8000u) << 16;
    std::memcpy(&value, &word, 4);
    return value;
  }
}

// Four columns: one register where the host has AVX, two elsewhere.
typedef double Four __attribute__((vector_size(32)));

// Products of 16-bit values are exact in double: fused or not, the sum is the same. Four rows at a
// time, as each sum waits for its own last product.
template <bool Bfloat16>
VARSTREAM_UNCHECKED inline __attribute__((always_inline)) void sum_products(Fragments& f) {
  constexpr int kRows = 4;
  alignas(32) double a[16 * 16], b[16 * 8], sums[16 * 8];
  for (int i = 0; i < 16 * 16; ++i) a[i] = widen<Bfloat16>(f.a[i]);
  for (int i = 0; i < 16 * 8; ++i) b[i] = widen<Bfloat16>(f.b[i]);
  for (int i = 0; i < 16 * 8; ++i) sums[i] = f.d[i];
  for (int first = 0; first < 16; first += kRows) {
    Four sum[kRows][2];
    std::memcpy(sum, sums + first * 8, sizeof(sum));
    for (int k = 0; k < 16; ++k) {
      Four terms[2];
      std::memcpy(terms, b + k * 8, sizeof(terms));
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        sum[i][0] += a[(first + i) * 16 + k] * terms[0];
        sum[i][1] += a[(first + i) * 16 + k] * terms[1];
      }
    }
    std::memcpy(sums + first * 8, sum, sizeof(sum));
  }
  for (int i = 0; i < 16 * 8; ++i) f.d[i] = float(sums[i]);
}

template <bool Bfloat16>
VARSTREAM_UNCHECKED void sum_products_here(Fragments& f) {
  sum_products<Bfloat16>(f);
}

#if defined(__x86_64__)
template <bool Bfloat16>
VARSTREAM_UNCHECKED __attribute__((target("avx2,fma"))) void sum_products_avx2(Fragments& f) {
  sum_products<Bfloat16>(f);
}
#endif

template <bool Bfloat16>
void (*fastest())(Fragments&) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return sum_products_avx2<Bfloat16>;
  }
#endif
  return sum_products_here<Bfloat16>;
}

// Where each lane's registers stand in a, b and d: see ptx/mma.cuh.
VARSTREAM_UNCHECKED void gather(Fragments& f, void* const* operands) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto* own = static_cast<ProductOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&f.a[(g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2)], &own->a[i], 4);
    }
    for (int i = 0; i < 2; ++i) {
      f.b[(2 * t + 8 * i) * 8 + g] = uint16_t(own->b[i]);
      f.b[(2 * t + 8 * i + 1) * 8 + g] = uint16_t(own->b[i] >> 16);
      std::memcpy(&f.d[(g + 8 * i) * 8 + 2 * t], &own->d[2 * i], 8);
    }
  }
}

VARSTREAM_UNCHECKED void scatter(const Fragments& f, void* const* operands) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    auto* own = static_cast<ProductOperand*>(operands[lane]);
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&own->d[2 * i], &f.d[(lane / 4 + 8 * i) * 8 + 2 * (lane % 4)], 8);
    }
  }
}

template <bool Bfloat16>
void multiply(Block& block, void* const* operands, uint32_t) {
  static const auto sum = fastest<Bfloat16>();
  block.counts().add(Count::kMma);
  Fragments f;
  gather(f, operands);
  sum(f);
  scatter(f, operands);
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  Block& own_block = block();
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !own_block.shared().holds(row, 16)) {
    throw std::logic_error(describe(own_block.current()) +
                           ": ldmatrix of a row not aligned to 16 bytes or not in shared memory");
  }
  LoadOperand own{static_cast<const uint8_t*>(row), r};
  own_block.collective("ldmatrix", kFullWarp, &own, transposed ? load<true> : load<false>);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  ProductOperand own{d, a, b};
  block().collective("mma", kFullWarp, &own, bfloat16 ? multiply<true> : multiply<false>);
}

}  // namespace varstream::emu
