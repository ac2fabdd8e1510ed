// Products of tiles in the L1 cache.
//
// An element of a product is the same chain of fused multiply-adds for any height and width of the tile, so a row has
// the same bits alone or in a batch.
#pragma once

#include <cstdint>

#include "common/tiles.h"

namespace seqkernels::SEQKERNELS_ISA {

constexpr int64_t kTerms = 128;  // terms of one chain

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

}  // namespace seqkernels::SEQKERNELS_ISA
