// Host emulation. A block's shared memory: filled with 0xFF before each block, so that whatever is
// read before it is written is a NaN or a wild index; its arrays stand apart, between guard gaps
// that AddressSanitizer watches and that are checked at the end without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace varstream::emu {

class SharedMemory {
 public:
  // A fresh block: the launch asked for capacity bytes.
  void reset(size_t capacity);

  // The array at `offset` of the device's layout, the same for every thread of the block.
  uint8_t* at(size_t offset, size_t bytes);

  // Whether these bytes lie in shared memory, gaps included.
  bool holds(const void* at, size_t bytes) const {
    const auto* first = static_cast<const uint8_t*>(at);
    return first >= memory_.data() && first + bytes <= memory_.data() + memory_.size();
  }

  // The array that holds these bytes, by the numbers that `at` takes, and where in it they start;
  // array_bytes 0: none does.
  struct Place {
    size_t offset, array_bytes, distance;
  };
  Place place_of(const void* at, size_t bytes) const;

  // Throws if a guard gap was written.
  void check();

  // What an asynchronous copy will deliver later is unwritten until then.
  static void poison(void* at, size_t bytes);

 private:
  struct Array {
    size_t offset, bytes;  // in the layout of the device
    size_t place;          // in memory_, behind a gap
  };
  static constexpr size_t kGapBytes = 256;
  static constexpr size_t kAlignment = 1024;  // as the widest swizzles want

  size_t capacity_ = 0;
  std::vector<uint8_t> memory_;
  std::vector<Array> arrays_;
};

}  // namespace varstream::emu
