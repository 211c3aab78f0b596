// Host emulation. The context switch of x86-64 and aarch64 in assembly; ucontext elsewhere, or
// where VARSTREAM_PORTABLE_FIBERS is defined.
#include "emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <stdexcept>

#if defined(VARSTREAM_PORTABLE_FIBERS) || !(defined(__x86_64__) || defined(__aarch64__))
#include <ucontext.h>
#define VARSTREAM_ASSEMBLY 0
#else
#define VARSTREAM_ASSEMBLY 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VARSTREAM_ASAN 1
#else
#define VARSTREAM_ASAN 0
#endif

namespace varstream::emu {

#if VARSTREAM_ASSEMBLY
extern "C" void varstream_emu_switch(void** save, void* load);
extern "C" void varstream_emu_trampoline();
#endif

#if VARSTREAM_ASSEMBLY && defined(__x86_64__)

// Callee-saved registers go on the old stack. The floating-point control words belong to the host
// thread: no emulated kernel changes them.
asm(R"(
.text
.globl varstream_emu_switch
.type varstream_emu_switch, @function
varstream_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size varstream_emu_switch, .-varstream_emu_switch
.globl varstream_emu_trampoline
.type varstream_emu_trampoline, @function
varstream_emu_trampoline:
  movq %r12, %rdi
  call *%r13
  ud2
.size varstream_emu_trampoline, .-varstream_emu_trampoline
)");

#elif VARSTREAM_ASSEMBLY

asm(R"(
.text
.globl varstream_emu_switch
.type varstream_emu_switch, %function
varstream_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size varstream_emu_switch, .-varstream_emu_switch
.globl varstream_emu_trampoline
.type varstream_emu_trampoline, %function
varstream_emu_trampoline:
  mov x0, x19
  blr x20
  brk #1
.size varstream_emu_trampoline, .-varstream_emu_trampoline
)");

#endif

namespace {

#if VARSTREAM_ASSEMBLY

void switch_stack(void** save, void* load) {
  varstream_emu_switch(save, load);
}

// A stack that, when switched to, calls enter(self).
void* first_frame(uint8_t* bottom, size_t bytes, void (*enter)(Fiber*), Fiber* self) {
  auto* words = reinterpret_cast<uint64_t*>(bottom + bytes);
#if defined(__x86_64__)
  // From the top: alignment, return address, rbp, rbx, r12, r13, r14, r15.
  words -= 2;
  *--words = reinterpret_cast<uint64_t>(&varstream_emu_trampoline);
  *--words = 0;
  *--words = 0;
  *--words = reinterpret_cast<uint64_t>(self);
  *--words = reinterpret_cast<uint64_t>(enter);
  *--words = 0;
  *--words = 0;
#else
  words -= 20;
  for (int i = 0; i < 20; ++i) words[i] = 0;
  words[0] = reinterpret_cast<uint64_t>(self);                        // x19
  words[1] = reinterpret_cast<uint64_t>(enter);                       // x20
  words[11] = reinterpret_cast<uint64_t>(&varstream_emu_trampoline);  // x30
#endif
  return words;
}

#else  // portable: slower by two system calls a switch

struct Saved {
  ucontext_t context;
};

void switch_stack(void** save, void* load) {
  Saved here;
  *save = &here;
  swapcontext(&here.context, &static_cast<Saved*>(load)->context);
}

void portable_enter(unsigned high, unsigned low, unsigned fn_high, unsigned fn_low) {
  auto* self = reinterpret_cast<Fiber*>(uint64_t{high} << 32 | low);
  auto* enter = reinterpret_cast<void (*)(Fiber*)>(uint64_t{fn_high} << 32 | fn_low);
  enter(self);
}

void* first_frame(uint8_t* bottom, size_t bytes, void (*enter)(Fiber*), Fiber* self) {
  constexpr size_t kFrameBytes = (sizeof(Saved) + 63) / 64 * 64;
  auto* saved = new (bottom + bytes - kFrameBytes) Saved;
  getcontext(&saved->context);
  saved->context.uc_stack.ss_sp = bottom;
  saved->context.uc_stack.ss_size = bytes - kFrameBytes;
  saved->context.uc_link = nullptr;
  const auto s = reinterpret_cast<uint64_t>(self), e = reinterpret_cast<uint64_t>(enter);
  makecontext(&saved->context,
              reinterpret_cast<void (*)()>(portable_enter),
              4,
              unsigned(s >> 32),
              unsigned(s),
              unsigned(e >> 32),
              unsigned(e));
  return saved;
}

#endif

// Stacks are a page apart: without an offset of their own, the same variable of all threads of a
// warp would fall into one set of the host's first-level cache.
constexpr size_t kColours = 16, kColourBytes = 192;

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
#if VARSTREAM_ASAN
  __asan_unpoison_memory_region(bottom_, bytes_);  // whoever maps these pages next
#endif
  munmap(stack_, kFiberStackBytes + page_bytes());
}

void Fiber::start(Entry entry, void* argument) {
  if (stack_ == nullptr) {
    const size_t bytes = kFiberStackBytes + page_bytes();
    void* memory = mmap(
        nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<uint8_t*>(memory);
    mprotect(stack_, page_bytes(), PROT_NONE);  // an overflow faults instead of corrupting
    bottom_ = stack_ + page_bytes();
    bytes_ = kFiberStackBytes;
    static size_t made = 0;
    first_byte_ = kFiberStackBytes - made++ % kColours * kColourBytes;
  }
#if VARSTREAM_ASAN
  // Frames that were never returned from left their marks: the outermost ones of a fiber that
  // finished, all of one that was abandoned after an error.
  constexpr size_t kOutermostBytes = 8 << 10;
  const size_t marked = finished_ ? kOutermostBytes : bytes_;
  __asan_unpoison_memory_region(stack_ + page_bytes() + bytes_ - marked, marked);
#endif
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  own_ = first_frame(stack_ + page_bytes(), first_byte_, &Fiber::enter, this);
}

void Fiber::switch_to(Fiber& other) {
  other.previous_ = this;
#if VARSTREAM_ASAN
  // A finished fiber gives its fake stack up: null handle.
  __sanitizer_start_switch_fiber(finished_ ? nullptr : &own_fake_, other.bottom_, other.bytes_);
#endif
  switch_stack(&own_, other.own_);
  arrived();
}

// What the host's own stack is, nobody knows before the first switch away from it.
void Fiber::arrived() {
#if VARSTREAM_ASAN
  __sanitizer_finish_switch_fiber(own_fake_, &previous_->bottom_, &previous_->bytes_);
#endif
}

void Fiber::enter(Fiber* self) {
  self->own_fake_ = nullptr;
  self->arrived();
  Fiber& next = self->entry_(self->argument_);
  self->finished_ = true;
  self->switch_to(next);
}

}  // namespace varstream::emu
