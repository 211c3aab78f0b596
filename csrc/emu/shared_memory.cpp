#include "emu/shared_memory.h"

#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define VARSTREAM_POISON(at, bytes) __asan_poison_memory_region(at, bytes)
#define VARSTREAM_UNPOISON(at, bytes) __asan_unpoison_memory_region(at, bytes)
#else
#define VARSTREAM_POISON(at, bytes) static_cast<void>(0)
#define VARSTREAM_UNPOISON(at, bytes) static_cast<void>(0)
#endif

namespace varstream::emu {
namespace {

constexpr uint8_t kUnwritten = 0xFF;  // NaN in every floating format
constexpr uint8_t kGuard = 0xA5;
constexpr int kMaxArrays = 32;

}  // namespace

void SharedMemory::reset(size_t capacity) {
  if (!memory_.empty()) VARSTREAM_UNPOISON(memory_.data(), memory_.size());
  capacity_ = capacity;
  arrays_.clear();
  // Room for the gaps and for aligning every array; vector memory is 16-byte aligned at least.
  memory_.assign(capacity + (kMaxArrays + 1) * (kGapBytes + kAlignment), kGuard);
  VARSTREAM_POISON(memory_.data(), memory_.size());
}

uint8_t* SharedMemory::at(size_t offset, size_t bytes) {
  for (const Array& array : arrays_) {
    if (array.offset != offset) continue;
    if (array.bytes != bytes) throw std::logic_error("threads carve shared memory differently");
    return memory_.data() + array.place;
  }
  if (offset + bytes > capacity_) {
    throw std::out_of_range("shared memory: an array ends at byte " +
                            std::to_string(offset + bytes) + " of " + std::to_string(capacity_));
  }
  if (arrays_.size() == kMaxArrays) throw std::length_error("too many shared arrays");
  const size_t end = arrays_.empty() ? 0 : arrays_.back().place + arrays_.back().bytes;
  const auto base = reinterpret_cast<uintptr_t>(memory_.data());
  const size_t place = (base + end + kGapBytes + kAlignment - 1) / kAlignment * kAlignment - base;
  arrays_.push_back({offset, bytes, place});
  VARSTREAM_UNPOISON(memory_.data() + place, bytes);
  std::memset(memory_.data() + place, kUnwritten, bytes);
  return memory_.data() + place;
}

SharedMemory::Place SharedMemory::place_of(const void* at, size_t bytes) const {
  const auto* first = static_cast<const uint8_t*>(at);
  for (const Array& array : arrays_) {
    const uint8_t* start = memory_.data() + array.place;
    if (first < start || first + bytes > start + array.bytes) continue;
    return {array.offset, array.bytes, size_t(first - start)};
  }
  return {0, 0, 0};
}

void SharedMemory::check() {
  VARSTREAM_UNPOISON(memory_.data(), memory_.size());
  size_t at = 0;
  auto gap = [&](size_t end) {
    if (end == at) return;
    // All bytes are the guard's if the first is and each equals its neighbour.
    const uint8_t* first = memory_.data() + at;
    if (*first != kGuard || std::memcmp(first, first + 1, end - at - 1) != 0) {
      throw std::out_of_range("shared memory: a guard gap was written");
    }
  };
  for (const Array& array : arrays_) {
    gap(array.place);
    at = array.place + array.bytes;
  }
  gap(memory_.size());
}

void SharedMemory::poison(void* at, size_t bytes) {
  std::memset(at, kUnwritten, bytes);
}

}  // namespace varstream::emu
