#include "emu/async_copy.h"

#include <cstring>
#include <stdexcept>

#include "emu/block.h"

namespace varstream::emu {

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  const auto unaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (unaligned(shared) || (valid_bytes > 0 && unaligned(global))) {
    throw std::logic_error(describe(thread()) + ": cp.async of an address not aligned to " +
                           std::to_string(bytes) + " bytes");
  }
  SharedMemory::poison(shared, bytes);
  ++instruction_counts()["cp.async"];
  thread().open_group.push_back(
      {static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), bytes, valid_bytes});
}

void copy_async_commit() {
  thread().groups.push_back(std::move(thread().open_group));
  thread().open_group.clear();
}

void copy_async_wait(int newer) {
  auto& groups = thread().groups;
  while (int(groups.size()) > newer) {
    for (const PendingCopy& copy : groups.front()) {
      if (copy.src_bytes > 0) std::memcpy(copy.dst, copy.src, copy.src_bytes);
      std::memset(copy.dst + copy.src_bytes, 0, copy.dst_bytes - copy.src_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace varstream::emu
