// Packs rows for the products of tiles.
#pragma once

#include <cstdint>

#include "common/tiles.h"

namespace seqkernels::SEQKERNELS_ISA {

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
