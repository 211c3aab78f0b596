// Host emulation. A cluster: up to eight blocks that run in turns, share a barrier and read each
// other's shared memory. A block outside any cluster is alone in one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emu/block.h"

namespace varstream::emu {

class Cluster {
 public:
  // Runs the blocks `first` to `first` + launch.cluster - 1 of the grid; throws what a thread
  // threw, or a deadlock.
  void run(const Launch& launch, uint64_t first);

  // --- called from threads ---

  void arrive(Thread& self);
  void wait(Thread& self);
  // The thread has no more to do: it counts as arrived from now on.
  void ended(const Thread& self);
  Block& peer(const Thread& self, uint32_t number);

 private:
  Block* next();
  void complete_if_all_arrived();
  [[noreturn]] void deadlock() const;

  std::vector<std::unique_ptr<Block>> blocks_;  // of earlier clusters too, for their stacks
  uint32_t size_ = 0;
  uint32_t turn_ = 0;  // the block where the search for the next one starts
  Schedule schedule_;
  uint64_t random_ = 0;
  // The barrier. Its phase says how often it was complete.
  int64_t phase_ = 0;
  int unfinished_ = 0;  // threads that have not ended
  int arrived_ = 0;     // those of them that have arrived in this phase
};

void cluster_arrive();
void cluster_wait();
// What stands at own's place in the shared memory of the cluster's block number `number`.
void load_peer(void* to, const void* own, size_t bytes, uint32_t number);

// Blocks a cluster may have, as the emulated device has it; 8 (sm_90) unless set.
int& max_cluster_blocks();

}  // namespace varstream::emu
