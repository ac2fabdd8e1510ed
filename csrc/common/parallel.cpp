#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#ifdef __linux__
#include <dirent.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#else
#include <chrono>
#include <thread>
#endif

namespace seqkernels {

namespace {

// Another process needs the processors if, in the regions of the last kWindow, threads were preempted for this long and
// for this part of the time. The caller then uses one thread for a multiple of that duration. The multiple doubles each
// time and halves after a window without such preemption.
constexpr double kWindow = 50e6, kPreempted = 2e6;  // ns
constexpr double kPreemptedPart = 0.2;
constexpr double kLeastRest = 2, kMostRest = 64, kLongestRest = 200e6;  // the last one in ns
// Regions that are expected to take less are not measured by the processor time of their threads: reading that clock
// takes 0.3 to 2 us.
constexpr double kMeasured = 2e6;  // ns

// What the regions of a calling thread have in common. Times in ns.
struct Caller {
  int64_t idle_since = 0;              // end of the last region
  int64_t busy_until = 0;              // regions use one thread until then
  int64_t processors = 1;              // that the thread may use
  double in_regions = 0;               // since the thread was last idle
  double preempted = 0, observed = 0;  // in the window
  double rest = kLeastRest;            // the next multiple

  // Adds a region that ended now.
  void observe(double time, double took) {
    const double left = kWindow / (kWindow + took);
    preempted = preempted * left + time;
    observed = observed * left + took;
    if (preempted > kPreempted && preempted > kPreemptedPart * observed) {
      busy_until = idle_since + int64_t(std::min(rest * preempted, kLongestRest));
      rest = std::min(rest * 2, kMostRest);
      preempted = observed = 0;
    } else if (observed > kWindow / 2) {
      rest = std::max(rest * left, kLeastRest);
    }
  }
};
thread_local Caller caller;
thread_local int64_t slept = 0;  // ns that this thread has slept in Progress::sleep_until

std::atomic<bool> always{false};
std::atomic<bool> forked{false};

#ifdef __linux__

int64_t clock_now(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}
int64_t now() { return clock_now(CLOCK_MONOTONIC); }
int64_t processor_time() { return clock_now(CLOCK_THREAD_CPUTIME_ID); }

// The system compares 32 bits: the low half of a value.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
int32_t* word_of(std::atomic<int64_t>& value) { return reinterpret_cast<int32_t*>(&value); }
void futex_wait(std::atomic<int64_t>& value, int64_t expected) {
  syscall(SYS_futex, word_of(value), FUTEX_WAIT_PRIVATE, int32_t(expected), nullptr, nullptr, 0);
}
void futex_wake_all(std::atomic<int64_t>& value) {
  syscall(SYS_futex, word_of(value), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

int64_t count_processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : CPU_SETSIZE;
}
int current_processor() { return sched_getcpu(); }

// Moves this thread to another processor of those that it may use.
void leave_processor(int processor) {
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}

// A child of a process with several threads has none of them, but OpenMP would wait for them.
bool several_threads = false;
void before_fork() {
  int count = 0;
  if (DIR* const tasks = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
    closedir(tasks);
  }
  several_threads = count != 1;
}
void in_child() {
  if (several_threads) forked.store(true);
}
const int registered = pthread_atfork(before_fork, nullptr, in_child);

#else

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
int64_t processor_time() { return now(); }
void futex_wait(std::atomic<int64_t>&, int64_t) { std::this_thread::yield(); }
void futex_wake_all(std::atomic<int64_t>&) {}
int64_t count_processors() { return std::max(1u, std::thread::hardware_concurrency()); }
int current_processor() { return -1; }
void leave_processor(int) {}

#endif

// Measures for how long a thread is preempted.
class Stopwatch {
 public:
  explicit Stopwatch(bool on) : on_(on), begin_(on ? reading() : 0) {}
  int64_t preempted() const { return on_ ? reading() - begin_ : 0; }

 private:
  static int64_t reading() { return now() - slept - processor_time(); }
  bool on_;
  int64_t begin_;
};

// A region that runs on several threads.
struct Team {
  Region* region;
  void (*body)(int64_t thread, void* context);
  void* context;
  const Caller* caller;
  int processor;  // of the caller
  bool measured;
  bool caller_ran = false;
  std::atomic<int64_t> helpers{0};
  std::atomic<int64_t> preempted{0};  // the longest time of a thread
  Progress arrived;                   // pieces of torch's loop, one for each thread
  Progress finished;                  // 1: the caller has run its part, so all shares are complete

  void record(int64_t time) {
    int64_t longest = preempted.load(std::memory_order_relaxed);
    while (time > longest && !preempted.compare_exchange_weak(longest, time, std::memory_order_relaxed)) {
    }
  }

  void run_body(int64_t thread) {
    const Stopwatch watch(measured);
    try {
      body(thread, context);
    } catch (...) {
      region->fail();
    }
    record(watch.preempted());
  }

  void run(int64_t pieces, int64_t threads) {
    if (caller == &seqkernels::caller) {
      arrived.add(pieces);
      if (std::exchange(caller_ran, true)) return;
      run_body(0);
      finished.set(1);
      // torch's loop ends when all threads have run. It waits in a loop; this waits asleep, so that a thread that
      // shares this processor can run.
      const int64_t before = slept;
      arrived.wait_for(threads);
      if (measured) record(slept - before);
    } else {
      // The system may have woken this thread on the caller's processor. torch's loop ends with a wait in a loop, which
      // would keep the caller from running until the next tick.
      if (current_processor() == processor) leave_processor(processor);
      arrived.add(pieces);
      if (finished.value() > 0) return;
      run_body(helpers.fetch_add(1, std::memory_order_relaxed) + 1);
      finished.wait_for(1);
    }
  }
};

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void set_always_parallel(bool on) { always.store(on); }
bool always_parallel() { return always.load(); }

void Progress::wake() { futex_wake_all(value_); }

void Progress::sleep_until(int64_t target) {
  const int64_t begin = now();
  sleeping_.fetch_add(1, std::memory_order_seq_cst);
  for (int64_t value; (value = value_.load(std::memory_order_seq_cst)) < target;) futex_wait(value_, value);
  sleeping_.fetch_sub(1, std::memory_order_relaxed);
  slept += now() - begin;
}

Region::Region(int64_t threads, double nanoseconds) : nanoseconds_(nanoseconds) {
  if (threads <= 1 || forked.load(std::memory_order_relaxed)) return;
  if (always.load(std::memory_order_relaxed)) {
    threads_ = threads;
    return;
  }
  if (nanoseconds < kWorthAThread) return;
  begin_ = now();
  if (double(begin_ - caller.idle_since) > kIdle) {
    caller.in_regions = 0;
    caller.processors = count_processors();
  }
  if (begin_ < caller.busy_until || caller.in_regions + nanoseconds < kWarmUp) return;
  threads_ = min(threads, caller.processors);
}

void Region::run_alone(void (*body)(void* context), void* context) {
  body(context);
  if (begin_ != 0) end();
  rethrow();
}

void Region::run_together(void (*body)(int64_t thread, void* context), void* context) {
  Team team;
  team.region = this;
  team.body = body;
  team.context = context;
  team.caller = &caller;
  team.processor = current_processor();
  team.measured = begin_ != 0 && nanoseconds_ >= kMeasured;
  struct Call {
    Team& team;
    int64_t threads;
  } call{team, threads_};
  const auto piece = [](int64_t first, int64_t last, void* argument) {
    const Call& of = *static_cast<Call*>(argument);
    of.team.run(last - first, of.threads);
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, threads_, 1, piece, &call));
  if (begin_ != 0) {
    const double took = end();
    const bool late = !team.measured && took > 4 * nanoseconds_ + 1e6;
    caller.observe(late ? took : double(team.preempted.load(std::memory_order_relaxed)), took);
  }
  rethrow();
}

void Region::rethrow() const {
  if (failed_.load()) std::rethrow_exception(exception_);
}

double Region::end() {
  caller.idle_since = now();
  const double took = double(caller.idle_since - begin_);
  caller.in_regions += took;
  return took;
}

}  // namespace seqkernels
