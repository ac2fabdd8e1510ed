// Products of int8: sums of four products of bytes at a time, in int32, exact on every instruction set.
#pragma once

#include "common/gemm.h"
#include "recurrent/packed_weights.h"

namespace seqkernels::SEQKERNELS_ISA {

typedef int32_t Sum32 __attribute__((vector_size(kVectorBytes)));

// Rows of a register tile: accumulators, one vector per row and four more fit into the registers.
template <int kVectors>
constexpr int kInt8Rows = kVectorBytes == 64 ? (kVectors == 3 ? 6 : 4) : (kVectors == 3 ? 3 : 2);
// Depth of a block: a panel of 128 bytes per 4 k stays in the L1 cache, 16 KiB.
constexpr int64_t kInt8Block = 512;

// Four bytes of a row of A in every lane, in the form that dot4 takes.
struct FourBytes {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  __m512i unsigned_;
#elif defined(__AVX512F__)
  __m512i magnitude;
  __mmask64 negative;
#elif defined(__AVXVNNI__)
  __m256i unsigned_;
#elif defined(__AVX2__)
  __m256i value;
#else
  int32_t value[4];
#endif
};
// Whether dot4 adds products with (a + 128), so that 128 times the sum of the column must be subtracted.
#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
constexpr bool kOffset = true;
#else
constexpr bool kOffset = false;
#endif

SEQKERNELS_INLINE FourBytes four_bytes(const int8_t* a) {
  int32_t word;
  memcpy(&word, a, 4);
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return {_mm512_set1_epi32(word ^ int32_t(0x80808080))};
#elif defined(__AVX512F__)
  const __m512i value = _mm512_set1_epi32(word);
  return {_mm512_abs_epi8(value), _mm512_movepi8_mask(value)};
#elif defined(__AVXVNNI__)
  return {_mm256_set1_epi32(word ^ int32_t(0x80808080))};
#elif defined(__AVX2__)
  return {_mm256_set1_epi32(word)};
#else
  return {{a[0], a[1], a[2], a[3]}};
#endif
}

// sum + a . w over the four bytes of each lane. Without dot product instructions, the product of unsigned and signed
// bytes is used with the magnitude of one factor and the other one with the sign of both: a sum of two of its products
// is at most 2 * 127 * 127, which 16 bits hold. kRows: of the tile; with few rows, the magnitudes of a are shared by
// more products than those of w.
template <int kRows>
SEQKERNELS_INLINE Sum32 dot4(Sum32 sum, const FourBytes& a, Bits32 w) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return (Sum32)_mm512_dpbusd_epi32((__m512i)sum, a.unsigned_, (__m512i)w);
#elif defined(__AVX512F__)
  const __m512i signed_ = _mm512_mask_sub_epi8((__m512i)w, a.negative, _mm512_setzero_si512(), (__m512i)w);
  const __m512i pairs = _mm512_maddubs_epi16(a.magnitude, signed_);
  return sum + (Sum32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__)
  return (Sum32)_mm256_dpbusd_avx_epi32((__m256i)sum, a.unsigned_, (__m256i)w);
#elif defined(__AVX2__)
  const __m256i pairs = kRows < 3
                            ? _mm256_maddubs_epi16(_mm256_abs_epi8(a.value), _mm256_sign_epi8((__m256i)w, a.value))
                            : _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8(a.value, (__m256i)w));
  return sum + (Sum32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const Sum32 words = (Sum32)w;
  for (int i = 0; i < 4; ++i) sum += (words << (24 - 8 * i) >> 24) * a.value[i];
  return sum;
#endif
}

// sums[kRows, vectors] = or += A[kRows, 4 * (end - begin)] B, rows [begin, end) of B.
template <int kVectors, int kRows, class View>
SEQKERNELS_INLINE void int8_tile(const View& b, int64_t begin, int64_t end, const int8_t* a, int64_t lda, int32_t* sums,
                                 int64_t ldc, int64_t sums_of_b) {
  Sum32 sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Sum32 first = {};
    if (kOffset && begin == 0) first = (Sum32)b.words(sums_of_b, v) * -128;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r][v] = begin == 0 ? first : (Sum32)load(reinterpret_cast<float*>(sums + r * ldc + v * kLanes<float>));
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    FourBytes left[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) left[r] = four_bytes(a + r * lda + 4 * k);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Bits32 right = b.words(k, v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][v] = dot4<kRows>(sum[r][v], left[r], right);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(reinterpret_cast<float*>(sums + r * ldc + v * kLanes<float>), (Native<float>)sum[r][v]);
    }
  }
}

template <int kVectors, int kRows, class View>
SEQKERNELS_INLINE void int8_tile_of(int64_t height, const View& b, int64_t begin, int64_t end, const int8_t* a,
                                    int64_t lda, int32_t* sums, int64_t ldc, int64_t sums_of_b) {
  if constexpr (kRows > 1) {
    if (height < kRows) return int8_tile_of<kVectors, kRows - 1>(height, b, begin, end, a, lda, sums, ldc, sums_of_b);
  }
  int8_tile<kVectors, kRows>(b, begin, end, a, lda, sums, ldc, sums_of_b);
}

template <int kVectors, int kUnits, class View>
__attribute__((noinline)) void product_of_int8(const PackedProduct& p, const View& b) {
  constexpr int64_t kRowsAtOnce = 64;
  int32_t sums[kRowsAtOnce * kVectors * kLanes<float>];
  constexpr int64_t ldc = kVectors * kLanes<float>;
  const int64_t K4 = p.layout.padded_depth() / 4;
  Native<float> scales[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t start = p.column + v % kUnits * kLanes<float>, left = p.layout.extent - start;
    scales[v] = left > 0 ? load(p.scales + v / kUnits * p.gate_stride + start, left) : Native<float>{};
  }
  for (int64_t first = 0; first < p.rows; first += kRowsAtOnce) {
    const int64_t count = min(kRowsAtOnce, p.rows - first);
    const int8_t* const a = p.a.bytes + first * p.a.byte_stride;
    int64_t begin = 0;
    do {  // once for K = 0
      const int64_t end = min(K4, begin + (count == 1 ? K4 : kInt8Block / 4));
      for (int64_t r = 0; r < count; r += kInt8Rows<kVectors>) {
        int8_tile_of<kVectors, kInt8Rows<kVectors>>(count - r, b, begin, end, a + r * p.a.byte_stride, p.a.byte_stride,
                                                    sums + r * ldc, ldc, K4);
      }
      begin = end;
    } while (begin < K4);
    for (int64_t r = 0; r < count; ++r) {
      const Native<float> scale = broadcast(p.a.scales[first + r]);
      float* const to = p.c + (first + r) * p.ldc;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Sum32 sum = (Sum32)load(reinterpret_cast<float*>(sums + r * ldc + v * kLanes<float>));
        const Native<float> value = __builtin_convertvector(sum, Native<float>) * (scale * scales[v]);
        float* const at = to + v * kLanes<float>;
        store(at, p.add ? load(at) + value : value);
      }
    }
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
