// Sizes of the tiles of products in the L1 cache, and small functions for them.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

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

template <class T>
SEQKERNELS_INLINE T sum_of(Native<T> v) {
  T lanes[kLanes<T>], sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes<T>; ++i) sum += lanes[i];
  return sum;
}

}  // namespace seqkernels::SEQKERNELS_ISA
