// Ring 0. Where a thread stands in its block and grid.
//
// Kernels ask here instead of reading CUDA's built-in variables, so that a host build can answer
// for them: with VARSTREAM_EMULATED the functions are only declared and whoever runs the kernel on
// the host defines them.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace varstream {

struct Index3 {
  uint32_t x, y, z;
};

#if defined(VARSTREAM_EMULATED)

Index3 thread_index();  // within the block
Index3 block_index();   // within the grid
Index3 block_shape();   // threads
Index3 grid_shape();    // blocks

#elif defined(__CUDACC__)

VARSTREAM_DEVICE Index3 thread_index() {
  return {threadIdx.x, threadIdx.y, threadIdx.z};
}
VARSTREAM_DEVICE Index3 block_index() {
  return {blockIdx.x, blockIdx.y, blockIdx.z};
}
VARSTREAM_DEVICE Index3 block_shape() {
  return {blockDim.x, blockDim.y, blockDim.z};
}
VARSTREAM_DEVICE Index3 grid_shape() {
  return {gridDim.x, gridDim.y, gridDim.z};
}

#endif

}  // namespace varstream
