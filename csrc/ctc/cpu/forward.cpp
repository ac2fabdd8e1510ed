// Loss of connectionist temporal classification. A sequence is a task, and its bits do not depend on the batch.
#include "common/bytes.h"
#include "common/parallel.h"
#include "common/schedule.h"
#include "ctc/cpu/states.h"

namespace seqkernels::SEQKERNELS_ISA {

CtcKernels ctc_kernels();
void ctc_backward(const CtcBackwardArgs& args);

namespace {

template <class S>
struct Forward {
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>;

  const CtcForwardArgs& args;
  const CtcArgs& a = args.ctc;

  void run() const {
    Tasks tasks(a.B);
    for (int64_t b = 0; b < a.B; ++b) tasks.set(b, double(a.steps[b] * a.states(b)));
    tasks.sort();
    run_tasks<T>(thread_count(), a.B, States<S>::size(a) + 2 * padded_states<T>(a.S), nanoseconds(a),
                 [&](int64_t place, T* memory) { sequence(tasks.at(place), memory); });
  }

 private:
  void sequence(int64_t b, T* memory) const {
    States<S> states(a, b, memory);
    const int64_t size = padded_states<T>(a.S), count = states.count, n = a.steps[b];
    T *x = memory + 2, *next = memory + size + 2;  // two states before the first, of probability 0
    double total = 0;
    for (T* p : {x, next}) fill(p - 2, size, -kInfinity<T>);
    for (int64_t t = 0; t < n; ++t) {
      states.load_emissions(t);
      const Range range = states.reachable(t);
      if (t == 0) {
        for (int64_t s = range.begin; s < range.end; ++s) next[s] = states.emissions[s];
      } else {
        for (int64_t s = range.begin; s < range.end; s += kWidth) {
          const V skipped = load(x + s - 2) + load(states.skip + s);
          const V sum = log_sum<T>(load(x + s), load(x + s - 1), skipped) + load(states.emissions + s);
          store(next + s, sum, range.end - s);
        }
      }
      fill(next, range.begin, -kInfinity<T>);
      fill(next + range.end, count - range.end, -kInfinity<T>);
      total += double(normalise(next, count));
      copy_bytes(static_cast<T*>(args.alpha) + (b * a.T + t) * a.S, next, count * int64_t{sizeof(T)});
      T* const swap = x;
      x = next;
      next = swap;
    }
    if (n == 0) {
      args.loss[b] = count == 1 ? 0 : kInfinity<double>;
      return;
    }
    const double last = double(x[count - 1]), before = count > 1 ? double(x[count - 2]) : -kInfinity<double>;
    args.loss[b] = -(total + __builtin_log(__builtin_exp(last) + __builtin_exp(before)));
  }
};

void forward(const CtcForwardArgs& args) {
  dispatch(args.ctc.dtype, [&](auto s) { Forward<decltype(s)>{args}.run(); });
}

}  // namespace

CtcKernels ctc_kernels() { return {&forward, &ctc_backward}; }

}  // namespace seqkernels::SEQKERNELS_ISA
