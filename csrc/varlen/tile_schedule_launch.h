// Ring 2. Launches the tile schedule kernel; declared without CUDA headers so bindings stay light.
#pragma once

#include "varlen/tile_schedule_params.h"

namespace varstream::varlen {

// Names of the kernels this file launches, for build information.
inline constexpr const char* kTileScheduleKernels[] = {"tile_schedule"};

// Fills params.tiles on stream (a cudaStream_t of the current device). Throws std::runtime_error on
// a launch error.
void launch_tile_schedule(const TileScheduleParams& params, void* stream);

}  // namespace varstream::varlen
