// Threads: torch's own pool, behind a function pointer so that kernels see no torch header.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "common/math.h"

namespace seqkernels {

// Runs body(context, begin, end) over a split of [0, n) on torch's intra-op threads, one piece a thread, all at once
// (or one piece in all where torch is already inside a parallel region). Defined in parallel.cpp.
void parallel_pieces(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
int64_t thread_count();

template <class F>
inline __attribute__((always_inline)) void parallel_pieces(int64_t n, F& f) {
  if (n == 1) return f(int64_t{0}, int64_t{1});
  parallel_pieces(n, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
}

// A barrier for parties that may share a thread: a thread arrives once for all the parties it plays.
// It spins, for a step of a recurrence is a few microseconds, and yields when the others seem to be descheduled.
class Barrier {
 public:
  void reset(int64_t parties) { parties_ = parties; }
  __attribute__((always_inline)) void arrive_and_wait(int64_t weight) {
    if (weight == parties_) return;
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(weight, std::memory_order_acq_rel) + weight == parties_) {
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
  alignas(64) int64_t parties_ = 1;
};

}  // namespace seqkernels
