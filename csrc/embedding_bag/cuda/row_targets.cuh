// Destinations of the summed gradients of rows: a dense or sparse gradient (StoreRow), or an optimizer step (StepRow).
#pragma once

#include "embedding_bag/cuda/partials.cuh"
#include "embedding_bag/cuda/sorted_rows.cuh"

namespace seqkernels::bags_cuda {

// Phases of a row-wise step on rows that several groups share: sum the squares of each part of a row, compute the
// state, apply the step. A row within one group takes its step in a single phase (kStep).
enum class Phase : int { kStep, kSquares, kStepFromState };

template <class T>
struct RowsArgs {
  ManyTables tables;
  Bounds bounds;
  Sorted sorted;
  int64_t groups;
  const uint32_t* bag_of;    // [N] bag of each position; null: the places hold bags
  const uint32_t* ordinals;  // [groups + 1]; for sparse gradients
  const T* scales;           // [bags] or null
  const void* weights;       // [N] or null
  bool wide_weights, by_frequency;
  int group;
  int reach;  // a row that extends at most this many places past its group is summed by it
  Partials<T> partials;
  RowStep step;
  Phase phase;
  T* squares;  // [tiles, N], set where a row begins
};

// The summed gradient of a row, its key, its first place, and its number of occurrences.
template <class T, int kCount>
struct RowSum {
  uint32_t key;
  int64_t begin, count, ordinal;
  T values[kCount];
};

struct NoPrefetch {
  static constexpr bool kAvailable = false;
};

template <class S, bool kWide>
struct StoreRow {
  using Reads = std::false_type;  // whether it reads the table and states
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;

  template <class Prefetched>
  static SK_DEVICE void finish(const RowsArgs<T>&, const TableDescriptor& table, const C& columns,
                               const RowSum<T, C::kCount>& sum, const Prefetched&) {
    const RowTarget& to = table.target;
    const int64_t row = sum.key - table.rows_before, D = table.t.D;
    if (to.rows == nullptr) {
      return store_row(columns, global<S>(to.dense, table.t.E * D) + row * D, sum.values, kWide);
    }
    const int64_t at = sum.ordinal - table.values_before;
    if (columns.lane == 0 && columns.first == 0) global<int64_t>(to.rows, at + 1)[at] = row;
    store_row(columns, global<S>(to.values, (at + 1) * D) + at * D, sum.values, kWide);
  }
};

template <class S, bool kWide>
struct StepRow {
  using Reads = std::true_type;
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  using Values = T[C::kCount];

  // `prefetched` holds operands of the step that were prefetched, if any.
  template <class Prefetched>
  static SK_DEVICE void finish(const RowsArgs<T>& a, const TableDescriptor& table, const C& columns,
                               const RowSum<T, C::kCount>& sum, const Prefetched& prefetched) {
    const BagTable& t = table.t;
    if (t.D == 0) return;
    const int64_t row = sum.key - table.rows_before;
    const auto& g = sum.values;
    const RowStep& step = a.step;
    const T lr = T(step.lr), eps = T(step.eps);
    T factor = 0;
    if (step.optimizer == RowOptimizer::kRowwiseAdagrad) {
      T state;
      if (a.phase == Phase::kStepFromState) {
        state = global<const T>(a.squares, a.sorted.N)[sum.begin];
      } else {
        T squares = 0;
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) {
          if (columns.in_row(v)) squares += g[v] * g[v];
        }
        squares = group_sum(squares, columns.group);
        if (a.phase == Phase::kSquares) {
          const int64_t at = columns.first / C::kTile * a.sorted.N + sum.begin;
          if (columns.lane == 0) global<T>(a.squares, at + 1)[at] = squares;
          return;
        }
        const auto states = global<T>(table.state1, t.E);
        T before = 0;
        if constexpr (Prefetched::kAvailable) {
          before = prefetched.rowwise();
        } else {
          if (columns.lane == 0) before = states[row];
          before = shuffle(before, 0, columns.group, group_mask(columns.group));
        }
        state = before + squares / T(t.D);
        if (columns.lane == 0) states[row] = state;
      }
      factor = -lr / (sqrt(state) + eps);
    }
    if (!columns.any()) return;
    const auto weights =
        global<S>(const_cast<void*>(t.table), (t.E - 1) * t.row_stride + (t.D - 1) * t.column_stride + 1);
    const auto state1 = global<T>(table.state1, table.state1 == nullptr ? 0 : t.E * t.D) + row * t.D;
    const auto state2 = global<T>(table.state2, table.state2 == nullptr ? 0 : t.E * t.D) + row * t.D;
    const auto w = weights + row * t.row_stride;
    Values move;
    switch (step.optimizer) {
      case RowOptimizer::kSGD:
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) move[v] = -lr * g[v];
        break;
      case RowOptimizer::kAdagrad: {
        Values s;
        if constexpr (Prefetched::kAvailable) {
          prefetched.state1(s);
        } else {
          read(columns, state1, 1, s);
        }
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) {
          s[v] += g[v] * g[v];
          move[v] = -lr * (g[v] / (sqrt(s[v]) + eps));
        }
        store_row(columns, state1, s, kWide);
        break;
      }
      case RowOptimizer::kRowwiseAdagrad:
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) move[v] = factor * g[v];
        break;
      case RowOptimizer::kAdam: {
        Values first, second;
        if constexpr (Prefetched::kAvailable) {
          prefetched.state1(first);
          prefetched.state2(second);
        } else {
          read(columns, state1, 1, first);
          read(columns, state2, 1, second);
        }
        const T rest1 = T(1 - step.beta1), rest2 = T(1 - step.beta2);
        const T size = -lr * T(sqrt(step.correction2) / step.correction1);
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) {
          first[v] += (g[v] - first[v]) * rest1;
          second[v] += (g[v] * g[v] - second[v]) * rest2;
          move[v] = size * (first[v] / (sqrt(second[v]) + eps));
        }
        store_row(columns, state1, first, kWide);
        store_row(columns, state2, second, kWide);
        break;
      }
    }
    Values now;
    if constexpr (Prefetched::kAvailable) {
      prefetched.weights(now);
    } else {
      read(columns, w, t.column_stride, now);
    }
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) now[v] += move[v];
    if constexpr (kWide) {
      store_row(columns, w, now, true);
    } else {
      SK_UNROLL
      for (int v = 0; v < C::kCount; ++v) {
        if (columns.in_row(v)) w[columns.at(v) * t.column_stride] = narrow<S>(now[v]);
      }
    }
  }

 private:
  template <class From>
  static SK_DEVICE void read(const C& columns, Global<From> from, int64_t stride, Values& values) {
    if constexpr (kWide) {
      load_contiguous<C::kCount>(values, from, columns.at(0));
    } else {
      SK_UNROLL
      for (int v = 0; v < C::kCount; ++v) {
        values[v] = columns.in_row(v) ? widen(load<Cache::kDefault>(from, columns.at(v) * stride)) : T(0);
      }
    }
  }
};

}  // namespace seqkernels::bags_cuda
