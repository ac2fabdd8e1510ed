// Parallel loops on torch's intra-op thread pool, behind a function pointer so that kernels include no torch header.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "common/math.h"

namespace seqkernels {

// Splits [0, n) and runs body(begin, end, context) concurrently on torch's intra-op threads, one piece per thread.
// Within a torch parallel region, one call covers the whole range. Defined in parallel.cpp.
void parallel_pieces(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
int64_t thread_count();

template <class F>
inline __attribute__((always_inline)) void parallel_pieces(int64_t n, F& f) {
  if (n == 1) return f(int64_t{0}, int64_t{1});
  parallel_pieces(n, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
}

// A spinning barrier for a number of participants. A thread that executes several participants arrives once with their
// number as weight. Waiting threads spin, because a step of a recurrence takes a few microseconds, and call sched_yield
// after a while, in case the other threads have been descheduled.
class Barrier {
 public:
  void reset(int64_t participants) { participants_ = participants; }
  __attribute__((always_inline)) void arrive_and_wait(int64_t weight) {
    if (weight == participants_) return;
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(weight, std::memory_order_acq_rel) + weight == participants_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < 20000) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) int64_t participants_ = 1;
};

}  // namespace seqkernels
