// Ring 0. Untyped words of 1 to 16 bytes, moved by one load or store each.
#pragma once

#include <cstdint>

namespace varstream {

inline constexpr int kMaxVecBytes = 16;

// A word of Bytes bytes, aligned to its size so that the compiler moves it in one instruction.
template <int Bytes>
struct alignas(Bytes) Vec {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "wider or odd words have no instruction");
  uint32_t word[Bytes / 4];
};

template <>
struct Vec<1> {
  uint8_t word[1];
};

template <>
struct alignas(2) Vec<2> {
  uint16_t word[1];
};

// The widest word, in bytes, that divides row_bytes and both addresses.
inline int widest_vec(int64_t row_bytes, const void* a, const void* b) {
  const uint64_t bits = static_cast<uint64_t>(row_bytes) | reinterpret_cast<uintptr_t>(a) |
                        reinterpret_cast<uintptr_t>(b);
  int bytes = kMaxVecBytes;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

}  // namespace varstream
