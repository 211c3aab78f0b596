// Ring 1. Launching a kernel: on the device, or on the host's emulator with the same arguments.
//
// A kernel is a struct with `Params` (plain data), `kThreads`, `kMinBlocks` (per SM, what the
// compiler limits registers for) and `static void run(const Params&)`, a VARSTREAM_DEVICE function.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"
#include "common/thread.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/cluster.h"
#include "emu/launch.h"
#else
#include "common/check_cuda.h"
#endif

namespace varstream::ptx {

#if !defined(VARSTREAM_EMULATED)

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Shared memory beyond this must be asked for, kernel by kernel.
inline constexpr size_t kSharedWithoutAsking = 48 << 10;

#endif

// Shared memory that a block of the current device can ask for.
inline size_t max_shared_bytes() {
#if defined(VARSTREAM_EMULATED)
  return emu::max_shared_bytes();
#else
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
#endif
}

// Blocks that a cluster of Kernel may have on the current device, 1 without clusters. The code that
// runs there decides: a build for an older architecture, compiled again by the driver, knows none.
template <typename Kernel>
uint32_t max_cluster_blocks() {
#if defined(VARSTREAM_EMULATED)
  return static_cast<uint32_t>(emu::max_cluster_blocks());
#else
  constexpr uint32_t kPortable = 8;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, entry<Kernel>), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90 ? kPortable : 1;
#endif
}

// Runs blocks of Kernel::kThreads threads on stream (a cudaStream_t of the current device; ignored
// when emulated), in clusters of `cluster` neighbours, which divides `blocks` and is at most
// max_cluster_blocks. Throws std::runtime_error where the launch is refused.
template <typename Kernel>
void launch(const char* name,
            uint32_t blocks,
            size_t shared_bytes,
            const typename Kernel::Params& params,
            void* stream,
            uint32_t cluster = 1) {
  if (blocks == 0) return;
#if defined(VARSTREAM_EMULATED)
  static_cast<void>(name), static_cast<void>(stream);
  emu::launch(
      {blocks, 1, 1},
      {Kernel::kThreads, 1, 1},
      shared_bytes,
      emu::schedule(),
      [&] { Kernel::run(params); },
      cluster);
#else
  if (shared_bytes > kSharedWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(entry<Kernel>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               name);
  }
  if (cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    const cudaLaunchConfig_t config{dim3(blocks),
                                    dim3(Kernel::kThreads),
                                    shared_bytes,
                                    static_cast<cudaStream_t>(stream),
                                    &attribute,
                                    1};
    return check_cuda(cudaLaunchKernelEx(&config, entry<Kernel>, params), name);
  }
  entry<Kernel>
      <<<blocks, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(name);
#endif
}

}  // namespace varstream::ptx
