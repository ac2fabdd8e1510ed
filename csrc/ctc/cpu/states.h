// The states of a sequence: their emissions and transitions, and the states that a path can use.
#pragma once

#include <cstring>

#include "common/log_space.h"
#include "common/math.h"
#include "ctc/ctc.h"

namespace seqkernels::SEQKERNELS_ISA {

// Elements of an array of states with two more at each end and whole vectors.
template <class T>
constexpr int64_t padded_states(int64_t states) {
  return round_up(states + 4, kLanes<T>) + kLanes<T>;
}

// Expected duration of one pass over all states on one thread.
inline double nanoseconds(const CtcArgs& a) { return 10.0 * double(a.B * a.T * a.S); }

template <class T>
inline void fill(T* to, int64_t n, T x) {
  for (int64_t i = 0; i < n; ++i) to[i] = x;
}

// log(e^x + e^y + e^z)
template <class T>
SEQKERNELS_INLINE Native<T> log_sum(Native<T> x, Native<T> y, Native<T> z) {
  const Native<T> most = larger<T>(larger<T>(x, y), z);
  const Native<T> less = most == broadcast(-kInfinity<T>) ? Native<T>{} : most;
  return log<T>(exp<T>(x - less) + exp<T>(y - less) + exp<T>(z - less)) + less;
}

// Subtracts the maximum of whole vectors, which it returns; leaves x as it is if that is -infinity or NaN.
template <class T>
inline T normalise(T* x, int64_t n) {
  Native<T> top = broadcast(-kInfinity<T>);
  for (int64_t i = 0; i < n; i += kLanes<T>) top = larger<T>(load(x + i), top);
  const T most = max_of_lanes<T>(top);
  if (most == -kInfinity<T> || most != most) return most;
  for (int64_t i = 0; i < n; i += kLanes<T>) store(x + i, load(x + i) - broadcast(most));
  return most;
}

struct Range {
  int64_t begin, end;
};

template <class S>
struct States {
  using T = Compute<S>;
  const CtcArgs& a;
  const int64_t b, count, n;
  const int64_t* labels;  // [(count - 1) / 2]
  T* emissions;           // [count] log probabilities of the current step
  T* skip;                // [count + 2] 0 if a path may move to the state over the one before, else -infinity

  static int64_t size(const CtcArgs& a) { return 2 * padded_states<T>(a.S); }
  States(const CtcArgs& args, int64_t sequence, T*& memory)
      : a(args),
        b(sequence),
        count(args.states(sequence)),
        n(args.steps[sequence]),
        labels(args.targets + args.starts[b]) {
    emissions = memory;
    skip = memory + padded_states<T>(a.S);
    memory += size(a);
    fill(emissions, padded_states<T>(a.S), T(0));
    fill(skip, padded_states<T>(a.S), -kInfinity<T>);
    for (int64_t i = 1; 2 * i + 1 < count; ++i) {
      if (labels[i] != labels[i - 1]) skip[2 * i + 1] = 0;
    }
  }

  const S* step(int64_t t) const { return static_cast<const S*>(a.log_probs) + t * a.probs_t + b * a.probs_b; }
  void load_emissions(int64_t t) {
    const S* p = step(t);
    const T blank = value(p + a.blank);
    for (int64_t s = 0; s < count; s += 2) emissions[s] = blank;
    for (int64_t i = 0; 2 * i + 1 < count; ++i) emissions[2 * i + 1] = value(p + labels[i]);
  }
  // States that a path from the first to the last step can be in at step t.
  Range reachable(int64_t t) const {
    const int64_t begin = max(int64_t{0}, count - 2 * (n - t)), end = min(count, 2 * t + 2);
    return {min(begin, count), max(end, min(begin, count))};
  }

 private:
  static T value(const S* p) {
    if constexpr (sizeof(S) == sizeof(T)) {
      return *p;
    } else {
      return load(p, 1)[0];
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
