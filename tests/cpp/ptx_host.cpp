// Host twins of the matrix instructions behind a C interface, on raw fragments: tests/test_ptx.py
// compares them with independent models. Every function returns -1 where the emulator threw.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <exception>

#include "emu/launch.h"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared_memory.cuh"

namespace vs = varstream;
namespace emu = varstream::emu;
namespace ptx = varstream::ptx;

namespace {

// a (cases, 32 lanes, 4), b (cases, 32, 2), d (cases, 32, 4)
template <typename Element>
void mma(int cases, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = int(vs::thread_index().x);
  for (int i = 0; i < cases; ++i) {
    uint32_t af[4], bf[2];
    float df[4];
    std::memcpy(af, a + (i * 32 + lane) * 4, sizeof(af));
    std::memcpy(bf, b + (i * 32 + lane) * 2, sizeof(bf));
    std::memcpy(df, d + (i * 32 + lane) * 4, sizeof(df));
    ptx::mma_m16n8k16<Element>(df, af, bf);
    std::memcpy(d + (i * 32 + lane) * 4, df, sizeof(df));
  }
}

}  // namespace

extern "C" int run_mma(int bfloat16, int cases, const uint32_t* a, const uint32_t* b, float* d) {
  try {
    emu::launch({1, 1, 1}, {32, 1, 1}, 0, {}, [&] {
      bfloat16 ? mma<__nv_bfloat16>(cases, a, b, d) : mma<__half>(cases, a, b, d);
    });
  } catch (const std::exception&) {
    return -1;
  }
  return 0;
}

// rows (32, 8) of 16-bit values go to byte offsets[row] of shared memory; registers (32 lanes, 4).
// Returns the bank conflicts.
extern "C" int run_ldmatrix(int transposed,
                            int shared_bytes,
                            const uint16_t* rows,
                            const int32_t* offsets,
                            uint32_t* registers) {
  try {
    emu::reset_instruction_counts();
    emu::launch({1, 1, 1}, {32, 1, 1}, size_t(shared_bytes), {}, [&] {
      auto* shared = ptx::shared_array<uint8_t>(0, size_t(shared_bytes));
      const int lane = int(vs::thread_index().x);
      // Rows may share a place: all are written before any is read, as ldmatrix gathers the warp.
      std::memcpy(shared + offsets[lane], rows + lane * 8, 16);
      uint32_t r[4];
      transposed ? ptx::ldmatrix_x4<true>(r, shared + offsets[lane])
                 : ptx::ldmatrix_x4(r, shared + offsets[lane]);
      std::memcpy(registers + lane * 4, r, sizeof(r));
    });
  } catch (const std::exception&) {
    return -1;
  }
  return int(emu::instruction_counts().at("ldmatrix bank conflicts"));
}
