// Products of int8: sums of four products of bytes at a time, in int32, exact on every instruction set.
#pragma once

#include "common/gemm.h"
#include "recurrent/packed_weights.h"

namespace seqkernels::SEQKERNELS_ISA {

typedef int32_t Sum32 __attribute__((vector_size(kVectorBytes)));

// Rows of a register tile: accumulators, one vector per row and four more fit into the registers. Tiles of 4 rows and
// half of the vectors are slower, although they read a panel half as often.
template <int kVectors>
constexpr int kInt8Rows = kVectorBytes == 64 ? (kVectors == 3 ? 6 : 4) : (kVectors == 3 ? 3 : 2);
// Depth of a block: a panel of 128 bytes per 4 k stays in the L1 cache, 16 KiB.
constexpr int64_t kInt8Block = 512;

// dot4(sum, a, w) is sum + a . w over the four bytes of each lane. a: four bytes of a row in every lane; w: four bytes
// of a column in each lane. kRows: of the tile. first_sum: the value that a sum starts with, from the rows of a panel
// after its values: the sum of the column, and that of the magnitudes of its negative values.
template <int kRows>
struct Dot;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// Dot product instructions multiply unsigned and signed bytes: a + 128 in place of a.
template <int kRows>
struct Dot {
#if defined(__AVX512VNNI__)
  using Vector = __m512i;
  static SEQKERNELS_INLINE Vector splat(int32_t word) { return _mm512_set1_epi32(word); }
  static SEQKERNELS_INLINE Vector product(Vector sum, Vector a, Vector w) { return _mm512_dpbusd_epi32(sum, a, w); }
#else
  using Vector = __m256i;
  static SEQKERNELS_INLINE Vector splat(int32_t word) { return _mm256_set1_epi32(word); }
  static SEQKERNELS_INLINE Vector product(Vector sum, Vector a, Vector w) { return _mm256_dpbusd_avx_epi32(sum, a, w); }
#endif
  struct Left {
    Vector above;  // a + 128
    explicit Left(int32_t word) : above(splat(word ^ int32_t(0x80808080))) {}
  };
  struct Right {
    Vector value;
    explicit Right(Bits32 w) : value((Vector)w) {}
  };
  template <class View>
  static SEQKERNELS_INLINE Sum32 first_sum(const View& b, int64_t after, int v) {
    return (Sum32)b.words(after, v) * -128;
  }
  static SEQKERNELS_INLINE Sum32 dot4(Sum32 sum, const Left& a, const Right& w) {
    return (Sum32)product((Vector)sum, a.above, w.value);
  }
};

#elif defined(__AVX512F__)

// Unsigned by signed bytes: |a|, and w with the sign of a. A sum of two of the products is at most 2 * 127 * 127, which
// 16 bits hold.
template <int kRows>
struct Dot {
  struct Left {
    __m512i magnitude;
    __mmask64 negative;
    explicit Left(int32_t word) {
      const __m512i value = _mm512_set1_epi32(word);
      magnitude = _mm512_abs_epi8(value);
      negative = _mm512_movepi8_mask(value);
    }
  };
  struct Right {
    __m512i value;
    explicit Right(Bits32 w) : value((__m512i)w) {}
  };
  template <class View>
  static SEQKERNELS_INLINE Sum32 first_sum(const View&, int64_t, int) {
    return Sum32{};
  }
  static SEQKERNELS_INLINE Sum32 dot4(Sum32 sum, const Left& a, const Right& w) {
    const __m512i other = _mm512_mask_sub_epi8(w.value, a.negative, _mm512_setzero_si512(), w.value);
    const __m512i pairs = _mm512_maddubs_epi16(a.magnitude, other);
    return sum + (Sum32)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
};

#elif defined(__AVX2__)

// Unsigned by signed bytes, as above. With few rows the magnitudes are those of a, which all columns share, and w gets
// the sign of a. From 3 rows on they are those of w, which all rows share, and the bits of a are flipped where w is
// negative: -a - 1 in place of -a, at most 2 * 127 * 128 for two products, which the first value of the sum corrects. A
// sign takes one of the two vector units that the products need, a flip any of four.
template <int kRows>
struct Dot {
  static constexpr bool kFlips = kRows >= 3;
  struct Left {
    __m256i value;
    explicit Left(int32_t word) : value(_mm256_set1_epi32(word)) {}
  };
  struct Right {
    __m256i value, negative, magnitude;
    explicit Right(Bits32 w) : value((__m256i)w) {
      if constexpr (kFlips) {
        negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), value);
        magnitude = _mm256_abs_epi8(value);
      }
    }
  };
  template <class View>
  static SEQKERNELS_INLINE Sum32 first_sum(const View& b, int64_t after, int v) {
    return kFlips ? (Sum32)b.words(after + 1, v) : Sum32{};
  }
  static SEQKERNELS_INLINE Sum32 dot4(Sum32 sum, const Left& a, const Right& w) {
    __m256i pairs;
    if constexpr (kFlips) {
      pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_xor_si256(a.value, w.negative));
    } else {
      pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a.value), _mm256_sign_epi8(w.value, a.value));
    }
    return sum + (Sum32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};

#else

template <int kRows>
struct Dot {
  struct Left {
    int32_t value[4];
    explicit Left(int32_t word) {
      for (int i = 0; i < 4; ++i) value[i] = int8_t(word >> (8 * i));
    }
  };
  struct Right {
    Sum32 value[4];
    explicit Right(Bits32 w) {
      for (int i = 0; i < 4; ++i) value[i] = (Sum32)w << (24 - 8 * i) >> 24;
    }
  };
  template <class View>
  static SEQKERNELS_INLINE Sum32 first_sum(const View&, int64_t, int) {
    return Sum32{};
  }
  static SEQKERNELS_INLINE Sum32 dot4(Sum32 sum, const Left& a, const Right& w) {
    for (int i = 0; i < 4; ++i) sum += w.value[i] * a.value[i];
    return sum;
  }
};

#endif

// sums[kRows, vectors] = or += A[kRows, 4 * (end - begin)] B, rows [begin, end) of B. after: the row of B after its
// values.
template <int kVectors, int kRows, class View>
SEQKERNELS_INLINE void int8_tile(const View& b, int64_t begin, int64_t end, const int8_t* a, int64_t lda, int32_t* sums,
                                 int64_t ldc, int64_t after) {
  using D = Dot<kRows>;
  Sum32 sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Sum32 first = D::first_sum(b, after, v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r][v] = begin == 0 ? first : (Sum32)load(reinterpret_cast<float*>(sums + r * ldc + v * kLanes<float>));
    }
  }
  for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const typename D::Right right(b.words(k, v));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t word;
        memcpy(&word, a + r * lda + 4 * k, 4);
        sum[r][v] = D::dot4(sum[r][v], typename D::Left(word), right);
      }
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

// `height` rows, 1 to kRows.
template <int kVectors, int kRows, class View>
SEQKERNELS_INLINE void int8_tile_of(int64_t height, const View& b, int64_t begin, int64_t end, const int8_t* a,
                                    int64_t lda, int32_t* sums, int64_t ldc, int64_t after) {
  if constexpr (kRows > 1) {
    if (height < kRows) return int8_tile_of<kVectors, kRows - 1>(height, b, begin, end, a, lda, sums, ldc, after);
  }
  int8_tile<kVectors, kRows>(b, begin, end, a, lda, sums, ldc, after);
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
      int64_t r = 0;
      for (int64_t tiles = ceil_div(count, kInt8Rows<kVectors>); tiles > 0; --tiles) {  // of nearly equal height
        const int64_t height = ceil_div(count - r, tiles);
        int8_tile_of<kVectors, kInt8Rows<kVectors>>(height, b, begin, end, a + r * p.a.byte_stride, p.a.byte_stride,
                                                    sums + r * ldc, ldc, K4);
        r += height;
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
