#include "emu/block.h"

#include <algorithm>
#include <stdexcept>

namespace varstream::emu {
namespace {

thread_local Block* running = nullptr;
std::map<std::string, int64_t> counters;

}  // namespace

Block& block() {
  if (running == nullptr) throw std::logic_error("no emulated kernel runs on this thread");
  return *running;
}

Thread& thread() {
  return block().current();
}

std::map<std::string, int64_t>& instruction_counts() {
  return counters;
}

std::string describe(const Thread& thread) {
  const Index3 b = thread.block->index();
  return "block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
         ") warp " + std::to_string(thread.warp) + " lane " + std::to_string(thread.lane);
}

void Block::run(Index3 grid,
                Index3 shape,
                Index3 index,
                size_t shared_bytes,
                Schedule schedule,
                const std::function<void()>& kernel) {
  grid_ = grid, shape_ = shape, index_ = index, kernel_ = &kernel, schedule_ = schedule;
  const uint64_t number = index.x + uint64_t{grid.x} * (index.y + uint64_t{grid.y} * index.z);
  random_.seed(schedule.seed * 0x9E3779B97F4A7C15u + number);
  shared_.reset(shared_bytes);
  live_ = size_t{shape.x} * shape.y * shape.z;
  while (threads_.size() < live_) threads_.push_back(std::make_unique<Thread>());
  for (Barrier& barrier : barriers_) barrier = {};
  collectives_.assign((live_ + kWarpLanes - 1) / kWarpLanes, {});
  error_ = nullptr;
  warp_turn_ = thread_turn_ = 0;
  for (size_t i = 0; i < live_; ++i) {
    Thread& t = *threads_[i];
    t.block = this;
    t.index = {
        uint32_t(i % shape.x), uint32_t(i / shape.x % shape.y), uint32_t(i / shape.x / shape.y)};
    t.warp = int(i / kWarpLanes), t.lane = int(i % kWarpLanes);
    t.waits_for.clear();
    t.groups.clear(), t.open_group.clear();
    t.fiber.start(&Block::enter, &t);
  }
  running = this;
  size_t finished = 0;
  while (finished < live_ && error_ == nullptr) {
    current_ = next();
    if (current_ == nullptr) {
      running = nullptr;
      deadlock();
    }
    current_->fiber.resume();
    finished += current_->fiber.finished();
  }
  running = nullptr;
  if (error_ != nullptr) std::rethrow_exception(error_);
  shared_.check();
}

// Exceptions can't cross from one stack to another: the scheduler rethrows them.
void Block::enter(void* argument) {
  auto& t = *static_cast<Thread*>(argument);
  try {
    (*t.block->kernel_)();
    if (!t.groups.empty() || !t.open_group.empty()) {
      throw std::logic_error(describe(t) + " ended with asynchronous copies it never waited for");
    }
  } catch (...) {
    t.block->error_ = std::current_exception();
  }
}

// --- who runs next ------------------------------------------------------------------------------

Thread* Block::next_in(size_t begin, size_t end, size_t& turn) {
  for (size_t step = 0; step < end - begin; ++step) {
    const size_t i = begin + (turn + step) % (end - begin);
    if (!threads_[i]->runnable()) continue;
    turn = i - begin + 1;
    return threads_[i].get();
  }
  return nullptr;
}

Thread* Block::next() {
  if (schedule_.order == Order::kRoundRobin) return next_in(0, live_, thread_turn_);
  if (schedule_.order == Order::kRandom) {
    size_t from = random_() % live_;
    return next_in(0, live_, from);
  }
  // Stay in one warp until all of it waits or is done.
  const size_t warps = collectives_.size();
  for (size_t step = 0; step < warps; ++step) {
    const size_t warp = (warp_turn_ + step) % warps;
    const size_t begin = warp * kWarpLanes, end = std::min(live_, begin + kWarpLanes);
    size_t turn = 0;
    if (Thread* t = next_in(begin, end, turn)) {
      warp_turn_ = warp;
      return t;
    }
  }
  return nullptr;
}

void Block::wait(std::string what) {
  current_->waits_for = std::move(what);
  Thread& self = *current_;
  self.fiber.pause();
}

void Block::deadlock() const {
  std::string text = "deadlock:";
  int told = 0;
  for (size_t i = 0; i < live_; ++i) {
    const Thread& t = *threads_[i];
    if (t.fiber.finished()) continue;
    // One line for each group of lanes that waits for the same thing.
    if (i > 0 && threads_[i - 1]->warp == t.warp && threads_[i - 1]->waits_for == t.waits_for) {
      continue;
    }
    if (++told > 8) throw std::runtime_error(text + "\n  ...");
    text += "\n  " + describe(t) + " waits for " + t.waits_for;
  }
  throw std::runtime_error(text);
}

// --- what threads wait for ----------------------------------------------------------------------

void Block::barrier(int id, int count, bool wait_here) {
  const int expected = count > 0 ? count : int(live_);
  const bool whole = count == 0;
  if (id < 0 || id >= kNamedBarriers || expected > int(live_) ||
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
    for (Thread* t : b.waiting) t->waits_for.clear();
    b = {};
    return;
  }
  if (!wait_here) return;
  b.waiting.push_back(current_);
  wait("barrier " + std::to_string(id) + ", " + std::to_string(expected) + " threads");
}

void Block::collective(const char* name, uint32_t mask, void* operand, Compute compute) {
  Thread& self = *current_;
  const uint32_t bit = uint32_t{1} << self.lane;
  if ((mask & bit) == 0) {
    throw std::logic_error(describe(self) + ": " + name + " with a mask that leaves the lane out");
  }
  auto& under_way = collectives_[self.warp];
  auto c = std::find_if(under_way.begin(), under_way.end(), [&](const Collective& other) {
    return other.mask == mask;
  });
  if (c == under_way.end()) c = under_way.insert(c, {name, mask, 0, compute, {}});
  if (c->compute != compute) {
    throw std::logic_error(describe(self) + ": " + name + " meets " + c->name +
                           " of other lanes of its warp");
  }
  c->arrived |= bit;
  c->operands[self.lane] = operand;
  if (c->arrived != mask) return wait(std::string(name) + " of its warp");
  const Collective done = *c;
  under_way.erase(c);
  const size_t begin = size_t(self.warp) * kWarpLanes;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (mask >> lane & 1) threads_[begin + lane]->waits_for.clear();
  }
  done.compute(done.operands, mask);
}

}  // namespace varstream::emu
