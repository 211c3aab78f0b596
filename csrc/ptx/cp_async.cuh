// Ring 1. Asynchronous copies from global to shared memory, sm_80 and up, in groups a thread waits
// for. What a copy brings is visible to its own thread after the wait, to others after a barrier.
#pragma once

#include <cstdint>

#include "common/macros.h"
#if defined(VARSTREAM_EMULATED)
#include "emu/async_copy.h"
#endif

namespace varstream::ptx {

// Copies 16 bytes past L1, both addresses 16-byte aligned; where !valid writes zeros, reads
// nothing.
VARSTREAM_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
#if defined(VARSTREAM_EMULATED)
  emu::copy_async(shared, global, 16, valid ? 16 : 0);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
      : "memory");
#endif
}

// The same for 8 bytes, both addresses 8-byte aligned.
VARSTREAM_DEVICE void cp_async_8(void* shared, const void* global, bool valid) {
#if defined(VARSTREAM_EMULATED)
  emu::copy_async(shared, global, 8, valid ? 8 : 0);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(valid ? 8 : 0)
      : "memory");
#endif
}

// Closes the group of copies issued since the last commit.
VARSTREAM_DEVICE void cp_async_commit() {
#if defined(VARSTREAM_EMULATED)
  emu::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most Newer of the thread's groups are still under way.
template <int Newer>
VARSTREAM_DEVICE void cp_async_wait() {
#if defined(VARSTREAM_EMULATED)
  emu::copy_async_wait(Newer);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Newer) : "memory");
#endif
}

}  // namespace varstream::ptx
