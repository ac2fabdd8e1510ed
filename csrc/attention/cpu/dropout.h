// Dropout of attention weights: a counter-based generator and the mask of kept weights.
#pragma once

#include <cstdint>

#include "attention/cpu/tiles.h"

namespace seqkernels::SEQKERNELS_ISA {

typedef uint64_t Word64 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Word64Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

// The products of the low 32 bits of each lane.
SEQKERNELS_INLINE Word64 low_product(Word64 a, Word64 b) {
#if defined(__AVX512F__)
  return (Word64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // _mm512_mul_epu32 triggers -Wuninitialized
#elif defined(__AVX2__)
  return (Word64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Random words of kKeys weights of row i from key j0 on: word j % 4 of Philox 4x32 with 7 rounds at counter (j / 4, i,
// head, 0). j0 is a multiple of 4. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
inline void philox(uint64_t seed, int64_t head, int64_t i, int64_t j0, uint32_t* words) {
  constexpr int kWide = kVectorBytes / 8;
  constexpr int kBatches = kKeys / 4 / kWide < 2 ? 1 : 2;  // in flight together
  const Word64 zero = {};
  Word64 lanes, low, high;
  for (int l = 0; l < kWide; ++l) {
    lanes[l] = l;
    low[l] = l % 2 * kWide + l / 2;
    high[l] = l % 2 * kWide + l / 2 + kWide / 2;
  }
  const Word64 factor0 = zero + 0xD2511F53u, factor1 = zero + 0xCD9E8D57u;
  for (int64_t j = 0; j < kKeys; j += 4 * kWide * kBatches) {
    Word64 c0[kBatches], c1[kBatches], c2[kBatches], c3[kBatches];
    for (int b = 0; b < kBatches; ++b) {
      c0[b] = lanes + uint64_t((j0 + j) / 4 + b * kWide);
      c1[b] = zero + uint64_t(uint32_t(i));
      c2[b] = zero + uint64_t(uint32_t(head));
      c3[b] = zero;
    }
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
#pragma GCC unroll 2
      for (int b = 0; b < kBatches; ++b) {
        const Word64 p0 = low_product(c0[b], factor0), p1 = low_product(c2[b], factor1);
        c0[b] = (p1 >> 32) ^ c1[b] ^ (zero + uint64_t(key0));
        c2[b] = (p0 >> 32) ^ c3[b] ^ (zero + uint64_t(key1));
        c1[b] = p1;
        c3[b] = p0;
      }
    }
    for (int b = 0; b < kBatches; ++b) {
      const Word64 first = (c0[b] & 0xffffffff) | c1[b] << 32, second = (c2[b] & 0xffffffff) | c3[b] << 32;
      uint32_t* to = words + j + b * 4 * kWide;
      *reinterpret_cast<Word64Unaligned*>(to) = __builtin_shuffle(first, second, low);
      *reinterpret_cast<Word64Unaligned*>(to + 2 * kWide) = __builtin_shuffle(first, second, high);
    }
  }
}

// Mask of the weights that dropout keeps (word >= threshold), by a signed comparison of shifted values.
template <class T>
SEQKERNELS_INLINE typename Vec<T>::NativeInt keep_mask(const uint32_t* words, int64_t threshold) {
  using I = typename Vec<T>::NativeInt;
  constexpr int kWidth = kLanes<T>;
  typedef uint32_t Words __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
  typedef uint32_t Aligned __attribute__((vector_size(4 * kWidth)));
  const Aligned w = *reinterpret_cast<const Words*>(words);
  if constexpr (sizeof(T) == 4) {
    const I signed_words = (I)(w ^ 0x80000000u);
    return threshold > 0xffffffff ? I{} : signed_words >= (I{} + int32_t(uint32_t(threshold) ^ 0x80000000u));
  } else {
    return __builtin_convertvector(w, I) >= (I{} + threshold);
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
