// Matrix products whose every result is the same sum in the same order, whatever the other rows are.
//
// An element of C is a sum over chunks of kChain terms; inside a chunk one accumulator takes the terms in order by
// fused multiply-add, and the chunks are added up in order. No tile shape, row count or thread count enters into that,
// so a sequence gets the same bits alone or in a batch, and the short chains keep the rounding error below that of one
// long chain. Source for the blocking: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
// 2008.
//
// B is read in panels: kPanelVectors vectors of columns side by side, [K][kPanel], so that a chunk of a panel
// (kChain * kPanel elements) stays in the first-level cache while the rows of A go by.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

constexpr int64_t kChain = 128;
constexpr int kPanelVectors = 4;
// Rows of a register tile: rows x 4 accumulators, 4 or fewer operands and a broadcast per row within the registers
// (32 of AVX-512, else 16).
constexpr int kTileRows = kVectorBytes == 64 ? 6 : kVectorBytes == 32 ? 3 : 2;

template <class T>
constexpr int64_t kPanel = int64_t{kPanelVectors} * kLanes<T>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

enum class Into { kReplace, kAdd };

// C[kRows, kPanel] = or += A[kRows, k] B[k, kPanel], k <= kChain.
template <int kRows, class T>
inline void tile(int64_t k, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, Into into) {
  using V = Native<T>;
  V sum[kRows][kPanelVectors] = {};
  for (int64_t i = 0; i < k; ++i, b += kPanel<T>) {
    V left[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) left[r] = broadcast(a[r * lda + i]);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const V right = load(b + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][v] = fma(left[r], right, sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      T* to = c + r * ldc + v * kLanes<T>;
      store(to, into == Into::kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// One chunk of one panel for any number of rows, in tiles of nearly the same height: 8 rows are 4 + 4, not 6 + 2.
template <class T>
inline void tile_rows(int64_t rows, int64_t k, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, Into into) {
  for (int64_t tiles = ceil_div(rows, kTileRows); tiles > 0; --tiles) {
    const int64_t height = ceil_div(rows, tiles);
    switch (height) {
      case 1:
        tile<1>(k, a, lda, b, c, ldc, into);
        break;
      case 2:
        tile<2>(k, a, lda, b, c, ldc, into);
        break;
      case 3:
        tile<3>(k, a, lda, b, c, ldc, into);
        break;
      case 4:
        tile<4>(k, a, lda, b, c, ldc, into);
        break;
      case 5:
        tile<5>(k, a, lda, b, c, ldc, into);
        break;
      default:
        tile<6>(k, a, lda, b, c, ldc, into);
    }
    rows -= height;
    a += height * lda;
    c += height * ldc;
  }
}

// Which columns of B each vector of each panel holds: the groups of a panel are either kPanelVectors runs of the same
// kLanes units in kPanelVectors gates (so that one panel has all that a cell needs), or consecutive columns.
struct Columns {
  int64_t extent;  // units, or columns
  bool gates;

  template <class T>
  int64_t panels() const {
    return ceil_div(extent, gates ? kLanes<T> : kPanel<T>);
  }
  template <class T>
  int64_t first(int64_t panel, int v) const {
    return gates ? v * extent + panel * kLanes<T> : panel * kPanel<T> + v * kLanes<T>;
  }
  template <class T>
  int64_t valid(int64_t panel, int v) const {  // how many of the lanes exist
    const int64_t start = gates ? panel * kLanes<T> : panel * kPanel<T> + v * kLanes<T>;
    const int64_t left = extent - start;
    return left <= 0 ? 0 : min(left, kLanes<T>);
  }
};

// A matrix that is the right operand of a product, as stored: S[rows, cols], contiguous.
// kRowsAreColumns: B = w^T, as in x W^T (a forward product); kAsIs: B = w (a product with a gradient).
enum class Side { kRowsAreColumns, kAsIs };

template <class S>
struct Operand {
  using T = Compute<S>;
  const S* w;
  int64_t depth;  // K: the length of the sum
  int64_t stride;
  Columns columns;
  Side side;

  int64_t panels() const { return columns.template panels<T>(); }
  int64_t packed_size() const { return panels() * depth * kPanel<T>; }

  // Writes rows [k0, k0 + k) of a panel as [k][kPanel]; lanes that do not exist are zero.
  void pack(int64_t panel, int64_t k0, int64_t k, T* to) const {
    constexpr int kWidth = kLanes<T>;
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t valid = columns.template valid<T>(panel, v);
      const int64_t first = columns.template first<T>(panel, v);
      T* out = to + v * kWidth;
      if (side == Side::kAsIs) {
        const S* from = w + k0 * stride + first;
        for (int64_t i = 0; i < k; ++i) {
          store(out + i * kPanel<T>, valid > 0 ? load(from + i * stride, valid) : Native<T>{});
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
          for (int j = 0; j < kWidth; ++j) store(out + (i + j) * kPanel<T>, block[j]);
        } else {
          for (int64_t j = 0; j < n; ++j) store(out + (i + j) * kPanel<T>, block[j]);
        }
      }
    }
  }

  void pack_panels(int64_t begin, int64_t end, T* packed) const {
    for (int64_t p = begin; p < end; ++p) pack(p, 0, depth, packed + p * depth * kPanel<T>);
  }
};

// C[rows, kPanel] = or += A[rows, depth] times one panel. packed: the whole operand as pack_panels wrote it; or null,
// and each chunk is packed into `chunk` (kChain * kPanel elements) as it is needed: cheaper where it is used once.
template <class S>
inline void panel_product(const Operand<S>& b, const Compute<S>* packed, Compute<S>* chunk, int64_t panel, int64_t rows,
                          const Compute<S>* a, int64_t lda, Compute<S>* c, int64_t ldc, Into into) {
  using T = Compute<S>;
  for (int64_t k0 = 0; k0 < b.depth; k0 += kChain) {
    const int64_t k = min(kChain, b.depth - k0);
    const T* right = chunk;
    if (packed != nullptr) {
      right = packed + (panel * b.depth + k0) * kPanel<T>;
    } else {
      b.pack(panel, k0, k, chunk);
    }
    tile_rows(rows, k, a + k0, lda, right, c, ldc, into);
    into = Into::kAdd;
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
