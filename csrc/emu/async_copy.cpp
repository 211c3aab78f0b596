#include "emu/async_copy.h"

#include <cstring>
#include <numeric>
#include <stdexcept>

#include "emu/block.h"

namespace varstream::emu {

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  const auto unaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (unaligned(shared) || (valid_bytes > 0 && unaligned(global))) {
    throw std::logic_error(describe(thread()) + ": cp.async of an address not aligned to " +
                           std::to_string(bytes) + " bytes");
  }
  if (!block().shared().holds(shared, bytes)) {
    throw std::logic_error(describe(thread()) + ": cp.async to somewhere outside shared memory");
  }
  SharedMemory::poison(shared, bytes);
  block().counts().add(Count::kCpAsync);
  block().counts().add(Count::kGlobalRead, valid_bytes);
  Thread& self = thread();
  self.copies.push_back(
      {static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), bytes, valid_bytes});
  ++self.open_copies;
}

void copy_async_commit() {
  Thread& self = thread();
  self.groups.push_back(self.open_copies);
  self.open_copies = 0;
}

void copy_async_wait(int newer) {
  Thread& self = thread();
  const int delivered = int(self.groups.size()) - newer;
  if (delivered <= 0) return;
  const auto last = self.groups.begin() + delivered;
  const auto end = self.copies.begin() + std::accumulate(self.groups.begin(), last, ptrdiff_t{0});
  for (auto copy = self.copies.begin(); copy != end; ++copy) {
    if (copy->src_bytes > 0) std::memcpy(copy->dst, copy->src, copy->src_bytes);
    std::memset(copy->dst + copy->src_bytes, 0, copy->dst_bytes - copy->src_bytes);
  }
  self.copies.erase(self.copies.begin(), end);
  self.groups.erase(self.groups.begin(), last);
}

}  // namespace varstream::emu
