#include "emu/block.h"

#include <atomic>
#include <stdexcept>

#include "emu/cluster.h"
#include "emu/unchecked.h"

namespace varstream::emu {
namespace {

constexpr const char* kCountNames[] = {"ldmatrix",
                                       "mma",
                                       "cp.async",
                                       "shuffle",
                                       "vote",
                                       "barrier",
                                       "ldmatrix bank conflicts",
                                       "cluster barrier",
                                       "global bytes read",
                                       "global bytes written"};
constexpr const char* kAtCluster = "the barrier";
std::atomic<int64_t> totals[int(Count::kNumber)];

}  // namespace

Block* running_block = nullptr;

void throw_nothing_runs() {
  throw std::logic_error("no emulated kernel runs");
}

const std::map<std::string, int64_t> instruction_counts() {
  std::map<std::string, int64_t> counts;
  for (int i = 0; i < int(Count::kNumber); ++i) counts[kCountNames[i]] = totals[i];
  return counts;
}

void reset_instruction_counts() {
  for (auto& total : totals) total = 0;
}

std::string describe(const Thread& thread) {
  const Index3 b = thread.block->index();
  return "block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
         ") warp " + std::to_string(thread.warp) + " lane " + std::to_string(thread.lane);
}

void Block::start(const Launch& launch, uint64_t number, Cluster& cluster) {
  launch_ = launch, cluster_ = &cluster;
  const Index3 grid = launch.grid, shape = launch.shape;
  index_ = {uint32_t(number % grid.x),
            uint32_t(number / grid.x % grid.y),
            uint32_t(number / grid.x / grid.y)};
  random_ = launch.schedule.seed * 0x9E3779B97F4A7C15u + number;
  shared_.reset(launch.shared_bytes);
  live_ = launch.threads();
  finished_ = turn_ = 0;
  error_ = nullptr;
  failed_ = false;
  counts_ = {};
  ready_.fill(live_);
  for (Barrier& barrier : barriers_) barrier = {};
  for (Warp& warp : warps_) warp.under_way = 0;
  for (uint32_t& lanes : at_cluster_) lanes = 0;
  while (int(kept_.size()) < live_) {
    kept_.push_back(std::make_unique<Thread>());
    threads_[kept_.size() - 1] = kept_.back().get();
  }
  for (int i = 0; i < live_; ++i) {
    Thread& t = *threads_[i];
    t.block = this;
    t.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    t.number = i, t.warp = i / kWarpLanes, t.lane = i % kWarpLanes;
    t.copies.clear(), t.groups.clear(), t.open_copies = 0;
    t.arrival = -1;
    t.fiber.start(&Block::enter, &t);
  }
}

void Block::resume() {
  if (!can_go_on()) return;
  shares_ = launch_.cluster > 1 && launch_.schedule.order != Order::kWarpGreedy;
  if (shares_ && launch_.schedule.order == Order::kRandom) {
    // Every other time as far as it goes, so that blocks get ahead of each other.
    random_ = random_ * 6364136223846793005u + 1;
    shares_ = random_ >> 63 == 0;
  }
  host_.switch_to(pick());
}

void Block::add_counts() const {
  for (int i = 0; i < int(Count::kNumber); ++i) totals[i] += counts_.of[i];
}

// Exceptions can't cross from one stack to another: the host's stack rethrows them.
Fiber& Block::enter(void* argument) {
  auto& t = *static_cast<Thread*>(argument);
  Block& self = *t.block;
  try {
    (*self.launch_.kernel)();
    if (!t.copies.empty()) {
      throw std::logic_error(describe(t) + " ended with asynchronous copies it never waited for");
    }
    self.cluster_->ended(t);
  } catch (...) {
    self.error_ = std::current_exception();
    self.failed_ = true;
  }
  ++self.finished_;
  self.ready_.remove(t.warp, t.lane);
  return self.next();
}

// --- who runs next ------------------------------------------------------------------------------

// The thread to go on with; the host after an error, when no thread can run or when it is another
// block's turn.
VARSTREAM_UNCHECKED Fiber& Block::next() {
  if (failed_ || ready_.empty() || (shares_ && turn_is_over())) return host_;
  return pick();
}

// Random: now and then. Round-robin: once each thread had its turn.
VARSTREAM_UNCHECKED bool Block::turn_is_over() {
  if (launch_.schedule.order == Order::kRoundRobin) return ready_.next(turn_) <= current_->number;
  random_ = random_ * 6364136223846793005u + 1;
  return random_ >> 59 == 0;
}

VARSTREAM_UNCHECKED Fiber& Block::pick() {
  const Order order = launch_.schedule.order;
  if (order == Order::kRandom) {
    random_ = random_ * 6364136223846793005u + 1;  // congruential: only high bits are used
    turn_ = int((random_ >> 32) * uint64_t(live_) >> 32);
  }
  const int number = ready_.next(turn_);
  if (order == Order::kRoundRobin) turn_ = (number + 1) % live_;
  // Stay in one warp until all of it waits or is done.
  if (order == Order::kWarpGreedy) turn_ = number / kWarpLanes * kWarpLanes;
  current_ = threads_[number];
  return current_->fiber;
}

VARSTREAM_UNCHECKED void Block::wait(Wait until) {
  Thread& self = *current_;
  self.wait = until;
  ready_.remove(self.warp, self.lane);
  Fiber& to = next();
  if (&to != &self.fiber) self.fiber.switch_to(to);
}

void Block::tell_waiting(std::string& text, int lines) const {
  int told = 0;
  for (int i = 0; i < live_; ++i) {
    const Thread& t = *threads_[i];
    if (t.fiber.finished()) continue;
    // One line for each group of lanes that waits for the same thing.
    const Thread* before = i > 0 ? threads_[i - 1] : nullptr;
    if (before != nullptr && !before->fiber.finished() && before->warp == t.warp &&
        before->wait == t.wait) {
      continue;
    }
    if (++told > lines) {
      text += "\n  ...";
      return;
    }
    text += "\n  " + describe(t) + " waits for " + t.wait.name;
    if (t.wait.name == kAtCluster) {
      text += " of its cluster";
    } else if (t.wait.id < 0) {
      text += " of its warp";
    } else {
      text += " " + std::to_string(t.wait.id) + ", " + std::to_string(t.wait.threads) + " threads";
    }
  }
}

// --- what threads wait for ----------------------------------------------------------------------

void Block::barrier(int id, int count, bool wait_here) {
  const int expected = count > 0 ? count : live_;
  const bool whole = count == 0;
  if (id < 0 || id >= kNamedBarriers || expected > live_ ||
      (!whole && expected % kWarpLanes != 0)) {
    throw std::logic_error(describe(*current_) + ": barrier " + std::to_string(id) + " of " +
                           std::to_string(expected) + " threads is not one the device has");
  }
  Barrier& b = barriers_[id];
  if (b.arrived == 0) b.expected = expected;
  if (b.expected != expected) {
    throw std::logic_error(describe(*current_) + ": barrier " + std::to_string(id) +
                           " was entered with another thread count");
  }
  if (++b.arrived == b.expected) {
    for (int warp = 0; warp < kMaxWarps; ++warp) ready_.add(warp, b.waiting[warp]);
    b = {};
    counts_.add(Count::kBarrier);
    return;
  }
  if (!wait_here) return;
  b.waiting[current_->warp] |= uint32_t{1} << current_->lane;
  wait({"barrier", id, expected});
}

void Block::wait_for_cluster() {
  at_cluster_[current_->warp] |= uint32_t{1} << current_->lane;
  wait({kAtCluster});
}

void Block::wake_from_cluster() {
  for (int warp = 0; warp * kWarpLanes < live_; ++warp) {
    ready_.add(warp, at_cluster_[warp]);
    at_cluster_[warp] = 0;
  }
}

VARSTREAM_UNCHECKED void Block::collective(const char* name,
                                           uint32_t mask,
                                           void* operand,
                                           Compute compute) {
  Thread& self = *current_;
  const uint32_t bit = uint32_t{1} << self.lane;
  if ((mask & bit) == 0) {
    throw std::logic_error(describe(self) + ": " + name + " with a mask that leaves the lane out");
  }
  Warp& warp = warps_[self.warp];
  warp.operands[self.lane] = operand;
  Collective* c = warp.collectives;
  Collective* const end = c + warp.under_way;
  while (c != end && c->mask != mask) ++c;
  if (c == end) *c = {name, compute, mask, 0}, ++warp.under_way;
  if (c->compute != compute) {
    throw std::logic_error(describe(self) + ": " + name + " meets " + c->name +
                           " of other lanes of its warp");
  }
  c->arrived |= bit;
  if (c->arrived != mask) return wait({name, -1, 0});
  *c = warp.collectives[--warp.under_way];
  ready_.add(self.warp, mask);
  compute(*this, warp.operands, mask);
}

}  // namespace varstream::emu
