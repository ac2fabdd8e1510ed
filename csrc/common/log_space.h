// Logarithms of sums of exponentials.
#pragma once

#include <cstdint>
#include <limits>

#include "common/lanes.h"
#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// ln x for normal x > 0, with an error of about 1 ulp; -infinity for 0; NaN stays NaN.
// x = 2^n m with m in [sqrt(1/2), sqrt(2)), and ln m = 2 artanh((m - 1) / (m + 1)) by its series.
template <class T>
SEQKERNELS_INLINE Native<T> log(Native<T> x) {
  using V = Vec<T>;
  using I = typename V::Int;
  using Bits = typename V::NativeInt;
  constexpr I kBias = (I(1) << (sizeof(T) * 8 - 2 - V::kMantissaBits)) - 1;
  constexpr I kMantissa = (I(1) << V::kMantissaBits) - 1;
  const Bits bits = (Bits)x;
  Bits exponent = (bits >> V::kMantissaBits) - kBias;
  Native<T> m = (Native<T>)((bits & kMantissa) | (kBias << V::kMantissaBits));  // in [1, 2)
  const Bits large = m > broadcast(T(1.4142135623730951));
  m = large ? m * broadcast(T(0.5)) : m;
  exponent = exponent - large;  // a true lane is -1
  const Native<T> n = __builtin_convertvector(exponent, Native<T>);
  const Native<T> s = (m - T(1)) / (m + T(1)), z = s * s;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;  // |s| < 0.172
  Native<T> p = broadcast(T(1.0 / (2 * kTerms + 1)));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 1; --k) p = fma(p, z, broadcast(T(1.0 / (2 * k + 1))));
  const Native<T> low = fma(p * z, s + s, n * broadcast(T(V::kLn2Lo)));
  const Native<T> y = fma(n, broadcast(T(V::kLn2Hi)), s + s + low);
  return x == Native<T>{} ? broadcast(-kInfinity<T>) : x == x ? y : x;
}

// The larger of two; NaN if one is.
template <class T>
SEQKERNELS_INLINE Native<T> larger(Native<T> x, Native<T> y) {
  return x > y ? x : x == x ? y : x;
}
template <class T>
SEQKERNELS_INLINE T max_of_lanes(Native<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      const T x = lanes[i], y = lanes[i + width];
      lanes[i] = x > y || x != x ? x : y;
    }
  }
  return lanes[0];
}

}  // namespace seqkernels::SEQKERNELS_ISA
