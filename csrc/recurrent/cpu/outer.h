// Products over all tokens: weight gradients.
#pragma once

#include "recurrent/cpu/layer.h"

namespace seqkernels::SEQKERNELS_ISA {

// Products summed per chain: chains near the square root of the number of
// tokens minimise rounding errors.
constexpr int64_t kOuterChain = 32;

// A right operand with rows at row(n) (null: zeros); its sums start at panel
// `at`.
template <class RowOf>
struct RightOperand {
  int64_t columns, at;
  RowOf row;
};
template <class RowOf>
RightOperand(int64_t, int64_t, RowOf) -> RightOperand<RowOf>;

// Columns [m.begin, m.end) of A, transposed, times B: out[m, n] = sum over rows
// of A[row, m] * B[row, n] in row order; and the column sums of A.
template <class T>
struct OuterProduct {
  T *left, *right, *sums, *column_sums;
  int64_t cap;  // columns of A per share

  static void measure(Arena& arena, int64_t threads, int64_t cap, int64_t panels, OuterProduct& p) {
    cap = round_up(cap, kLanes<T>);
    p.cap = cap;
    p.left = arena.take<T>(threads * cap * kBlock);
    p.right = arena.take<T>(threads * kBlock * kPanel<T>);
    p.sums = arena.take<T>(threads * panels * cap * kPanel<T>);
    p.column_sums = arena.take<T>(threads * cap);
  }
  OuterProduct of(int64_t thread, int64_t panels) const {
    return {left + thread * cap * kBlock, right + thread * kBlock * kPanel<T>, sums + thread * panels * cap * kPanel<T>,
            column_sums + thread * cap, cap};
  }

  // Transposes rows [r0, r0 + k) of A into left [m][k] and adds them to
  // column_sums.
  void take_left(const T* a, int64_t lda, Range m, int64_t r0, int64_t k, bool first) const {
    constexpr int kWidth = kLanes<T>;
    for (int64_t j = 0; j < m.size(); j += kWidth) {
      const int64_t valid = min(kWidth, m.size() - j);
      Native<T> sum = first ? Native<T>{} : load(column_sums + j);
      for (int64_t i = 0; i < k; i += kWidth) {
        const int64_t n = min(kWidth, k - i);
        const T* from = a + (r0 + i) * lda + m.begin + j;
        Native<T> block[kWidth];
        for (int r = 0; r < kWidth; ++r) block[r] = r < n ? load(from + r * lda, valid) : Native<T>{};
        Native<T> partial = block[0];
        for (int r = 1; r < kWidth; ++r) partial += block[r];
        sum += partial;
        transpose(block);
        for (int r = 0; r < kWidth; ++r) store(left + (j + r) * kBlock + i, block[r]);
      }
      store(column_sums + j, sum);
    }
  }

  template <class RowOf>
  void add(const RightOperand<RowOf>& b, int64_t m, int64_t r0, int64_t k, bool first) const {
    for (int64_t p = 0; p < ceil_div(b.columns, kPanel<T>); ++p) {
      const int64_t n = min(kPanel<T>, b.columns - p * kPanel<T>);
      for (int64_t i = 0; i < k; ++i) {
        const auto* from = b.row(r0 + i);
        for (int v = 0; v < kPlainVectors; ++v) {
          const int64_t c = v * kLanes<T>, valid = min(kLanes<T>, n - c);
          store(right + i * kPanel<T> + c,
                from != nullptr && valid > 0 ? load(from + p * kPanel<T> + c, valid) : Native<T>{});
        }
      }
      tile_rows<kPlainVectors>(m, k, kOuterChain, left, kBlock, right, sums + (b.at + p) * cap * kPanel<T>, kPanel<T>,
                               first ? Into::kReplace : Into::kAdd);
    }
  }

  // Reads A once for all right operands.
  template <class... RowOf>
  void accumulate(const T* a, int64_t lda, Range m, int64_t rows, const RightOperand<RowOf>&... b) const {
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t k = min(kBlock, rows - r);
      take_left(a, lda, m, r, k, r == 0);
      (add(b, m.size(), r, k, r == 0), ...);
    }
  }

  template <class S>
  void write_sums(S* to, Range m, bool empty) const {
    if (to == nullptr) return;
    if (empty) {
      memset(static_cast<void*>(to + m.begin), 0, m.size() * sizeof(S));
    } else {
      convert(to + m.begin, column_sums, m.size());
    }
  }

  // Writes rows m of a matrix with `columns` columns.
  template <class S>
  void write(S* to, int64_t columns, Range m, int64_t at, bool empty) const {
    for (int64_t j = 0; j < m.size(); ++j) {
      for (int64_t c = 0; c < columns; c += kPanel<T>) {
        S* row = to + (m.begin + j) * columns + c;
        const int64_t n = min(kPanel<T>, columns - c);
        if (empty) {
          memset(static_cast<void*>(row), 0, n * sizeof(S));
        } else {
          convert(row, sums + ((at + c / kPanel<T>)*cap + j) * kPanel<T>, n);
        }
      }
    }
  }
};

// Sums over the tokens of a stream and row group, for every unit of several
// vectors: gradients of peepholes and gains. Rows are summed in short runs, and
// the runs in order.
template <class T>
struct UnitSums {
  static constexpr int64_t kRun = 32;
  T *run, *total;  // [vectors, HV]
  int64_t HV;

  static int64_t size(int64_t vectors, int64_t HV) { return 2 * vectors * HV; }
  static UnitSums at(T* memory, int64_t vectors, int64_t HV) { return {memory, memory + vectors * HV, HV}; }

  SEQKERNELS_INLINE void add(int vector, int64_t u, Native<T> value) const {
    T* to = run + vector * HV + u;
    store(to, load(to) + value);
  }
  void clear(int vectors, Range own) const {
    for (int k = 0; k < vectors; ++k) {
      for (int64_t u = own.begin; u < round_up(own.end, kLanes<T>); ++u) run[k * HV + u] = total[k * HV + u] = 0;
    }
  }
  void flush(int vectors, Range own) const {
    for (int k = 0; k < vectors; ++k) {
      for (int64_t u = own.begin; u < own.end; u += kLanes<T>) {
        T *from = run + k * HV + u, *to = total + k * HV + u;
        store(to, load(to) + load(from));
        store(from, Native<T>{});
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
