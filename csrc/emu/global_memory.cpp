#include "emu/global_memory.h"

#include <stdexcept>

namespace varstream::emu {

void check_global(const char* what, const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    throw std::logic_error(describe(thread()) + ": " + what + " of an address not aligned to " +
                           std::to_string(bytes) + " bytes");
  }
  if (block().shared().holds(at, bytes)) {
    throw std::logic_error(describe(thread()) + ": " + what + " of shared memory");
  }
}

}  // namespace varstream::emu
