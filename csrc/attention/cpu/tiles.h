// Building blocks of attention's CPU kernels: products of tiles in the L1 cache, dropout's generator, packing.
//
// An element of a product is the same chain of fused multiply-adds for any height and width of the tile, so a row has
// the same bits alone or in a batch.
#pragma once

#include <cstdint>

#include "attention/plan.h"
#include "common/gemm.h"
#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

using attention::kChunkKeys;
using attention::kKeys;
using attention::kRows;
constexpr int64_t kTerms = 128;  // terms of one chain

template <class T>
constexpr int64_t kStrip = 2 * kLanes<T>;  // columns of a product's tile
// Rows of a product's tile: accumulators, an operand and a broadcast fit into 32 registers of AVX-512, else 16.
constexpr int kHeight = kVectorBytes == 64 ? 12 : 6;

// Columns of a packed row: whole strips, and never a power of two, which would map consecutive rows to few cache sets.
template <class T>
inline int64_t leading(int64_t D) {
  const int64_t whole = round_up(D < 1 ? 1 : D, kStrip<T>);
  return whole * int64_t(sizeof(T)) % 256 == 0 ? whole + 64 / int64_t(sizeof(T)) : whole;
}

// Takes n elements from working memory, in multiples of 64 bytes.
template <class T>
inline T* take(T*& at, int64_t n) {
  T* here = at;
  at += round_up(n, 64 / int64_t(sizeof(T)));
  return here;
}

template <class T>
SEQKERNELS_INLINE T maximum(T a, T b) {
  return a > b ? a : b;
}

// Products.

// Layout of the left operand: element (r, i) is at r * lda + i, or at i * lda + r.
enum class LeftLayout { kRows, kColumns };
// C is replaced by the product, or C += product, or C = C * factor[row] + product.
enum class Update { kReplace, kAdd, kScale };

// The right operand: strip s is [k][ldb] at b + s * strip.
template <class T>
struct RightOperand {
  const T* b;
  int64_t ldb, strip;
};

template <int kR, int kS, LeftLayout kLeft, class T>
inline void tile_product(int64_t k, const T* a, int64_t lda, RightOperand<T> right, T* c, int64_t ldc, Update update,
                         const T* factor) {
  using V = Native<T>;
  V sum[kR][2 * kS] = {};
  const T* b = right.b;
  for (int64_t i = 0; i < k; ++i, b += right.ldb) {
    V column[2 * kS];
#pragma GCC unroll 8
    for (int s = 0; s < 2 * kS; ++s) column[s] = load(b + s / 2 * right.strip + s % 2 * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const V left = broadcast(kLeft == LeftLayout::kRows ? a[r * lda + i] : a[i * lda + r]);
#pragma GCC unroll 8
      for (int s = 0; s < 2 * kS; ++s) sum[r][s] = fma(left, column[s], sum[r][s]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < 2 * kS; ++s) {
      T* to = c + r * ldc + s * kLanes<T>;
      V v = sum[r][s];
      if (update == Update::kAdd) v = load(to) + v;
      if (update == Update::kScale) v = fma(load(to), broadcast(factor[r]), v);
      store(to, v);
    }
  }
}

template <int kR, int kS, LeftLayout kLeft, class T>
inline void tile_product_of(int64_t height, int64_t k, const T* a, int64_t lda, RightOperand<T> right, T* c,
                            int64_t ldc, Update update, const T* factor) {
  if constexpr (kR > 1) {
    if (height < kR) return tile_product_of<kR - 1, kS, kLeft>(height, k, a, lda, right, c, ldc, update, factor);
  }
  tile_product<kR, kS, kLeft>(k, a, lda, right, c, ldc, update, factor);
}

// C[rows, strips * kStrip] from A[rows, k] and B[k, ..], in chains of kTerms.
template <LeftLayout kLeft = LeftLayout::kRows, class T>
inline void product(int64_t rows, int64_t k, const T* a, int64_t lda, RightOperand<T> right, int64_t strips, T* c,
                    int64_t ldc, Update update, const T* factor = nullptr) {
  const int64_t step = kLeft == LeftLayout::kRows ? lda : 1, along = kLeft == LeftLayout::kRows ? 1 : lda;
  int64_t i = 0;
  do {
    const int64_t n = min(kTerms, k - i);
    int64_t s = 0;
    const T* left = a + i * along;
    const auto at = [&](int64_t strip) {
      return RightOperand<T>{right.b + i * right.ldb + strip * right.strip, right.ldb, right.strip};
    };
    if (rows == 1) {  // a single row has few independent sums: several strips at a time
      for (; s + 4 <= strips; s += 4) {
        tile_product<1, 4, kLeft>(n, left, lda, at(s), c + s * kStrip<T>, ldc, update, factor);
      }
    } else if (rows == 2) {
      for (; s + 2 <= strips; s += 2) {
        tile_product<2, 2, kLeft>(n, left, lda, at(s), c + s * kStrip<T>, ldc, update, factor);
      }
    }
    for (; s < strips; ++s) {
      int64_t left_over = rows, first = 0;
      for (int64_t tiles = ceil_div(rows, kHeight); tiles > 0; --tiles) {
        const int64_t height = ceil_div(left_over, tiles);
        tile_product_of<kHeight, 1, kLeft>(height, n, left + first * step, lda, at(s), c + first * ldc + s * kStrip<T>,
                                           ldc, update, factor == nullptr ? nullptr : factor + first);
        left_over -= height;
        first += height;
      }
    }
    update = Update::kAdd;
    i += n;
  } while (i < k);
}

// The same product restricted to the visible terms of each row, so that a NaN in a hidden key or value does not reach
// the row. kRows: term i of row r if bit i of visible[r] is set; kColumns: if bit r of visible[i] is set.
template <LeftLayout kLeft, class T>
inline void masked_product(int64_t rows, int64_t k, const T* a, int64_t lda, const uint64_t* visible, const T* b,
                           int64_t ldb, int64_t width, T* c, int64_t ldc, Update update, const T* factor = nullptr) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      Native<T> sum = {};
      for (int64_t i = 0; i < k; ++i) {
        const bool takes = kLeft == LeftLayout::kRows ? visible[r] >> i & 1 : visible[i] >> r & 1;
        if (!takes) continue;
        sum = fma(broadcast(kLeft == LeftLayout::kRows ? a[r * lda + i] : a[i * lda + r]), load(b + i * ldb + d), sum);
      }
      T* to = c + r * ldc + d;
      if (update == Update::kAdd) sum = load(to) + sum;
      if (update == Update::kScale) sum = fma(load(to), broadcast(factor[r]), sum);
      store(to, sum);
    }
  }
}

// Reductions.

template <class T>
SEQKERNELS_INLINE T sum_of(Native<T> v) {
  T lanes[kLanes<T>], sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes<T>; ++i) sum += lanes[i];
  return sum;
}

// Dropout.

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

// Packing.

// Packs rows [n, D] as [n][ld], with zeros up to whole strips. Returns whether all numbers are finite.
template <class S>
inline bool pack_rows(const S* x, int64_t stride, int64_t stride_d, int64_t n, int64_t D, Compute<S>* to, int64_t ld) {
  using T = Compute<S>;
  constexpr int kWidth = kLanes<T>;
  const int64_t whole = round_up(D < 1 ? 1 : D, kStrip<T>);
  constexpr int kAtOnce = 4;  // independent sums
  Native<T> non_finite[kAtOnce] = {};
  for (int64_t r = 0; r < n; ++r, x += stride, to += ld) {
    int64_t d = 0;
    if (stride_d == 1) {
      for (; d + kAtOnce * kWidth <= D; d += kAtOnce * kWidth) {
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) {
          const Native<T> v = load(x + d + i * kWidth);
          non_finite[i] = fma(v, Native<T>{}, non_finite[i]);
          store(to + d + i * kWidth, v);
        }
      }
    }
    for (; d < whole; d += kWidth) {
      S lanes[kWidth] = {};
      for (int64_t l = 0; l < kWidth && d + l < D; ++l) lanes[l] = x[(d + l) * stride_d];
      const Native<T> v = load(lanes);
      non_finite[0] = fma(v, Native<T>{}, non_finite[0]);
      store(to + d, v);
    }
  }
  return sum_of<T>((non_finite[0] + non_finite[1]) + (non_finite[2] + non_finite[3])) == 0;
}

// Swaps the off-diagonal blocks at distance s. s is a template parameter so that the shuffle masks are constants, which
// is much faster.
template <int s, class V, int kWidth>
SEQKERNELS_INLINE void swap_blocks(V (&r)[kWidth]) {
  typedef decltype(r[0] < r[0]) Mask;
  Mask low = {}, high = {};
#pragma GCC unroll 16
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
template <class V, int kWidth>
SEQKERNELS_INLINE void transpose_block(V (&r)[kWidth]) {  // r[i][j] becomes r[j][i]
  if constexpr (kWidth == 16) {
    transpose(r);
  } else {
    if constexpr (kWidth > 1) swap_blocks<1>(r);
    if constexpr (kWidth > 2) swap_blocks<2>(r);
    if constexpr (kWidth > 4) swap_blocks<4>(r);
  }
}

// Packs rows [n, D] as strips of columns [ceil(n / kStrip)][D][kStrip], with zeros where there is no row.
template <class S>
inline void pack_strips(const S* x, int64_t stride, int64_t stride_d, int64_t n, int64_t D, Compute<S>* to) {
  using T = Compute<S>;
  constexpr int kWidth = kLanes<T>;
  for (int64_t row = 0; row < round_up(n, kStrip<T>); row += kWidth) {
    T* strip = to + row / kStrip<T> * D * kStrip<T> + row % kStrip<T>;
    const int64_t rows = n - row;
    for (int64_t d = 0; d < D; d += kWidth) {
      const S* from = x + row * stride + d * stride_d;
      const int64_t columns = min(kWidth, D - d);
      Native<T> block[kWidth];
      if (stride_d == 1 && columns == kWidth && rows >= kWidth) {
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) block[j] = load(from + j * stride);
        transpose_block(block);
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) store(strip + (d + j) * kStrip<T>, block[j]);
        continue;
      }
      for (int j = 0; j < kWidth; ++j) {
        S lanes[kWidth] = {};
        for (int64_t l = 0; l < columns && j < rows; ++l) lanes[l] = from[j * stride + l * stride_d];
        block[j] = load(lanes);
      }
      transpose_block(block);
      for (int64_t j = 0; j < columns; ++j) store(strip + (d + j) * kStrip<T>, block[j]);
    }
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
