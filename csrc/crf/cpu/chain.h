// What the passes over a chain share: the scores of a step, and the product of a vector with the transitions in
// log space.
//
// Vectors of tags are padded to whole registers; padding lanes are -infinity. A vector of logarithms is kept with a
// maximum of zero, and the maxima are summed in double: over a thousand steps, log Z in float has an error of 1e-2.
#pragma once

#include <cstdint>

#include "common/log_space.h"
#include "common/memory.h"
#include "common/simd.h"
#include "crf/crf.h"

namespace seqkernels::SEQKERNELS_ISA {

// Expected duration of a product of a vector with the transitions at every step, on one thread.
inline double nanoseconds_of_products(const CrfArgs& a) { return 0.4 * double(a.first[a.B] * a.K * a.K); }

template <class S>
struct Chain {
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  // Products of probabilities below this are computed again in log space: parts of them have underflowed.
  static constexpr T kTiny = sizeof(T) == 4 ? T(1e-25) : T(1e-290);

  const CrfArgs& a;
  const int64_t K, KV;
  const bool shared;  // one matrix of transitions for all steps

  explicit Chain(const CrfArgs& args)
      : a(args), K(args.K), KV((args.K + kWidth - 1) / kWidth * kWidth), shared(args.transitions_t == 0) {}

  const S* emissions(int64_t b, int64_t t) const {
    return static_cast<const S*>(a.emissions) + b * a.emissions_b + t * a.emissions_t;
  }
  const S* transitions(int64_t b, int64_t t) const {  // [K, K]
    return static_cast<const S*>(a.transitions) + b * a.transitions_b + t * a.transitions_t;
  }
  static T value(const S* p) { return load(p, 1)[0]; }

  // The first lanes of x, and -infinity in padding.
  SEQKERNELS_INLINE V padded(V x, int64_t k) const {
    if (k + kWidth <= K) return x;
    T lanes[kWidth];
    store(lanes, x);
    for (int64_t i = K - k; i < kWidth; ++i) lanes[i] = -kInfinity<T>;
    return load(lanes);
  }
  SEQKERNELS_INLINE V at(const S* p, int64_t k) const { return p == nullptr ? V{} : load(p + k, K - k); }

  // x += from, and padding; from: [K] or null.
  void add(const S* from, T* x) const {
    for (int64_t k = 0; k < KV; k += kWidth) store(x + k, padded(load(x + k) + at(from, k), k));
  }

  // Subtracts the maximum, which it returns; leaves x as it is if that is -infinity.
  T normalise(T* x) const {
    V most = broadcast(-kInfinity<T>);
    for (int64_t k = 0; k < KV; k += kWidth) most = larger<T>(load(x + k), most);
    const T m = max_of_lanes<T>(most);
    if (m == -kInfinity<T>) return m;
    for (int64_t k = 0; k < KV; k += kWidth) store(x + k, load(x + k) - broadcast(m));
    return m;
  }
  // log sum e^x for x with a maximum of zero, in double.
  double log_sum(const T* x) const {
    V sum = {};
    for (int64_t k = 0; k < KV; k += kWidth) sum += exp<T>(load(x + k));
    return __builtin_log(double(sum_of_lanes<T>(sum)));
  }
};

// to_j = log sum_i e^(from_i + m_ij) for a matrix m that is used often: e^(m_ij - shift_j) is computed once, with
// shift_j the maximum of a column. m is a matrix of transitions, or its transpose.
template <class S>
struct Product {
  using C = Chain<S>;
  using T = typename C::T;
  using V = typename C::V;
  static constexpr int64_t kWidth = C::kWidth;

  const C& chain;
  const bool transposed;
  const S* matrix = nullptr;
  T *weights, *shift;  // [K, KV], [KV]
  T* exps;             // [KV] e^from of the last product
  T* sums;             // [KV] of the last product: sum_i e^from_i e^(m_ij - shift_j)

  static int64_t size(const C& chain) { return (chain.K + 3) * chain.KV; }
  Product(const C& chain, bool transposed, T*& memory) : chain(chain), transposed(transposed) {
    weights = memory;
    shift = weights + chain.K * chain.KV;
    exps = shift + chain.KV;
    sums = exps + chain.KV;
    memory += size(chain);
  }

  T element(int64_t i, int64_t j) const { return C::value(matrix + (transposed ? j * chain.K + i : i * chain.K + j)); }

  void prepare(const S* of) {
    if (matrix == of) return;
    matrix = of;
    const int64_t K = chain.K, KV = chain.KV;
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < KV; ++j) weights[i * KV + j] = j < K ? element(i, j) : -kInfinity<T>;
    }
    for (int64_t j = 0; j < KV; j += kWidth) {
      V most = broadcast(-kInfinity<T>);
      for (int64_t i = 0; i < K; ++i) {
        const V v = load(weights + i * KV + j);
        most = v > most ? v : most;
      }
      most = most == -kInfinity<T> ? V{} : most;  // a column that is forbidden
      store(shift + j, most);
      for (int64_t i = 0; i < K; ++i) store(weights + i * KV + j, exp<T>(load(weights + i * KV + j) - most));
    }
  }

  // from has a maximum of zero; padding of `to` is -infinity.
  void apply(const T* from, T* to) {
    const int64_t K = chain.K, KV = chain.KV;
    for (int64_t k = 0; k < KV; k += kWidth) store(exps + k, exp<T>(load(from + k)));
    int64_t j = 0;
    for (; j + 4 * kWidth <= KV; j += 4 * kWidth) columns<4>(to, j);
    for (; j + 2 * kWidth <= KV; j += 2 * kWidth) columns<2>(to, j);
    for (; j < KV; j += kWidth) columns<1>(to, j);
    for (int64_t k = K; k < KV; ++k) to[k] = -kInfinity<T>;
    if (!underflows()) return;
    for (int64_t k = 0; k < K; ++k) {
      if (sums[k] < C::kTiny) to[k] = exact(from, k);
    }
  }

  // Whether an element of `sums` is so small that parts of it may have underflowed.
  bool underflows() const {
    const int64_t K = chain.K, whole = K / kWidth * kWidth;
    V least = broadcast(std::numeric_limits<T>::max());
    for (int64_t k = 0; k < whole; k += kWidth) {
      const V s = load(sums + k);
      least = s < least ? s : least;
    }
    T lanes[kWidth];
    store(lanes, least);
    bool small = false;
    for (int64_t l = 0; l < kWidth; ++l) small |= lanes[l] < C::kTiny;
    for (int64_t k = whole; k < K; ++k) small |= sums[k] < C::kTiny;
    return small;
  }

 private:
  template <int kVectors>
  SEQKERNELS_INLINE void columns(T* to, int64_t j) {
    const int64_t K = chain.K, KV = chain.KV;
    V even[kVectors] = {}, odd[kVectors] = {};  // two sums each hide the latency of the additions
    const T* w = weights + j;
    int64_t i = 0;
    for (; i + 2 <= K; i += 2, w += 2 * KV) {
      const V x = broadcast(exps[i]), y = broadcast(exps[i + 1]);
      for (int v = 0; v < kVectors; ++v) {
        even[v] = fma(x, load(w + v * kWidth), even[v]);
        odd[v] = fma(y, load(w + KV + v * kWidth), odd[v]);
      }
    }
    if (i < K) {
      for (int v = 0; v < kVectors; ++v) even[v] = fma(broadcast(exps[i]), load(w + v * kWidth), even[v]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const V sum = even[v] + odd[v];
      store(sums + j + v * kWidth, sum);
      store(to + j + v * kWidth, log<T>(sum) + load(shift + j + v * kWidth));
    }
  }

  T exact(const T* from, int64_t j) const {
    T most = -kInfinity<T>;
    for (int64_t i = 0; i < chain.K; ++i) {
      const T x = from[i] + element(i, j);
      most = x > most ? x : most;
    }
    if (most == -kInfinity<T>) return most;
    double sum = 0;
    for (int64_t i = 0; i < chain.K; ++i) sum += __builtin_exp(double(from[i] + element(i, j) - most));
    return most + T(__builtin_log(sum));
  }
};

// The same for a matrix that is used once: every element costs an exponential.
template <class S>
void apply_once(const Chain<S>& chain, const S* matrix, const Compute<S>* from, Compute<S>* to) {
  using T = Compute<S>;
  using V = Native<T>;
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t K = chain.K;
  for (int64_t j = 0; j < chain.KV; j += kWidth) {
    V most = broadcast(-kInfinity<T>), sum = {};
    for (int64_t i = 0; i < K; ++i) {
      const V x = broadcast(from[i]) + load(matrix + i * K + j, K - j);
      most = x > most ? x : most;
    }
    const V less = most == -kInfinity<T> ? V{} : most;
    for (int64_t i = 0; i < K; ++i) sum += exp<T>(broadcast(from[i]) + load(matrix + i * K + j, K - j) - less);
    store(to + j, chain.padded(log<T>(sum) + less, j));
  }
}
// to_i = log sum_j e^(m_ij + from_j).
template <class S>
void apply_transposed_once(const Chain<S>& chain, const S* matrix, const Compute<S>* from, Compute<S>* to) {
  using T = Compute<S>;
  using V = Native<T>;
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t K = chain.K;
  for (int64_t i = 0; i < K; ++i) {
    V most = broadcast(-kInfinity<T>), sum = {};
    for (int64_t j = 0; j < chain.KV; j += kWidth) {
      const V x = load(from + j) + load(matrix + i * K + j, K - j);
      most = x > most ? x : most;
    }
    const T top = max_of_lanes<T>(most), less = top == -kInfinity<T> ? T(0) : top;
    for (int64_t j = 0; j < chain.KV; j += kWidth) {
      sum += exp<T>(load(from + j) + load(matrix + i * K + j, K - j) - broadcast(less));
    }
    to[i] = T(__builtin_log(double(sum_of_lanes<T>(sum)))) + less;
  }
  for (int64_t i = K; i < chain.KV; ++i) to[i] = -kInfinity<T>;
}

}  // namespace seqkernels::SEQKERNELS_ISA
