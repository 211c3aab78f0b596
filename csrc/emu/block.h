// Host emulation. One thread block: its threads as fibers, what they wait for, and who runs next.
//
// A thread runs until it waits (barrier, warp collective) or ends, so the schedule is exactly the
// order in which waiting threads are resumed. Warp-greedy order lets one warp run as far ahead as
// synchronisation allows, which is what exposes a missing barrier; random order finds the rest.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/thread.h"
#include "emu/counts.h"
#include "emu/fiber.h"
#include "emu/ready_set.h"
#include "emu/shared_memory.h"
#include "emu/unchecked.h"

namespace varstream::emu {

inline constexpr int kNamedBarriers = 16;

enum class Order { kWarpGreedy, kRoundRobin, kRandom };

struct Schedule {
  Order order = Order::kWarpGreedy;
  uint64_t seed = 0;  // of kRandom
};

class Block;
class Cluster;

// What the blocks of a launch have in common.
struct Launch {
  Index3 grid, shape;
  uint32_t cluster;  // blocks, neighbours along x
  size_t shared_bytes;
  Schedule schedule;
  const std::function<void()>* kernel;  // bound to its parameters, for each thread

  int threads() const { return int(shape.x * shape.y * shape.z); }
};

// A copy from global to shared memory that has been issued and not delivered.
struct PendingCopy {
  uint8_t* dst;
  const uint8_t* src;
  int dst_bytes;
  int src_bytes;  // the rest of dst is zeroed
};

// What a thread waits for: a barrier of its block, or by name what has no number.
struct Wait {
  const char* name = "";
  int id = -1;
  int threads = 0;

  bool operator==(const Wait& o) const {
    return name == o.name && id == o.id && threads == o.threads;
  }
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Index3 index{};
  int number = 0;  // within the block
  int warp = 0;
  int lane = 0;
  Wait wait;                        // until what, if it can't run
  std::vector<PendingCopy> copies;  // issued and not delivered, oldest first
  std::vector<size_t> groups;       // copies in each closed group, oldest first
  size_t open_copies = 0;           // those no group holds yet
  int64_t arrival = -1;  // phase of the cluster's barrier it arrived in and not waited for
};

class Block {
 public:
  // Makes a fresh block of it, number `number` of the grid.
  void start(const Launch& launch, uint64_t number, Cluster& cluster);
  // Runs threads until none can go on or one failed; where others share the cluster, a schedule
  // other than warp-greedy stops before that.
  void resume();
  bool can_go_on() const { return !ready_.empty(); }
  bool finished() const { return finished_ == live_; }
  std::exception_ptr error() const { return error_; }  // what a thread threw
  // Appends what threads wait for, a line for each group of lanes, up to `lines`.
  void tell_waiting(std::string& text, int lines) const;
  void add_counts() const;  // to those of all launches

  // --- called from threads ---

  // Waits at named barrier id until `count` threads have arrived; 0: the whole block.
  void barrier(int id, int count, bool wait);

  using Compute = void (*)(Block& block, void* const* operands, uint32_t mask);
  // All lanes of mask bring an operand; the last one computes for all of them.
  void collective(const char* name, uint32_t mask, void* operand, Compute compute);

  void wait_for_cluster();
  void wake_from_cluster();

  SharedMemory& shared() { return shared_; }
  Cluster& cluster() { return *cluster_; }
  Index3 grid() const { return launch_.grid; }
  Index3 shape() const { return launch_.shape; }
  Index3 index() const { return index_; }
  VARSTREAM_UNCHECKED Thread& current() { return *current_; }
  Counts& counts() { return counts_; }

 private:
  struct Barrier {
    int arrived = 0;
    int expected = 0;
    uint32_t waiting[kMaxWarps] = {};  // lanes
  };
  // One that some lanes have not reached yet. Diverged lanes may be in several.
  struct Collective {
    const char* name;
    Compute compute;
    uint32_t mask;
    uint32_t arrived;
  };
  struct Warp {
    int under_way = 0;
    Collective collectives[kWarpLanes];
    void* operands[kWarpLanes];
  };

  static Fiber& enter(void* thread);
  Fiber& next();
  Fiber& pick();
  bool turn_is_over();
  void wait(Wait until);

  Launch launch_{};
  Index3 index_{};
  Cluster* cluster_ = nullptr;
  uint64_t random_ = 0;
  SharedMemory shared_;
  std::vector<std::unique_ptr<Thread>> kept_;  // of earlier blocks too, for their stacks
  Thread* threads_[kMaxWarps * kWarpLanes] = {};
  int live_ = 0;
  int finished_ = 0;
  bool shares_ = false;  // leaves some of its turn to the cluster's other blocks
  int turn_ = 0;         // the thread where the search for the next one starts
  ReadySet ready_;
  Fiber host_;  // whoever launched
  Thread* current_ = nullptr;
  Barrier barriers_[kNamedBarriers];
  uint32_t at_cluster_[kMaxWarps] = {};  // lanes that wait for the cluster's barrier
  Warp warps_[kMaxWarps];
  Counts counts_;
  std::exception_ptr error_;
  bool failed_ = false;
};

// The block that runs in this process: launches take turns (a thread-local one would cost a call
// each time a wrapper asks).
extern Block* running_block;
[[noreturn]] void throw_nothing_runs();

// The block and thread that run; only while a kernel runs.
VARSTREAM_UNCHECKED inline Block& block() {
  if (running_block == nullptr) throw_nothing_runs();
  return *running_block;
}
VARSTREAM_UNCHECKED inline Thread& thread() {
  return block().current();
}

std::string describe(const Thread& thread);

}  // namespace varstream::emu
