#include "emu/launch.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "emu/cluster.h"

namespace varstream {

Index3 thread_index() {
  return emu::thread().index;
}
Index3 block_index() {
  return emu::block().index();
}
Index3 block_shape() {
  return emu::block().shape();
}
Index3 grid_shape() {
  return emu::block().grid();
}

namespace emu {

void launch(Index3 grid,
            Index3 shape,
            size_t shared_bytes,
            Schedule schedule,
            const std::function<void()>& body,
            uint32_t cluster) {
  if (uint64_t{shape.x} * shape.y * shape.z > 1024 || grid.y > 65535 || grid.z > 65535) {
    throw std::invalid_argument("emulated launch: a shape the device refuses");
  }
  if (cluster == 0 || cluster > uint32_t(max_cluster_blocks()) || grid.x % cluster != 0) {
    throw std::invalid_argument("emulated launch: a cluster the device refuses");
  }
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z / cluster);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kRandom) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(schedule.seed));
  }
  // One kernel at a time, whichever host threads launch.
  static std::mutex turn;
  const std::lock_guard<std::mutex> lock(turn);
  static Cluster blocks;  // keeps the fibers' stacks
  const Launch common{grid, shape, cluster, shared_bytes, schedule, &body};
  for (uint64_t i : order) blocks.run(common, i * cluster);
}

size_t& max_shared_bytes() {
  static size_t chosen = size_t{163} << 10;
  return chosen;
}

Schedule& schedule() {
  static Schedule chosen;
  return chosen;
}

}  // namespace emu
}  // namespace varstream
