// Ring 0. CUDA status codes become C++ exceptions; torch shows them as RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace varstream {

// Throws when status reports an error; what says which call or kernel it belongs to.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("varstream: ") + what + ": " + cudaGetErrorName(status) +
                           ": " + cudaGetErrorString(status));
}

// To be called after every launch: catches a bad grid or a kernel missing for this GPU.
inline void check_launch(const char* kernel) {
  check_cuda(cudaGetLastError(), kernel);
}

}  // namespace varstream
