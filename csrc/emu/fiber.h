// Host emulation. Stackful fibers: one for each emulated thread, switched in a few nanoseconds.
//
// A switch saves only what the platform's calling convention asks a function to preserve. With
// AddressSanitizer it tells the sanitizer which stack it is on, so overflows of locals are found
// inside fibers too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace varstream::emu {

inline constexpr size_t kFiberStackBytes = 256 << 10;

class Fiber {
 public:
  // Runs on the fiber's stack; returns the fiber that goes on after it.
  using Entry = Fiber& (*)(void* argument);

  // A fiber that was never started stands for the host's own stack.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares the fiber to run entry(argument) when first switched to; the stack is reused.
  void start(Entry entry, void* argument);

  // Called on this fiber's stack; returns when another one switches back.
  void switch_to(Fiber& other);

  bool finished() const { return finished_; }

 private:
  static void enter(Fiber* self);
  void arrived();

  uint8_t* stack_ = nullptr;  // mapped, with an inaccessible page below
  size_t first_byte_ = 0;     // where frames start, going down
  void* own_ = nullptr;       // saved stack pointer
  Fiber* previous_ = nullptr;
  // AddressSanitizer's: a handle, and which stack this is.
  void* own_fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = false;
};

}  // namespace varstream::emu
