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
  using Entry = void (*)(void* argument);

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares the fiber to run entry(argument) when first resumed; the stack is reused.
  void start(Entry entry, void* argument);

  // Called on the scheduler's stack: runs the fiber until it pauses or returns.
  void resume();

  // Called on the fiber's stack: returns from the scheduler's resume().
  void pause();

  bool finished() const { return finished_; }

 private:
  static void enter(Fiber* self);

  uint8_t* stack_ = nullptr;   // mapped, with an inaccessible page below
  void* own_ = nullptr;        // saved stack pointer of the fiber
  void* scheduler_ = nullptr;  // saved stack pointer of whoever resumed it
  void* own_fake_ = nullptr;   // AddressSanitizer's handle of the stack
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
};

}  // namespace varstream::emu
