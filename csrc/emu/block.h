// Host emulation. One thread block: its threads as fibers, what they wait for, and who runs next.
//
// A thread runs until it waits (barrier, warp collective) or ends, so the schedule is exactly the
// order in which waiting threads are resumed. Warp-greedy order lets one warp run as far ahead as
// synchronisation allows, which is what exposes a missing barrier; random order finds the rest.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/thread.h"
#include "emu/fiber.h"
#include "emu/shared_memory.h"

namespace varstream::emu {

inline constexpr int kWarpLanes = 32;
inline constexpr int kNamedBarriers = 16;

enum class Order { kWarpGreedy, kRoundRobin, kRandom };

struct Schedule {
  Order order = Order::kWarpGreedy;
  uint64_t seed = 0;  // of kRandom
};

class Block;

// A copy from global to shared memory that has been issued and not delivered.
struct PendingCopy {
  uint8_t* dst;
  const uint8_t* src;
  int dst_bytes;
  int src_bytes;  // the rest of dst is zeroed
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Index3 index{};
  int warp = 0;
  int lane = 0;
  std::string waits_for;                         // empty: runnable
  std::vector<std::vector<PendingCopy>> groups;  // oldest first
  std::vector<PendingCopy> open_group;

  bool runnable() const { return !fiber.finished() && waits_for.empty(); }
};

class Block {
 public:
  // Runs kernel once for each thread of the block; throws what a thread threw, or a deadlock.
  void run(Index3 grid,
           Index3 shape,
           Index3 block,
           size_t shared_bytes,
           Schedule schedule,
           const std::function<void()>& kernel);

  // --- called from threads ---

  // Waits at named barrier id until `count` threads have arrived; 0: the whole block.
  void barrier(int id, int count, bool wait);

  using Compute = void (*)(void* const* operands, uint32_t mask);
  // All lanes of mask bring an operand; the last one computes for all of them.
  void collective(const char* name, uint32_t mask, void* operand, Compute compute);

  SharedMemory& shared() { return shared_; }
  Index3 grid() const { return grid_; }
  Index3 shape() const { return shape_; }
  Index3 index() const { return index_; }
  Thread& current() { return *current_; }

 private:
  struct Barrier {
    int arrived = 0;
    int expected = 0;
    std::vector<Thread*> waiting;
  };
  struct Collective {
    const char* name = nullptr;
    uint32_t mask = 0;
    uint32_t arrived = 0;
    Compute compute = nullptr;
    void* operands[kWarpLanes] = {};
  };

  static void enter(void* thread);
  Thread* next();
  Thread* next_in(size_t begin, size_t end, size_t& turn);
  void wait(std::string what);
  [[noreturn]] void deadlock() const;

  Index3 grid_{}, shape_{}, index_{};
  Schedule schedule_;
  std::mt19937_64 random_;
  SharedMemory shared_;
  std::vector<std::unique_ptr<Thread>> threads_;
  size_t live_ = 0;  // threads of this block; more may be kept for their stacks
  size_t warp_turn_ = 0, thread_turn_ = 0;
  Thread* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  Barrier barriers_[kNamedBarriers];
  std::vector<std::vector<Collective>> collectives_;  // under way, by warp
  std::exception_ptr error_;
};

// The block and thread that run on this host thread; only while a kernel runs.
Block& block();
Thread& thread();

// How often each instruction wrapper ran, over all blocks; whoever reads it clears it.
std::map<std::string, int64_t>& instruction_counts();

std::string describe(const Thread& thread);

}  // namespace varstream::emu
