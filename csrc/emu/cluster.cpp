#include "emu/cluster.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace varstream::emu {

void Cluster::run(const Launch& launch, uint64_t first) {
  size_ = launch.cluster;
  schedule_ = launch.schedule;
  random_ = schedule_.seed * 0x9E3779B97F4A7C15u + ~first;
  turn_ = 0;
  phase_ = arrived_ = 0;
  unfinished_ = int(size_) * launch.threads();
  while (blocks_.size() < size_) blocks_.push_back(std::make_unique<Block>());
  for (uint32_t i = 0; i < size_; ++i) blocks_[i]->start(launch, first + i, *this);
  std::exception_ptr error;
  for (Block* block = next(); block != nullptr && error == nullptr; block = next()) {
    running_block = block;
    block->resume();
    running_block = nullptr;
    error = block->error();
  }
  for (uint32_t i = 0; i < size_; ++i) blocks_[i]->add_counts();
  if (error != nullptr) std::rethrow_exception(error);
  if (unfinished_ > 0) deadlock();
  for (uint32_t i = 0; i < size_; ++i) blocks_[i]->shared().check();
}

// The block to go on with; none when no block can.
Block* Cluster::next() {
  if (schedule_.order == Order::kRandom && size_ > 1) {
    random_ = random_ * 6364136223846793005u + 1;  // congruential: only high bits are used
    turn_ = uint32_t((random_ >> 32) * size_ >> 32);
  }
  for (uint32_t i = 0; i < size_; ++i) {
    const uint32_t number = (turn_ + i) % size_;
    if (!blocks_[number]->can_go_on()) continue;
    turn_ = (number + 1) % size_;
    return blocks_[number].get();
  }
  return nullptr;
}

void Cluster::deadlock() const {
  int waiting = 0;
  for (uint32_t i = 0; i < size_; ++i) waiting += !blocks_[i]->finished();
  std::string text = "deadlock:";
  for (uint32_t i = 0; i < size_; ++i) blocks_[i]->tell_waiting(text, 8 / waiting);
  throw std::runtime_error(text);
}

// --- the barrier --------------------------------------------------------------------------------

void Cluster::arrive(Thread& self) {
  if (self.arrival >= 0) {
    throw std::logic_error(describe(self) +
                           ": arrives at the cluster's barrier twice without waiting");
  }
  self.arrival = phase_;
  ++arrived_;
  complete_if_all_arrived();
}

void Cluster::wait(Thread& self) {
  if (self.arrival < 0) {
    throw std::logic_error(describe(self) +
                           ": waits at the cluster's barrier without having arrived");
  }
  const bool complete = self.arrival < phase_;
  self.arrival = -1;
  if (!complete) self.block->wait_for_cluster();
}

void Cluster::ended(const Thread& self) {
  --unfinished_;
  if (self.arrival == phase_) --arrived_;
  complete_if_all_arrived();
}

void Cluster::complete_if_all_arrived() {
  if (arrived_ == 0 || arrived_ < unfinished_) return;
  arrived_ = 0;
  ++phase_;
  block().counts().add(Count::kClusterBarrier);
  for (uint32_t i = 0; i < size_; ++i) blocks_[i]->wake_from_cluster();
}

// --- peers --------------------------------------------------------------------------------------

Block& Cluster::peer(const Thread& self, uint32_t number) {
  if (number >= size_) {
    throw std::logic_error(describe(self) + ": reads block " + std::to_string(number) +
                           " of a cluster of " + std::to_string(size_));
  }
  if (blocks_[number]->finished()) {
    throw std::logic_error(describe(self) +
                           ": reads the shared memory of a block that has ended, " + "number " +
                           std::to_string(number) + " of its cluster");
  }
  return *blocks_[number];
}

void cluster_arrive() {
  block().cluster().arrive(thread());
}

void cluster_wait() {
  block().cluster().wait(thread());
}

void load_peer(void* to, const void* own, size_t bytes, uint32_t number) {
  if (reinterpret_cast<uintptr_t>(own) % 4 != 0) {
    throw std::logic_error(describe(thread()) + ": load_peer of an address not aligned to 4 bytes");
  }
  const SharedMemory::Place place = block().shared().place_of(own, bytes);
  if (place.array_bytes == 0) {
    throw std::logic_error(describe(thread()) + ": load_peer of something outside shared memory");
  }
  Block& peer = block().cluster().peer(thread(), number);
  // Taken now where the peer has not got so far: unwritten.
  std::memcpy(to, peer.shared().at(place.offset, place.array_bytes) + place.distance, bytes);
}

int& max_cluster_blocks() {
  static int chosen = 8;
  return chosen;
}

}  // namespace varstream::emu
