// Every wrapper of csrc/ptx in a kernel, compiled for the device by tests/test_ptx.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/launch.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"

namespace vs = varstream;
namespace ptx = varstream::ptx;

struct Everything {
  struct Params {
    const uint4* from;
    float* to;
    int n;
  };
  static constexpr int kThreads = 128, kMinBlocks = 2;

  static VARSTREAM_DEVICE void run(const Params& p) {
    constexpr size_t kBytes = kThreads * sizeof(uint4);
    auto* shared = ptx::shared_array<uint4>(0, kBytes);
    auto* slots = ptx::shared_array<int32_t>(kBytes, 4);
    const int tid = ptx::opaque(static_cast<int>(vs::thread_index().x));
    const auto blocks = vs::grid_shape().x * vs::block_shape().x + vs::block_index().x;

    ptx::cp_async_16(shared + tid, p.from + tid, tid < p.n);
    ptx::cp_async_8(shared + tid, p.from + tid, tid < p.n);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    ptx::cp_async_wait<0>();
    ptx::sync_block();

    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, shared + tid);
    ptx::ldmatrix_x4<true>(b, shared + tid % 32);
    float d[4] = {};
    ptx::mma_m16n8k16<__nv_bfloat16>(d, a, {b[0], b[1]});
    ptx::mma_m16n8k16<__half>(d, a, {b[2], b[3]});

    float x = ptx::shuffle_xor(d[0], 1) + ptx::shuffle_down(d[1], 2) + ptx::shuffle(d[2], 3);
    const uint32_t votes = ptx::ballot(x > 0);
    if (ptx::any(x > 1) && !ptx::all(x > 2)) x += static_cast<float>(votes);
    ptx::sync_warp();
    x = ptx::exp2_approx(x) + ptx::log2_approx(x) + ptx::reciprocal_approx(x);
    if (tid < 64) {
      ptx::barrier_arrive(1, kThreads);
    } else {
      ptx::barrier_sync(1, kThreads);
    }
    x += static_cast<float>(ptx::add_shared(slots, 1));
    ptx::add_atomic(p.to + tid, x + static_cast<float>(blocks));
    if (ptx::adds_four_at_once<true>()) x += 1;
    ptx::add_atomic_4(p.to + 4 * tid, d[0], d[1], d[2], d[3]);
  }
};

// More than 48 KiB: launch asks for it.
void launch_everything(const Everything::Params& params, void* stream) {
  ptx::launch<Everything>("everything", 8, size_t{64} << 10, params, stream);
}
