// tanh(q + k) by one reciprocal: with r = 1 / (1 + e^2q e^2k),
//   tanh(q + k) = 1 - 2 r and its derivative = 4 r (1 - r).
// The exponentials are computed once per row of q and of k, so that a pair of rows costs no exponential. The error of
// the result is about 1e-7 in float.
//
// The product overflows for large q or k. A row with an element beyond kBound, or one that is not finite, is kept as
// zeros, and its pairs are computed from tanh itself. Exponentials within the bound are positive, so the first element
// tells the two apart.
#pragma once

#include <cstdint>

#include "additive_attention/additive_attention.h"
#include "common/math.h"
#include "common/simd.h"
#include "common/tiles.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class T>
constexpr T kBound = sizeof(T) == 4 ? T(21) : T(175);  // e^(4 * kBound) is finite

// 1 / x for x in [1, e^(4 * kBound)], with an error of about 1 ulp.
SEQKERNELS_INLINE Native<float> reciprocal(Native<float> x) {
#if defined(__AVX512F__)
  const Native<float> r = _mm512_rcp14_ps(x);
  return fma(r, _mm512_fnmadd_ps(x, r, broadcast(1.0f)), r);
#elif defined(__AVX2__)
  const Native<float> r = _mm256_rcp_ps(x);
  return fma(r, Native<float>(_mm256_fnmadd_ps(x, r, broadcast(1.0f))), r);
#else
  return 1.0f / x;
#endif
}
SEQKERNELS_INLINE Native<double> reciprocal(Native<double> x) { return 1.0 / x; }

template <class T>
struct PairOfRows {
  Native<T> r;      // (1 - tanh) / 2
  Native<T> slope;  // r (1 - r): a quarter of the derivative
};
template <class T>
SEQKERNELS_INLINE PairOfRows<T> by_reciprocal(Native<T> exp_q, Native<T> exp_k) {
  const Native<T> r = reciprocal(fma(exp_q, exp_k, broadcast(T(1))));
  return {r, fma(-r, r, r)};
}
template <class T>
SEQKERNELS_INLINE PairOfRows<T> by_tanh(Native<T> q, Native<T> k) {
  const Native<T> t = tanh<T>(q + k);
  return {T(0.5) - T(0.5) * t, T(0.25) - T(0.25) * t * t};
}

// Whether all elements of a row are within the bound; false for NaN.
template <class S>
inline bool within_bound(const S* x, int64_t n) {
  using T = Compute<S>;
  using V = Native<T>;
  const V bound = broadcast(kBound<T>);
  typename Vec<T>::NativeInt inside = {};
  inside = ~inside;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const V v = load(x + i, n - i);
    inside &= (v <= bound) & (v >= -bound);
  }
  bool all = true;
  for (int l = 0; l < kLanes<T>; ++l) all &= inside[l] != 0;
  return all;
}

// e^(2 x) of n elements of a row, which is zeros if the row is not within the bound; rest of the last vector: zeros if
// `whole`, which `to` has memory for.
template <class S>
inline void exp_row(const S* x, int64_t n, bool within, Compute<S>* to, bool whole) {
  using T = Compute<S>;
  constexpr int64_t kWidth = kLanes<T>;
  for (int64_t i = 0; i < n; i += kWidth) {
    Native<T> e = {};
    if (within) {
      const Native<T> v = load(x + i, n - i);
      e = exp<T>(v + v);
      if (whole && n - i < kWidth) {
        T lanes[kWidth];
        store(lanes, e);
        for (int64_t l = n - i; l < kWidth; ++l) lanes[l] = 0;
        e = load(lanes);
      }
    }
    if (whole) {
      store(to + i, e);
    } else {
      store(to + i, e, n - i);
    }
  }
}

// Expected duration of the scores on one thread.
inline double nanoseconds(const AdditiveAttentionArgs& a) { return 0.8 * double(a.B * a.Tq * a.Tk * a.H); }

}  // namespace seqkernels::SEQKERNELS_ISA
