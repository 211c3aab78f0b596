// Ring 2. Launches the row copy kernel; declared without CUDA headers so bindings stay light.
#pragma once

#include <cstdint>

#include "varlen/row_copy_params.h"

namespace varstream::varlen {

// Names of the kernels this file launches, for build information.
inline constexpr const char* kRowCopyKernels[] = {"gather_rows", "scatter_rows"};

// Copies n rows of row_bytes bytes by index on stream (a cudaStream_t of the current device), with
// the widest word that row size and addresses allow. Throws std::runtime_error on a launch error.
void launch_row_copy(RowCopy kind,
                     const void* src,
                     void* dst,
                     const int64_t* indices,
                     int64_t n,
                     int64_t rows,
                     int64_t row_bytes,
                     void* stream);

}  // namespace varstream::varlen
