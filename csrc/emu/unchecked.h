// Host emulation. For the emulator's own inner loops, which no kernel's pointer reaches: without
// the sanitizers' checks, which would triple their time.
#pragma once

#define VARSTREAM_UNCHECKED __attribute__((no_sanitize("address", "undefined")))
