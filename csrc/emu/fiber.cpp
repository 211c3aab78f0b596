// Host emulation. The context switch of x86-64 and aarch64 in assembly, ucontext elsewhere.
#include "emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VARSTREAM_ASAN 1
#else
#define VARSTREAM_ASAN 0
#endif

namespace varstream::emu {

#if defined(__x86_64__) || defined(__aarch64__)
extern "C" void varstream_emu_switch(void** save, void* load);
extern "C" void varstream_emu_trampoline();
#endif

#if defined(__x86_64__)

// Callee-saved registers and the two floating-point control words go on the old stack.
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
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
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

#elif defined(__aarch64__)

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

#if defined(__x86_64__) || defined(__aarch64__)

void switch_stack(void** save, void* load) {
  varstream_emu_switch(save, load);
}

// A stack that, when switched to, calls enter(self).
void* first_frame(uint8_t* top, void (*enter)(Fiber*), Fiber* self) {
  auto* words = reinterpret_cast<uint64_t*>(top);
#if defined(__x86_64__)
  // From the top: alignment, return address, rbp, rbx, r12, r13, r14, r15, control words.
  words -= 2;
  *--words = reinterpret_cast<uint64_t>(&varstream_emu_trampoline);
  *--words = 0;
  *--words = 0;
  *--words = reinterpret_cast<uint64_t>(self);
  *--words = reinterpret_cast<uint64_t>(enter);
  *--words = 0;
  *--words = 0;
  uint32_t mxcsr;
  uint16_t x87;
  asm volatile("stmxcsr %0" : "=m"(mxcsr));
  asm volatile("fnstcw %0" : "=m"(x87));
  *--words = mxcsr | uint64_t{x87} << 32;
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

void* first_frame(uint8_t* top, void (*enter)(Fiber*), Fiber* self) {
  constexpr size_t kFrameBytes = (sizeof(Saved) + 63) / 64 * 64;
  auto* saved = new (top - kFrameBytes) Saved;
  getcontext(&saved->context);
  saved->context.uc_stack.ss_sp = top - kFiberStackBytes;
  saved->context.uc_stack.ss_size = kFiberStackBytes - kFrameBytes;
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

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kFiberStackBytes + page_bytes());
}

void Fiber::start(Entry entry, void* argument) {
  if (stack_ == nullptr) {
    const size_t bytes = kFiberStackBytes + page_bytes();
    void* memory = mmap(
        nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<uint8_t*>(memory);
    mprotect(stack_, page_bytes(), PROT_NONE);  // an overflow faults instead of corrupting
  }
#if VARSTREAM_ASAN
  // Frames of a fiber that was abandoned after an error left their marks.
  __asan_unpoison_memory_region(stack_ + page_bytes(), kFiberStackBytes);
#endif
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  own_ = first_frame(stack_ + page_bytes() + kFiberStackBytes, &Fiber::enter, this);
}

void Fiber::resume() {
#if VARSTREAM_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_ + page_bytes(), kFiberStackBytes);
#endif
  switch_stack(&scheduler_, own_);
#if VARSTREAM_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::pause() {
#if VARSTREAM_ASAN
  // A finished fiber gives its fake stack up: null handle.
  __sanitizer_start_switch_fiber(
      finished_ ? nullptr : &own_fake_, scheduler_bottom_, scheduler_bytes_);
#endif
  switch_stack(&own_, scheduler_);
#if VARSTREAM_ASAN
  __sanitizer_finish_switch_fiber(own_fake_, &scheduler_bottom_, &scheduler_bytes_);
#endif
}

void Fiber::enter(Fiber* self) {
#if VARSTREAM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_bottom_, &self->scheduler_bytes_);
#endif
  self->entry_(self->argument_);
  self->finished_ = true;
  self->pause();
}

}  // namespace varstream::emu
