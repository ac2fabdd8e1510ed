// Matrix products with a fixed summation order: an element of C does not depend on the number of rows or threads.
//
// An element of C is summed in chains of kChain terms. Within a chain, one accumulator adds the terms in order by fused
// multiply-add; the chains are then added in order. Because tile shape, row count and thread count do not affect this
// order, a sequence produces the same bits alone or in a batch. Short chains also reduce the rounding error. Blocking:
// Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
//
// B is packed into panels [K][kPanel] of kVectors vectors of columns. A block of a panel (kBlock * kPanel elements,
// 32 KiB) stays in the L1 cache while all rows of A are multiplied with it.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

constexpr int64_t kBlock = 128;
constexpr int64_t kChain = 64;
constexpr int kPlainVectors = 4;  // vectors of a panel without gates
// Rows of a register tile. The accumulators (rows x vectors), one operand vector and one broadcast per row fit into the
// vector registers: 32 with AVX-512, 16 otherwise.
template <int kVectors>
constexpr int kTileRows = kVectorBytes == 64   ? (kVectors == 3 ? 8 : 6)
                          : kVectorBytes == 32 ? (kVectors == 3 ? 4 : 3)
                                               : 2;

template <class T, int kVectors = kPlainVectors>
constexpr int64_t kPanel = int64_t{kVectors} * kLanes<T>;

enum class Into { kReplace, kAdd };

// C[kRows, kPanel] = or += A[kRows, k] B[k, kPanel], one chain.
template <int kVectors, int kRows, class T>
inline void tile(int64_t k, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, Into into) {
  using V = Native<T>;
  V sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < k; ++i, b += kPanel<T, kVectors>) {
    // The smaller side stays in registers: 12 accumulators, 3 vectors and 1 broadcast are the 16 registers of AVX2.
    if constexpr (kVectors < kRows) {
      V right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V left = broadcast(a[r * lda + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    } else {
      V left[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) left[r] = broadcast(a[r * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V right = load(b + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] = fma(left[r], right, sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + r * ldc + v * kLanes<T>;
      store(to, into == Into::kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// Calls tile<> with `height` rows, 1 to kRows.
template <int kVectors, int kRows, class T>
inline void tile_of(int64_t height, int64_t k, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, Into into) {
  if constexpr (kRows > 1) {
    if (height < kRows) return tile_of<kVectors, kRows - 1>(height, k, a, lda, b, c, ldc, into);
  }
  tile<kVectors, kRows>(k, a, lda, b, c, ldc, into);
}

// Multiplies one block of one panel with any number of rows, in tiles of nearly equal height: 8 rows become 4 + 4, not
// 6 + 2.
template <int kVectors, class T>
inline void tile_rows(int64_t rows, int64_t k, int64_t chain, const T* a, int64_t lda, const T* b, T* c, int64_t ldc,
                      Into into) {
  for (int64_t tiles = ceil_div(rows, kTileRows<kVectors>); tiles > 0; --tiles) {
    const int64_t height = ceil_div(rows, tiles);
    for (int64_t i = 0; i < k; i += chain) {
      tile_of<kVectors, kTileRows<kVectors>>(height, min(chain, k - i), a + i, lda, b + i * kPanel<T, kVectors>, c, ldc,
                                             i == 0 ? into : Into::kAdd);
    }
    rows -= height;
    a += height * lda;
    c += height * ldc;
  }
}

// Maps the vectors of a panel to columns of B: `units` vectors of consecutive columns of the first gate, then the same
// columns of the next gate, so that one panel holds all gates of its hidden units. Without gates, `units` is the number
// of vectors of a panel.
struct Columns {
  int64_t extent;  // columns of a gate
  int64_t units;
  int64_t stride = 0;  // between gates

  template <class T>
  int64_t panels() const {
    return ceil_div(extent, units * kLanes<T>);
  }
  template <class T>
  int64_t start(int64_t panel, int v) const {  // within the gate
    return (panel * units + v % units) * kLanes<T>;
  }
  template <class T>
  int64_t first(int64_t panel, int v) const {
    return v / units * stride + start<T>(panel, v);
  }
  template <class T>
  int64_t valid(int64_t panel, int v) const {  // number of lanes within the columns
    const int64_t left = extent - start<T>(panel, v);
    return left <= 0 ? 0 : min(left, kLanes<T>);
  }
};

// The right operand of a product as stored: contiguous S[rows, cols].
// kRowsAreColumns: B = w^T, as in x W^T (forward products). kAsIs: B = w (products with a gradient).
enum class Side { kRowsAreColumns, kAsIs };

template <class S, int kVectors = kPlainVectors>
struct Operand {
  using T = Compute<S>;
  static constexpr int64_t kWidthOfPanel = kPanel<T, kVectors>;
  const S* w;
  int64_t depth;  // K: the length of the sum
  int64_t stride;
  Columns columns;
  Side side;

  int64_t panels() const { return columns.template panels<T>(); }
  int64_t packed_size() const { return panels() * depth * kWidthOfPanel; }

  // Packs rows [k0, k0 + k) of a panel as [k][kPanel]; lanes beyond the last column are zero.
  void pack(int64_t panel, int64_t k0, int64_t k, T* to) const {
    constexpr int kWidth = kLanes<T>;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t valid = columns.template valid<T>(panel, v);
      const int64_t first = columns.template first<T>(panel, v);
      T* out = to + v * kWidth;
      if (side == Side::kAsIs) {
        const S* from = w + k0 * stride + first;
        for (int64_t i = 0; i < k; ++i) {
          store(out + i * kWidthOfPanel, valid > 0 ? load(from + i * stride, valid) : Native<T>{});
        }
        continue;
      }
      const S* from = w + first * stride + k0;
      for (int64_t i = 0; i < k; i += kWidth) {
        const int64_t n = min(kWidth, k - i);
        Native<T> block[kWidth];
        if (n == kWidth && valid == kWidth) {
#pragma GCC unroll 16
          for (int j = 0; j < kWidth; ++j) block[j] = load(from + j * stride + i);
        } else {
          for (int j = 0; j < kWidth; ++j) block[j] = j < valid ? load(from + j * stride + i, n) : Native<T>{};
        }
        transpose(block);
        if (n == kWidth) {
#pragma GCC unroll 16
          for (int j = 0; j < kWidth; ++j) store(out + (i + j) * kWidthOfPanel, block[j]);
        } else {
          for (int64_t j = 0; j < n; ++j) store(out + (i + j) * kWidthOfPanel, block[j]);
        }
      }
    }
  }

  void pack_panels(int64_t begin, int64_t end, T* packed) const {
    for (int64_t p = begin; p < end; ++p) pack(p, 0, depth, packed + p * depth * kWidthOfPanel);
  }
};

// C[rows, kPanel] = or += A[rows, depth] times one panel. `packed` is the whole operand as written by pack_panels. If
// it is null, each block is packed into `block` (kBlock * kPanel elements) before its use, which is faster for an
// operand that is used once.
template <class S, int kVectors>
inline void panel_product(const Operand<S, kVectors>& b, const Compute<S>* packed, Compute<S>* block, int64_t panel,
                          int64_t rows, const Compute<S>* a, int64_t lda, Compute<S>* c, int64_t ldc, Into into) {
  using T = Compute<S>;
  if (b.depth == 0 && into == Into::kReplace) {  // an empty sum
    for (int64_t r = 0; r < rows; ++r) memset(c + r * ldc, 0, kPanel<T, kVectors> * sizeof(T));
  }
  for (int64_t k0 = 0; k0 < b.depth; k0 += kBlock) {
    const int64_t k = min(kBlock, b.depth - k0);
    const T* right = block;
    if (packed != nullptr) {
      right = packed + (panel * b.depth + k0) * kPanel<T, kVectors>;
    } else {
      b.pack(panel, k0, k, block);
    }
    tile_rows<kVectors>(rows, k, kChain, a + k0, lda, right, c, ldc, into);
    into = Into::kAdd;
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
