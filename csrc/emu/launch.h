// Host emulation. Runs a kernel over a grid, cluster after cluster.
#pragma once

#include <functional>

#include "emu/block.h"

namespace varstream::emu {

// Runs body (a kernel bound to its parameters) for every thread of every block; clusters (of
// `cluster` blocks, neighbours along x) run one after another, in a random order under a random
// schedule, and the blocks of one in turns. Throws what a thread threw, or a deadlock.
void launch(Index3 grid,
            Index3 shape,
            size_t shared_bytes,
            Schedule schedule,
            const std::function<void()>& body,
            uint32_t cluster = 1);

// The order in which kernels launched through ptx::launch run; whoever tests sets it.
Schedule& schedule();

// Shared memory a block may ask for, as the emulated device has it; 163 KB (sm_80) unless set.
size_t& max_shared_bytes();

}  // namespace varstream::emu
