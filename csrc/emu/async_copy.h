// Host emulation. cp.async: the destination is unwritten until the thread waits for its group.
#pragma once

namespace varstream::emu {

void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int newer);

}  // namespace varstream::emu
