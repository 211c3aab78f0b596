// Ring 1. Global memory that is touched once: past L1, and given up first by L2 once written.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/global_memory.h"
#endif

namespace varstream::ptx {

// Words that one instruction moves, aligned to their size.
template <typename Word>
inline constexpr bool kIsWord =
    std::is_trivially_copyable_v<Word> &&
    (sizeof(Word) == 2 || sizeof(Word) == 4 || sizeof(Word) == 8 || sizeof(Word) == 16);

template <typename Word>
VARSTREAM_DEVICE Word load_global(const Word* from) {
  static_assert(kIsWord<Word>);
#if defined(VARSTREAM_EMULATED)
  return emu::load_global(from);
#else
  Word value;
  if constexpr (sizeof(Word) == 2) {
    uint16_t x;
    asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(x) : "l"(from) : "memory");
    memcpy(&value, &x, sizeof(x));
  } else if constexpr (sizeof(Word) == 4) {
    uint32_t x;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    memcpy(&value, &x, sizeof(x));
  } else if constexpr (sizeof(Word) == 8) {
    uint2 x;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(from)
                 : "memory");
    memcpy(&value, &x, sizeof(x));
  } else {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    memcpy(&value, &x, sizeof(x));
  }
  return value;
#endif
}

template <typename Word>
VARSTREAM_DEVICE void store_global(Word* to, Word value) {
  static_assert(kIsWord<Word>);
#if defined(VARSTREAM_EMULATED)
  emu::store_global(to, value);
#else
  if constexpr (sizeof(Word) == 2) {
    unsigned short x;
    memcpy(&x, &value, sizeof(x));
    __stcs(reinterpret_cast<unsigned short*>(to), x);
  } else if constexpr (sizeof(Word) == 4) {
    unsigned int x;
    memcpy(&x, &value, sizeof(x));
    __stcs(reinterpret_cast<unsigned int*>(to), x);
  } else if constexpr (sizeof(Word) == 8) {
    uint2 x;
    memcpy(&x, &value, sizeof(x));
    __stcs(reinterpret_cast<uint2*>(to), x);
  } else {
    uint4 x;
    memcpy(&x, &value, sizeof(x));
    __stcs(reinterpret_cast<uint4*>(to), x);
  }
#endif
}

}  // namespace varstream::ptx
