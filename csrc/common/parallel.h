// Parallel regions on torch's intra-op threads. Free of torch types.
//
// A region divides its work into shares. Threads claim shares, so the calling thread starts at once and completes every
// share that no other thread has claimed: it waits for shares that another thread is working on, never for a thread
// that has not arrived. Results do not depend on which thread runs a share.
//
// torch's threads spin for some milliseconds after a region and then sleep. Waking them costs the caller up to 20 us,
// and the system may place a woken thread on the caller's processor until its next tick, 4 ms later. A region therefore
// uses one thread
//   - while the caller has spent less than kWarmUp in regions since it was last idle for kIdle, unless the region is
//     expected to take at least kWarmUp by itself;
//   - for some time after a region whose threads were preempted: another process needs the processors;
//   - in a child process after fork, where torch's threads do not exist.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include "common/math.h"

namespace seqkernels {

// The number of torch's intra-op threads. Work is divided by this number, never by the number of threads that run.
int64_t thread_count();

// Below this one-thread duration, a second thread costs more than it saves.
constexpr double kWorthAThread = 10e3;          // ns
constexpr double kWarmUp = 1.2e6, kIdle = 5e6;  // ns

// thread_count(), or 1 if the work takes less than kWorthAThread.
inline int64_t threads_for(double nanoseconds) { return nanoseconds < kWorthAThread ? 1 : thread_count(); }

// Starts the threads of every region, whatever the state of the machine, and more of them than there are processors.
// For tests of concurrency.
void set_always_parallel(bool on);
bool always_parallel();

// A value that increases, on which threads wait: a short spin, then a futex.
class Progress {
 public:
  int64_t value() const { return value_.load(std::memory_order_acquire); }
  void set(int64_t value) {
    value_.store(value, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) wake();
  }
  int64_t add(int64_t n) {
    const int64_t value = value_.fetch_add(n, std::memory_order_seq_cst) + n;
    if (sleeping_.load(std::memory_order_seq_cst) > 0) wake();
    return value;
  }
  void wait_for(int64_t target) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (value() >= target) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    sleep_until(target);
  }

 private:
  static constexpr int kSpins = 1000;  // 15 to 50 us: about the cost of a sleep and a wake-up
  void wake();
  void sleep_until(int64_t target);
  std::atomic<int64_t> value_{0};
  std::atomic<int32_t> sleeping_{0};
};

class Region;

// Phases of work, each divided into the same number of shares. A phase starts when the previous one is complete. Every
// thread of a region runs the same sequence of phases; a thread that arrives late finds the first phases complete.
class Phases {
 public:
  struct alignas(64) Claim {
    std::atomic<int64_t> next{0};  // the first phase in which this share is unclaimed
  };

  // claims: [shares] constructed, or null if one thread runs all shares.
  void start(Region& region, Claim* claims, int64_t shares) {
    region_ = &region;
    claims_ = claims;
    shares_ = shares;
  }
  int64_t shares() const { return shares_; }

  // Calls f(share) for the shares of a phase that are left, beginning with `first`, which is below shares(). Returns
  // when the phase is complete.
  template <class F>
  inline __attribute__((always_inline)) void run(int64_t phase, int64_t first, F&& f) {
    const bool alone = claims_ == nullptr;
    int64_t share = first;
    for (int64_t left = shares_; left > 0; --left, share = share + 1 == shares_ ? 0 : share + 1) {
      if (!alone && !claim(share, phase)) {
        if (complete_.value() > phase) return;
        continue;
      }
      guarded(f, share);
      if (!alone && arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == (phase + 1) * shares_) {
        return complete_.set(phase + 1);
      }
    }
    if (!alone) complete_.wait_for(phase + 1);
  }

 private:
  bool claim(int64_t share, int64_t phase) {
    std::atomic<int64_t>& next = claims_[share].next;
    int64_t expected = phase;
    return next.load(std::memory_order_relaxed) == phase &&
           next.compare_exchange_strong(expected, phase + 1, std::memory_order_acquire, std::memory_order_relaxed);
  }
  template <class F>
  inline __attribute__((always_inline)) void guarded(F&& f, int64_t share);

  Region* region_ = nullptr;
  Claim* claims_ = nullptr;
  int64_t shares_ = 1;
  alignas(64) std::atomic<int64_t> arrived_{0};  // shares completed, over all phases
  alignas(64) Progress complete_;                // phases completed
};

// One parallel region. The constructor decides how many threads run; `run` calls body(thread) on each of them, thread 0
// being the caller. An exception of a share is rethrown by `run`.
class Region {
 public:
  // threads: at most this many. nanoseconds: expected duration on one thread.
  Region(int64_t threads, double nanoseconds);
  int64_t threads() const { return threads_; }

  template <class F>
  void run(F& body) {
    if (threads_ == 1) return run_alone([](void* context) { (*static_cast<F*>(context))(int64_t{0}); }, &body);
    run_together([](int64_t thread, void* context) { (*static_cast<F*>(context))(thread); }, &body);
  }

  // Called in a catch block: keeps the first exception. The share counts as complete.
  void fail() {
    if (!failed_.exchange(true)) exception_ = std::current_exception();
  }

 private:
  void run_alone(void (*body)(void* context), void* context);
  void run_together(void (*body)(int64_t thread, void* context), void* context);
  void rethrow() const;
  double end();  // records the end of the region; returns its duration

  int64_t threads_ = 1;
  double nanoseconds_;
  int64_t begin_ = 0;  // ns; 0: not recorded
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

template <class F>
inline __attribute__((always_inline)) void Phases::guarded(F&& f, int64_t share) {
  try {
    f(share);
  } catch (...) {
    region_->fail();
  }
}

// Calls f(thread, i) for every i below n; `thread` is below `threads`. Elements are claimed one by one, in order.
template <class F>
void parallel_for(int64_t threads, int64_t n, double nanoseconds, F&& f) {
  Region region(min(threads, n), nanoseconds);
  std::atomic<int64_t> next{0};
  auto body = [&](int64_t thread) {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(thread, i);
    } catch (...) {
      next.store(n, std::memory_order_relaxed);
      region.fail();
    }
  };
  region.run(body);
}

}  // namespace seqkernels
