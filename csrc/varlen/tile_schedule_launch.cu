// Ring 2. The one launch of the tile schedule kernel.
#include "ptx/launch.cuh"
#include "varlen/tile_schedule_kernel.cuh"
#include "varlen/tile_schedule_launch.h"

namespace varstream::varlen {

void launch_tile_schedule(const TileScheduleParams& params, void* stream) {
  ptx::launch<TileSchedule>(kTileScheduleKernels[0], 1, TileSchedule::kSharedBytes, params, stream);
}

}  // namespace varstream::varlen
