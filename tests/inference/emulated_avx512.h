// The AVX-512 and VNNI intrinsics that csrc/recurrent/cpu/packed_product.cpp uses, in plain C++, so that its code for
// these instruction sets runs on any x86 processor with AVX2. Included before everything else.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class V, class T, int kCount>
struct Lanes {
  T of[kCount];
  static Lanes from(const V& v) { return as<Lanes>(v); }
  V vector() const { return as<V>(*this); }
};

// sum + the products of four unsigned bytes of a and four signed bytes of b, in each of kCount lanes.
template <int kCount, class V>
inline V dpbusd(V sum, V a, V b) {
  auto s = Lanes<V, int32_t, kCount>::from(sum);
  const auto u = Lanes<V, uint8_t, 4 * kCount>::from(a);
  const auto w = Lanes<V, int8_t, 4 * kCount>::from(b);
  for (int i = 0; i < 4 * kCount; ++i) s.of[i / 4] += int32_t{u.of[i]} * int32_t{w.of[i]};
  return s.vector();
}

#if defined(EMULATE_AVX512)
using Bytes = Lanes<__m512i, int8_t, 64>;
using Words = Lanes<__m512i, int16_t, 32>;
using Ints = Lanes<__m512i, int32_t, 16>;
using Floats = Lanes<__m512, float, 16>;

inline __m512i cast(__m256i low) {
  __m512i v = {};
  std::memcpy(&v, &low, 32);
  return v;
}
inline __m512i insert(__m512i v, __m256i half, int at) {
  std::memcpy(reinterpret_cast<char*>(&v) + 32 * at, &half, 32);
  return v;
}
inline __m512 halves(__m256i v) {
  __m512 to;
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(v)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  std::memcpy(&to, &low, 32);
  std::memcpy(reinterpret_cast<char*>(&to) + 32, &high, 32);
  return to;
}
inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  std::memcpy(z, &c, 64);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, 64);
  return c;
}
inline __m512i set_words(int16_t x) {
  Words w;
  for (auto& v : w.of) v = x;
  return w.vector();
}
inline __m512i set_ints(int32_t x) {
  Ints w;
  for (auto& v : w.of) v = x;
  return w.vector();
}
inline __m512i absolute(__m512i x) {
  auto b = Bytes::from(x);
  for (auto& v : b.of) v = static_cast<int8_t>(v < 0 ? -v : v);
  return b.vector();
}
inline uint64_t negative(__m512i x) {
  const auto b = Bytes::from(x);
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t{b.of[i] < 0} << i;
  return mask;
}
inline __m512i mask_subtract(__m512i otherwise, uint64_t mask, __m512i a, __m512i b) {
  auto to = Bytes::from(otherwise);
  const auto x = Bytes::from(a), y = Bytes::from(b);
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) to.of[i] = static_cast<int8_t>(x.of[i] - y.of[i]);
  }
  return to.vector();
}
inline __m512i pairs_of_bytes(__m512i a, __m512i b) {
  const auto u = Lanes<__m512i, uint8_t, 64>::from(a);
  const auto w = Bytes::from(b);
  Words to;
  for (int i = 0; i < 32; ++i) {
    const int sum = u.of[2 * i] * w.of[2 * i] + u.of[2 * i + 1] * w.of[2 * i + 1];
    to.of[i] = static_cast<int16_t>(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return to.vector();
}
inline __m512i pairs_of_words(__m512i a, __m512i b) {
  const auto x = Words::from(a), y = Words::from(b);
  Ints to;
  for (int i = 0; i < 16; ++i) to.of[i] = x.of[2 * i] * y.of[2 * i] + x.of[2 * i + 1] * y.of[2 * i + 1];
  return to.vector();
}
inline __m512 load_first(uint32_t mask, const void* p) {
  Floats to = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(&to.of[i], static_cast<const char*>(p) + 4 * i, 4);
  }
  return to.vector();
}
#endif

}  // namespace emulated

#if defined(EMULATE_AVX512)
#define __AVX512F__ 1
#define _mm512_castsi256_si512 emulated::cast
#define _mm512_inserti64x4 emulated::insert
#define _mm512_cvtph_ps emulated::halves
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_set1_epi16 emulated::set_words
#define _mm512_set1_epi32 emulated::set_ints
#define _mm512_setzero_si512() emulated::set_ints(0)
#define _mm512_abs_epi8 emulated::absolute
#define _mm512_movepi8_mask emulated::negative
#define _mm512_mask_sub_epi8 emulated::mask_subtract
#define _mm512_maddubs_epi16 emulated::pairs_of_bytes
#define _mm512_madd_epi16 emulated::pairs_of_words
#define _mm512_maskz_loadu_ps emulated::load_first
#endif
#if defined(EMULATE_AVX512) && defined(EMULATE_VNNI)
#define __AVX512VNNI__ 1
#define _mm512_dpbusd_epi32 emulated::dpbusd<16>
#elif defined(EMULATE_VNNI)
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<8>
#endif
