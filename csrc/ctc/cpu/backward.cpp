// Gradient of the loss of connectionist temporal classification with respect to the logits of log_probs, as in torch:
// for class c at step t, e^log_probs less the probability that a path is in a state of that class,
//   P(state_t = s) = e^(alpha_s + beta_s) / N, N the sum over the states of the step.
#include "common/parallel.h"
#include "common/schedule.h"
#include "ctc/cpu/states.h"

namespace seqkernels::SEQKERNELS_ISA {

void ctc_backward(const CtcBackwardArgs& args);

namespace {

template <class S>
struct Backward {
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>;

  const CtcBackwardArgs& args;
  const CtcArgs& a = args.ctc;
  const int64_t size = padded_states<T>(args.ctc.S), CV = round_up(args.ctc.C, kWidth);

  void run() const {
    Tasks tasks(a.B);
    for (int64_t b = 0; b < a.B; ++b) tasks.set(b, double(a.steps[b] * (a.states(b) + a.C)));
    tasks.sort();
    run_tasks<T>(thread_count(), a.B, States<S>::size(a) + 3 * size + CV, nanoseconds(a) + double(a.B * a.T * a.C),
                 [&](int64_t place, T* memory) { sequence(tasks.at(place), memory); });
  }

 private:
  void sequence(int64_t b, T* memory) const {
    const T upstream = T(args.dloss[b]);
    if (upstream == 0) return;
    States<S> states(a, b, memory);
    const int64_t count = states.count, n = a.steps[b];
    T *beta = memory, *entered = memory + size, *p = memory + 2 * size, *gradient = memory + 3 * size;
    for (T* x : {beta, entered}) fill(x, size, -kInfinity<T>);  // also beyond the last state
    for (int64_t t = n - 1; t >= 0; --t) {
      if (t == n - 1) {
        beta[count - 1] = 0;
        if (count > 1) beta[count - 2] = 0;
      } else {
        for (int64_t s = 0; s < count; s += kWidth) {
          const V skipped = load(entered + s + 2) + load(states.skip + s + 2);
          store(beta + s, log_sum<T>(load(entered + s), load(entered + s + 1), skipped), count - s);
        }
      }
      const T factor = probabilities(static_cast<const T*>(args.alpha) + (b * a.T + t) * a.S, beta, count, p);
      const S* log_probs = states.step(t);
      for (int64_t c = 0; c < a.C; c += kWidth) store(gradient + c, exp<T>(load(log_probs + c, a.C - c)));
      T blank = 0;
      for (int64_t s = 0; s < count; s += 2) blank += p[s];
      gradient[a.blank] -= blank * factor;
      for (int64_t i = 0; 2 * i + 1 < count; ++i) gradient[states.labels[i]] -= p[2 * i + 1] * factor;
      if (factor != factor) fill(gradient, CV, factor);
      S* const to = static_cast<S*>(args.dlog_probs) + (t * a.B + b) * a.C;
      for (int64_t c = 0; c < a.C; c += kWidth) {
        store(to + c, load(gradient + c) * broadcast(upstream), a.C - c);
      }
      states.load_emissions(t);
      for (int64_t s = 0; s < count; s += kWidth)
        store(entered + s, load(beta + s) + load(states.emissions + s), count - s);
      normalise(entered, count);
    }
  }

  // p = e^(alpha + beta - maximum); returns the factor that makes its sum one, NaN where no path exists.
  static T probabilities(const T* alpha, const T* beta, int64_t count, T* p) {
    V top = broadcast(-kInfinity<T>), sum = {};
    for (int64_t s = 0; s < count; s += kWidth) {
      V x = load(alpha + s, count - s) + load(beta + s);
      top = larger<T>(x, top);
      store(p + s, x);
    }
    const T most = max_of_lanes<T>(top);
    const V less = broadcast(most == -kInfinity<T> ? T(0) : most);
    for (int64_t s = 0; s < count; s += kWidth) {
      const V e = exp<T>(load(p + s) - less);
      store(p + s, e);
      sum += e;
    }
    const T total = sum_of_lanes<T>(sum);
    return total > 0 ? T(1) / total : std::numeric_limits<T>::quiet_NaN();
  }
};

}  // namespace

void ctc_backward(const CtcBackwardArgs& args) {
  dispatch(args.ctc.dtype, [&](auto s) { Backward<decltype(s)>{args}.run(); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
