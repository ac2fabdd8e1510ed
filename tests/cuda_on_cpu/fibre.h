// Fibres within one thread: a stack switch of a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>

#include <memory>
#endif

namespace seqkernels {
namespace emulation {

#if defined(__x86_64__)
// Pushes the callee-saved registers, stores the stack pointer in *from and continues on the stack `to`.
void switch_stack(void** from, void* to) asm("seqkernels_switch_stack");
asm(R"(
.pushsection .text
.type seqkernels_switch_stack, @function
seqkernels_switch_stack:
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
.size seqkernels_switch_stack, . - seqkernels_switch_stack
.popsection
)");
#endif

class Fibre {
 public:
  // Restarts the fibre: the next switch to it calls entry(), which must never return.
  void reset(char* stack, size_t bytes, void (*entry)()) {
#if defined(__x86_64__)
    auto* top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // entry's return address (none), which also aligns the stack as after a call
    *--top = reinterpret_cast<void*>(entry);  // target of `ret`
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    position_ = top;
#else
    if (!context_) context_ = std::make_unique<ucontext_t>();
    getcontext(context_.get());
    context_->uc_stack.ss_sp = stack;
    context_->uc_stack.ss_size = bytes;
    context_->uc_link = nullptr;
    makecontext(context_.get(), entry, 0);
#endif
  }
  void switch_to(Fibre& other) {
#if defined(__x86_64__)
    switch_stack(&position_, other.position_);
#else
    if (!context_) context_ = std::make_unique<ucontext_t>();
    swapcontext(context_.get(), other.context_.get());
#endif
  }

 private:
#if defined(__x86_64__)
  void* position_ = nullptr;
#else
  std::unique_ptr<ucontext_t> context_;
#endif
};

// Stacks, reused across launches. Below each lies an inaccessible guard page.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 * 1024;
  char* operator[](size_t i) {
    while (stacks_.size() <= i) {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      constexpr size_t kAtOnce = 64;
      void* area = mmap(nullptr, kAtOnce * (kBytes + page), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (area == MAP_FAILED) throw std::bad_alloc();
      for (size_t j = 0; j < kAtOnce; ++j) {
        char* start = static_cast<char*>(area) + j * (kBytes + page);
        mprotect(start, page, PROT_NONE);
        stacks_.push_back(start + page);
      }
    }
    return stacks_[i];
  }
  // Staggers the tops within a page; otherwise all stacks would map to the same cache sets.
  static size_t bytes(size_t i) { return kBytes - i % 16 * 256; }

 private:
  std::vector<char*> stacks_;
};

}  // namespace emulation
}  // namespace seqkernels
