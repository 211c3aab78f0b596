// Ring 2. Philox4x32-10 (Salmon et al., SC 2011): four random words of a counter and a key, the
// same on every device and in python/varstream/reference/philox.py.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace varstream::tile {

struct Words4 {
  uint32_t word[4];
};

VARSTREAM_HOST_DEVICE Words4 philox4x32(Words4 counter, uint32_t key0, uint32_t key1) {
  uint32_t (&c)[4] = counter.word;
  VARSTREAM_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0;
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace varstream::tile
