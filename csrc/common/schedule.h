// Dynamic scheduling: threads take tasks one at a time, the most expensive first. The result of a task does not depend
// on the thread or the order.
#pragma once

#include <cstdint>

#include "common/memory.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

// The numbers 0 .. n - 1, sorted by decreasing cost.
class Tasks {
 public:
  explicit Tasks(int64_t n)
      : n_(n), memory_(size_t(n + 1) * sizeof(Task)), tasks_(reinterpret_cast<Task*>(memory_.get())) {}
  void set(int64_t i, double cost) { tasks_[i] = {cost, i}; }
  void sort() {
    int64_t gap = 1;
    while (gap < n_ / 9) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3) {
      for (int64_t i = gap; i < n_; ++i) {
        const Task task = tasks_[i];
        int64_t j = i;
        for (; j >= gap && before(task, tasks_[j - gap]); j -= gap) tasks_[j] = tasks_[j - gap];
        tasks_[j] = task;
      }
    }
  }
  int64_t at(int64_t place) const { return tasks_[place].number; }
  double cost(int64_t place) const { return tasks_[place].cost; }
  int64_t count() const { return n_; }

 private:
  struct Task {
    double cost;
    int64_t number;
  };
  static bool before(const Task& a, const Task& b) {
    return a.cost > b.cost || (a.cost == b.cost && a.number < b.number);
  }
  int64_t n_;
  Memory memory_;
  Task* tasks_;
};

// Calls f(task, memory) for every task below n; `memory` has `size` elements and belongs to the calling thread.
// nanoseconds: expected duration of all tasks on one thread.
template <class T, class F>
inline void run_tasks(int64_t threads, int64_t n, int64_t size, double nanoseconds, F f) {
  if (n == 0) return;
  const int64_t each = (size * int64_t(sizeof(T)) + 127) / 64 * 64;
  const Memory memory(size_t(min(threads, n) * each));
  parallel_for(threads, n, nanoseconds,
               [&](int64_t thread, int64_t task) { f(task, reinterpret_cast<T*>(memory.get() + thread * each)); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
