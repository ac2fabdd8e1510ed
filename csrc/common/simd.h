// One vector type per instruction set, built on the compiler's vector extensions. Arithmetic is written once;
// operations with dedicated instructions (fused multiply-add, half-precision conversion, a 16x16 transpose) use
// intrinsics.
//
// Files that include this header are compiled once per instruction set, with SEQKERNELS_ISA as the namespace. This
// keeps the linker from merging functions of different instruction sets. For the same reason these files instantiate no
// std templates. They are compiled with -ffp-contract=off: multiply and add are fused only by an explicit fma(), so
// that results do not depend on how the compiler unrolls a loop.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#ifndef SEQKERNELS_ISA
#error "compile kernels with -DSEQKERNELS_ISA=portable, avx2 or avx512"
#endif

#define SEQKERNELS_INLINE inline __attribute__((always_inline))

namespace seqkernels::SEQKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Vec;

template <class T, class I>
struct VecBase {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  using Scalar = T;
  using Int = I;
  typedef T Native __attribute__((vector_size(kVectorBytes)));
  typedef I NativeInt __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <>
struct Vec<float> : VecBase<float, int32_t> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it puts the rounded integer into the low bits
  static constexpr float kMinExp = -87.0f, kMaxExp = 88.0f;                // keeps 2^n normal: n in [-126, 127]
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // ln 2 in two parts; kLn2Hi * n is exact
  static constexpr int kTaylor = 7;  // |r| <= ln(2)/2: the next term is below 5.3e-9
};
template <>
struct Vec<double> : VecBase<double, int64_t> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMinExp = -708.0, kMaxExp = 709.0;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kTaylor = 13;  // the next term is below 4.2e-18
};

template <class T>
using Native = typename Vec<T>::Native;
template <class T>
constexpr int kLanes = Vec<T>::kLanes;

template <class T>
SEQKERNELS_INLINE Native<T> broadcast(T x) {
  return x - Native<T>{};  // GCC compiles this to a splat; x - 0 is x, also for x = -0
}

template <class T>
SEQKERNELS_INLINE Native<T> load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::Unaligned*>(p);
}
template <class T>
SEQKERNELS_INLINE void store(T* p, Native<T> v) {
  *reinterpret_cast<typename Vec<T>::Unaligned*>(p) = v;
}

SEQKERNELS_INLINE Native<float> fma(Native<float> a, Native<float> b, Native<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
SEQKERNELS_INLINE Native<double> fma(Native<double> a, Native<double> b, Native<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Half types are loaded and stored as vectors of float.

typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t Half16Unaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float value;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else {
    bits = magnitude << 13;  // multiplying by 2^112 rebiases the exponent exactly, also of subnormals
    memcpy(&value, &bits, 4);
    value *= 5.192296858534828e+33f;  // 2^112
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00 | uint16_t(bits >> 13 & 0x1ff);  // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;                                // 65520 and above round to infinity
  if (bits < 0x38800000) {                                                     // below 2^-14: subnormal
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // ulp of [0.5, 1) is 2^-24, the subnormal step
    memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

SEQKERNELS_INLINE Native<float> load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Native<float>)((Bits32)bits << 16);
#elif defined(__AVX2__)
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Native<float>)((Bits32)bits << 16);
#else
  const Half16 h = *reinterpret_cast<const Half16Unaligned*>(p);
  return (Native<float>)(__builtin_convertvector(h, Bits32) << 16);
#endif
}
// Returns v rounded to bfloat16 (nearest, ties to even; NaN stays NaN) in the upper half of each lane.
SEQKERNELS_INLINE Bits32 bfloat16_bits(Native<float> v) {
  const Bits32 bits = (Bits32)v;
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}
SEQKERNELS_INLINE void store(BFloat16* p, Native<float> v) {
  *reinterpret_cast<Half16Unaligned*>(p) = __builtin_convertvector(bfloat16_bits(v) >> 16, Half16);
}
SEQKERNELS_INLINE Native<float> load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Native<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}
SEQKERNELS_INLINE void store(Half* p, Native<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Partial vectors: the first n lanes. A load sets the other lanes to zero; their memory is not accessed.

template <class S>
SEQKERNELS_INLINE Native<Compute<S>> load(const S* p, int64_t n) {
  constexpr int kWidth = kLanes<Compute<S>>;
  if (n >= kWidth) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  if constexpr (sizeof(S) == 8) return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#endif
  S lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class S>
SEQKERNELS_INLINE void store(S* p, Native<Compute<S>> v, int64_t n) {
  constexpr int kWidth = kLanes<Compute<S>>;
  if (n >= kWidth) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
#endif
  S lanes[kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Rounds v to the precision of S, as a store followed by a load would.
template <class S>
SEQKERNELS_INLINE Native<Compute<S>> rounded(Native<Compute<S>> v) {
  return v;
}
template <>
SEQKERNELS_INLINE Native<float> rounded<BFloat16>(Native<float> v) {
  return (Native<float>)(bfloat16_bits(v) & 0xffff0000);
}
template <>
SEQKERNELS_INLINE Native<float> rounded<Half>(Native<float> v) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  Half lanes[kLanes<float>];
  store(lanes, v);
  return load(lanes);
#endif
}

// Converts n elements.
template <class To, class From>
inline void convert(To* to, const From* from, int64_t n) {
  constexpr int kWidth = kLanes<Compute<To>>;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

// exp, sigmoid, tanh and log-sigmoid.

template <class T>
struct Reduced {
  Native<T> scale;  // 2^n
  Native<T> expm1;  // e^r - 1, x = n ln 2 + r
};

// e^x = scale * (1 + expm1) for x in [kMinExp, kMaxExp], by the Taylor series of e^r - 1 to the precision of T.
template <class T>
SEQKERNELS_INLINE Reduced<T> reduce_exp(Native<T> x) {
  using V = Vec<T>;
  const Native<T> shifted = fma(x, broadcast(T(1.4426950408889634)), broadcast(V::kRound));
  const Native<T> n = shifted - V::kRound;
  Native<T> r = fma(n, broadcast(T(-V::kLn2Hi)), x);
  r = fma(n, broadcast(T(-V::kLn2Lo)), r);
  constexpr double kInverseFactorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  Native<T> p = broadcast(T(kInverseFactorial[V::kTaylor]));
#pragma GCC unroll 16
  for (int k = V::kTaylor - 1; k >= 2; --k) p = fma(p, r, broadcast(T(kInverseFactorial[k])));
  p = fma(p * r, r, r);
  constexpr typename V::Int kBias = (typename V::Int(1) << (sizeof(T) * 8 - 2 - V::kMantissaBits)) - 1;
  const auto exponent = ((typename V::NativeInt)shifted + kBias) << V::kMantissaBits;
  return {(Native<T>)exponent, p};
}

// 1 / (1 + e^-x). Outside the range of exp, the value at its limit (about 2^-127, or 1). NaN stays NaN.
template <class T>
SEQKERNELS_INLINE Native<T> sigmoid(Native<T> x) {
  const Native<T> lo = broadcast(Vec<T>::kMinExp), hi = broadcast(Vec<T>::kMaxExp);
  Native<T> y = -x;
  y = y > hi ? hi : y;
  y = y < lo ? lo : y;
  const Reduced<T> e = reduce_exp<T>(y);
  return T(1) / (T(1) + fma(e.scale, e.expm1, e.scale));
}

// e^x with an error of at most 1 ulp. Below the smallest normal number: 0; from 2^127.5: infinity; NaN stays NaN.
// x = n ln 2 + r and e^r = 1 + r p(r), with p a minimax polynomial in float and the Taylor series in double.
template <class T>
SEQKERNELS_INLINE Native<T> exp(Native<T> x) {
  using V = Vec<T>;
  using I = typename V::Int;
  constexpr I kBias = (I(1) << (sizeof(T) * 8 - 2 - V::kMantissaBits)) - 1;
  const Native<T> most = broadcast(T((kBias + 0.6) * 0.693147180559945309)), least = broadcast(V::kMinExp);
  x = x > most ? most : x;
  const Native<T> shifted = fma(x, broadcast(T(1.4426950408889634)), broadcast(V::kRound));
  const Native<T> n = shifted - V::kRound;
  Native<T> r = fma(n, broadcast(T(-V::kLn2Hi)), x);
  r = fma(n, broadcast(T(-V::kLn2Lo)), r);
  Native<T> p;
  if constexpr (sizeof(T) == 4) {
    constexpr T kFit[] = {T(0.001384364441037178), T(0.008374162949621677), T(0.04166800156235695),
                          T(0.16666431725025177),  T(0.4999999403953552),   T(1)};
    p = broadcast(kFit[0]);
#pragma GCC unroll 8
    for (int i = 1; i < 6; ++i) p = fma(p, r, broadcast(kFit[i]));
  } else {
    constexpr auto series = [] {
      struct {
        double of[13];
      } s{};
      double term = 1;
      for (int i = 1; i <= 13; ++i) s.of[i - 1] = term = term / i;
      return s;
    }();
    p = broadcast(T(series.of[12]));
#pragma GCC unroll 16
    for (int i = 11; i >= 0; --i) p = fma(p, r, broadcast(T(series.of[i])));
  }
  const auto exponent = ((typename V::NativeInt)shifted + kBias) << V::kMantissaBits;
  const Native<T> y = fma(p, r, broadcast(T(1))) * (Native<T>)exponent;
  return x < least ? Native<T>{} : y;
}

// log_sigmoid(x) = min(x, 0) - ln(1 + u) with u = e^-|x|. ln(1 + u) = 2 artanh(u / (2 + u)) is evaluated by the series
// of artanh, whose argument is at most 1/3, to the precision of T.
template <class T>
SEQKERNELS_INLINE Native<T> log_sigmoid(Native<T> x) {
  const Native<T> u = exp<T>(x < T(0) ? x : -x), s = u / (u + T(2)), z = s * s;
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 18;
  Native<T> p = broadcast(T(1.0 / (2 * kTerms - 1)));
#pragma GCC unroll 18
  for (int k = kTerms - 2; k >= 0; --k) p = fma(p, z, broadcast(T(1.0 / (2 * k + 1))));
  const Native<T> log1p = (s + s) * p;
  return (x > T(0) ? Native<T>{} : x) - log1p;
}

// tanh(x) = -(e^-2|x| - 1) / ((e^-2|x| - 1) + 2) with the sign of x; error at most 2.5 ulp. In float, |x| < 0.625, the
// usual range of gates, uses an odd polynomial with half that error: a Chebyshev fit of (tanh(x) / x - 1) / x^2 with
// error 1.6e-9.
template <class T>
SEQKERNELS_INLINE Native<T> tanh(Native<T> x) {
  using I = typename Vec<T>::NativeInt;
  constexpr auto kSign = std::numeric_limits<typename Vec<T>::Int>::min();
  const Native<T> limit = broadcast(T(-40));  // tanh is 1 from there on, and 2^n stays normal
  Native<T> y = (Native<T>)((I)x | kSign);
  y = y + y;
  y = y < limit ? limit : y;
  const Reduced<T> e = reduce_exp<T>(y);
  const Native<T> m = fma(e.scale, e.expm1, e.scale - T(1));
  const Native<T> t = m / (m + T(2));  // negative
  const Native<T> large = (Native<T>)(((I)t & ~kSign) | ((I)x & kSign));
  if constexpr (sizeof(T) == 4) {
    constexpr T kOdd[] = {T(0.0022927448),  T(-0.0083439455), T(0.021768919),
                          T(-0.0539592596), T(0.1333330356),  T(-0.3333333317)};
    const Native<T> z = x * x;
    Native<T> p = broadcast(kOdd[0]);
#pragma GCC unroll 8
    for (int i = 1; i < 6; ++i) p = fma(p, z, broadcast(kOdd[i]));
    return z < T(0.390625) ? fma(p * z, x, x) : large;
  } else {
    return large;
  }
}

// Transposes of square blocks of lanes.

#if defined(__AVX512F__)
SEQKERNELS_INLINE void transpose(Native<float> (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto pd = [&](int j) { return _mm512_castps_pd(t[i + j]); };
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(0), pd(2)));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(0), pd(2)));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(1), pd(3)));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(1), pd(3)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

// Transposes r (r[i][j] becomes r[j][i]) for any vector type: at each distance s the off-diagonal blocks are swapped.
template <class V, int kWidth>
SEQKERNELS_INLINE void transpose(V (&r)[kWidth]) {
  typedef decltype(r[0] < r[0]) Mask;
#pragma GCC unroll 4
  for (int s = 1; s < kWidth; s *= 2) {
    Mask low, high;
    for (int l = 0; l < kWidth; ++l) {
      low[l] = l & s ? kWidth + l - s : l;
      high[l] = l & s ? kWidth + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (i & s) continue;
      const V a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
