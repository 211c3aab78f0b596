// Host emulation. Loads and stores of global memory by name: their bytes are counted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emu/block.h"

namespace varstream::emu {

// Throws where the device would fault: an address not aligned to `bytes`, or in shared memory.
void check_global(const char* what, const void* at, size_t bytes);

template <typename Word>
Word load_global(const Word* from) {
  check_global("load_global", from, sizeof(Word));
  block().counts().add(Count::kGlobalRead, sizeof(Word));
  return *from;
}

template <typename Word>
void store_global(Word* to, Word value) {
  check_global("store_global", to, sizeof(Word));
  block().counts().add(Count::kGlobalWritten, sizeof(Word));
  *to = value;
}

}  // namespace varstream::emu
