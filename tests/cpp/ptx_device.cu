// Every wrapper of csrc/ptx in a kernel, compiled for the device by tests/test_ptx.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/global.cuh"
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
    x = ptx::rounded_product(x, x) + x;
    if (tid < 64) {
      ptx::barrier_arrive(1, kThreads);
    } else {
      ptx::barrier_sync(1, kThreads);
    }
    x += static_cast<float>(ptx::add_shared(slots, 1));
    ptx::add_atomic(ptx::settled(p.to) + tid, x + static_cast<float>(blocks));
    if (ptx::adds_four_at_once<true>()) x += 1;
    ptx::add_atomic_4(p.to + 4 * tid, d[0], d[1], d[2], d[3]);
  }
};

// The sum over a cluster of each thread's word, in words of every size.
struct ClusterSum {
  struct Params {
    uint4* words;
    uint32_t cluster;
  };
  struct Pair {
    float a, b;
  };
  static constexpr int kThreads = 128, kMinBlocks = 2;

  static VARSTREAM_DEVICE void run(const Params& p) {
    auto* shared = ptx::shared_array<Pair>(0, kThreads * sizeof(Pair));
    const uint32_t tid = vs::thread_index().x, place = vs::block_index().x * kThreads + tid;
    const uint4 x = ptx::load_global(p.words + place);
    shared[tid] = {static_cast<float>(x.x ^ x.y), static_cast<float>(x.z ^ x.w)};
    ptx::cluster_arrive();
    ptx::cluster_wait();
    float sum = 0;
    for (uint32_t block = 0; block < p.cluster; ++block) {
      const Pair pair = ptx::load_peer(shared + tid, block);
      sum += pair.a * pair.b;
    }
    ptx::cluster_arrive();
    const auto bits = static_cast<uint32_t>(sum);
    ptx::store_global(p.words + place, uint4{bits, bits, bits, bits});
    auto* pairs = reinterpret_cast<uint2*>(p.words + place);
    ptx::store_global(pairs, ptx::load_global(pairs + 1));
    auto* singles = reinterpret_cast<uint32_t*>(p.words + place);
    ptx::store_global(singles, ptx::load_global(singles + 1));
    auto* halves = reinterpret_cast<__half*>(p.words + place);
    ptx::store_global(halves, ptx::load_global(halves + 1));
    ptx::cluster_wait();
  }
};

void launch_cluster_sum(const ClusterSum::Params& params, void* stream) {
  ptx::launch<ClusterSum>(
      "cluster sum", 8, 1 << 10, params, stream, ptx::max_cluster_blocks<ClusterSum>());
}

// More than 48 KiB: launch asks for it.
void launch_everything(const Everything::Params& params, void* stream) {
  ptx::launch<Everything>("everything", 8, size_t{64} << 10, params, stream);
}
