// Backward pass of EmbeddingBag by rows. A stable radix sort groups the occurrences of each row; each row's gradient is
// then summed in the order of positions and written once, to a dense or sparse gradient or as an optimizer step. Rows
// are distributed among threads by work. Frequent rows are summed in chunks of fixed size and merged in order, so that
// the result does not depend on the number of threads.
#include "common/bytes.h"
#include "common/memory.h"
#include "embedding_bag/cpu/bags.h"
#include "embedding_bag/cpu/rows.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

// The next pairs as terms of a row's sum: coefficient * grad; for max and min, only in columns where arg equals
// `where`.
template <class S, class U>
struct Contributions {
  using T = Compute<S>;
  static constexpr int64_t kNear = 8;
  const BagBackward& args;
  const RowSort& sort;
  int64_t begin = 0, end = 0;  // pairs that are loaded
  int64_t grads[kRowChunk + kNear];
  int64_t argument_rows[kRowChunk + kNear];
  T coefficients[kRowChunk];
  int32_t where[kRowChunk];

  Contributions(const BagBackward& args, const RowSort& sort) : args(args), sort(sort) {}
  // Index of pair `from` in the arrays; loads the pairs [from, to) if needed.
  SEQKERNELS_INLINE int64_t at(int64_t from, int64_t to) {
    if (from < begin || to > end) fill(from);
    return from - begin;
  }

  __attribute__((noinline)) void fill(int64_t from) {
    const BagTable& t = args.table;
    const Pair<U>* pairs = static_cast<const Pair<U>*>(sort.pairs);
    const U* bag_of = static_cast<const U*>(sort.bag_of);
    const T* scale = static_cast<const T*>(sort.scale);
    const Bounds bounds{t, args.shape.wide_offsets};
    begin = from;
    end = min(sort.n, from + kRowChunk);
    const int64_t ahead = min(sort.n, end + kNear);
    for (int64_t i = ahead; i < end + kNear; ++i) grads[i - begin] = argument_rows[i - begin] = 0;
    if (bag_of == nullptr && scale == nullptr && t.batch == t.bags) {  // plain sums
      for (int64_t i = begin; i < ahead; ++i) grads[i - begin] = int64_t(pairs[i].source) * t.out_stride;
      return;
    }
    for (int64_t i = begin; i < ahead; ++i) {
      const int64_t source = pairs[i].source, bag = bag_of == nullptr ? source : bag_of[source];
      grads[i - begin] = output_offset(t, bag, t.out_stride);
      if (t.arg != nullptr) argument_rows[i - begin] = output_offset(t, bag, t.arg_stride);
      if (i >= end) continue;
      T coefficient = scale == nullptr ? T(1) : scale[bag];
      if (t.weights != nullptr) coefficient *= weight_at<S>(args, source);
      coefficients[i - begin] = coefficient;
      if (t.arg != nullptr) where[i - begin] = int32_t(source - bounds.begin(bag));
    }
  }
};

enum class SumKind { kPlain, kScaled, kWinners };

template <class S, class U>
struct Reducer {
  using T = Compute<S>;
  using Int = typename Vec<T>::NativeInt;
  static constexpr int kWidest = kVectorBytes == 64 ? 8 : 4;

  const BagBackward& args;
  const RowSort& sort;
  const RowTarget& to;
  const BagTable& t = args.table;
  const Pair<U>* pairs = static_cast<const Pair<U>*>(sort.pairs);
  const SumKind sum_kind = t.arg != nullptr                                ? SumKind::kWinners
                           : sort.scale != nullptr || t.weights != nullptr ? SumKind::kScaled
                                                                           : SumKind::kPlain;

  void run() const {
    if (sort.any_frequent) for_each_part(sort.division, [&](int64_t thread) { sum_chunks(thread); });
    for_each_part(sort.division, [&](int64_t thread) { sum_rows(thread); });
  }

  int64_t end_of(int64_t begin) const { return end_of_row(pairs, sort.n, begin); }

  // Sums the chunks of frequent rows. Each thread has an equal part of the pairs, independent of the rows.
  void sum_chunks(int64_t thread) const {
    const int64_t low = part(sort.n, sort.division.threads, thread),
                  high = part(sort.n, sort.division.threads, thread + 1);
    Contributions<S, U> contributions(args, sort);
    for (int64_t begin = low < high ? lower_bound(pairs, sort.n, pairs[low].row) : high; begin < high;) {
      const int64_t end = end_of(begin);
      for (int64_t from = begin; end - begin > kRowChunk && from < end; from += kRowChunk) {
        if (from < low || from >= high) continue;
        T* partial = static_cast<T*>(sort.partials) + partial_slot(from, from == begin) * t.D;
        sum(contributions, from, min(end, from + kRowChunk), T(1), partial);
      }
      begin = end;
    }
  }
  void merge_chunks(int64_t begin, int64_t end, T* sums) const {
    copy_bytes(sums, static_cast<T*>(sort.partials) + partial_slot(begin, true) * t.D, int64_t{sizeof(T)} * t.D);
    for (int64_t from = begin + kRowChunk; from < end; from += kRowChunk) {
      const T* more = static_cast<T*>(sort.partials) + partial_slot(from, false) * t.D;
      for (int64_t d = 0; d < t.D; ++d) sums[d] += more[d];
    }
    if (args.by_frequency) {
      for (int64_t d = 0; d < t.D; ++d) sums[d] /= T(end - begin);
    }
  }

  // Sums the rows of this thread.
  void sum_rows(int64_t thread) const {
    Contributions<S, U> contributions(args, sort);
    Memory memory(sizeof(T) * t.D);
    T* const sums = reinterpret_cast<T*>(memory.get());
    int64_t ordinal = sort.unique_before[thread], done = sort.rows[thread];
    const int64_t stop = sort.begins[thread + 1];
    for (int64_t begin = sort.begins[thread]; begin < stop; ++ordinal) {
      const int64_t row = pairs[begin].row, end = end_of(begin);
      if (to.dense != nullptr) {
        zero_rows(done, row);
        done = row + 1;
      } else {
        prefetch_row<2>(min(begin + kRowsFar, sort.n - 1));
        prefetch_row<3>(min(begin + kRowsNear, sort.n - 1));
      }
      if (end - begin > kRowChunk) {
        merge_chunks(begin, end, sums);
        if (to.step != nullptr) {
          step(row, sums);
        } else {
          convert(target(row, ordinal), sums, t.D);
        }
      } else {
        const T divisor = args.by_frequency ? T(end - begin) : T(1);
        if (to.step != nullptr) {
          sum(contributions, begin, end, divisor, sums);
          step(row, sums);
        } else {
          sum(contributions, begin, end, divisor, target(row, ordinal));
        }
      }
      begin = end;
    }
    if (to.dense != nullptr) zero_rows(done, sort.rows[thread + 1]);
  }

  // Prefetches the table row and states that a later step will change.
  static constexpr int64_t kRowsNear = 8, kRowsFar = 64;
  template <int kLevel>
  SEQKERNELS_INLINE void prefetch_row(int64_t pair) const {
    if (to.step == nullptr) return;
    const char* p = reinterpret_cast<const char*>(static_cast<const S*>(t.table) + pairs[pair].row * t.row_stride);
    for (int64_t b = 0; b < min(1024, t.D * int64_t(sizeof(S))); b += 64)
      __builtin_prefetch(p + b, kLevel == 3, kLevel);
    if (to.step->state1 == nullptr) return;
    for (T* state : {static_cast<T*>(to.step->state1), static_cast<T*>(to.step->state2)}) {
      if (state == nullptr || to.step->optimizer == RowOptimizer::kRowwiseAdagrad) continue;
      p = reinterpret_cast<const char*>(state + pairs[pair].row * t.D);
      for (int64_t b = 0; b < min(1024, t.D * int64_t(sizeof(T))); b += 64)
        __builtin_prefetch(p + b, kLevel == 3, kLevel);
    }
  }

  // Zeroes rows [from, end), which do not occur.
  SEQKERNELS_INLINE void zero_rows(int64_t from, int64_t end) const {
    if (from < end) zero_bytes(static_cast<S*>(to.dense) + from * t.D, int64_t{sizeof(S)} * (end - from) * t.D);
  }

  SEQKERNELS_INLINE S* target(int64_t row, int64_t ordinal) const {
    if (to.dense != nullptr) return static_cast<S*>(to.dense) + row * t.D;
    to.rows[ordinal] = row;
    return static_cast<S*>(to.values) + ordinal * t.D;
  }

  // The sum of the pairs [from, end), all of one row.

  template <class To>
  SEQKERNELS_INLINE void sum(Contributions<S, U>& contributions, int64_t from, int64_t end, T divisor, To* out) const {
    const int64_t at = contributions.at(from, end), n = end - from;
    switch (sum_kind) {
      case SumKind::kPlain:
        return sum_as<SumKind::kPlain>(contributions, at, n, divisor, out);
      case SumKind::kScaled:
        return sum_as<SumKind::kScaled>(contributions, at, n, divisor, out);
      case SumKind::kWinners:
        return sum_as<SumKind::kWinners>(contributions, at, n, divisor, out);
    }
  }
  template <SumKind kSumKind, class To>
  SEQKERNELS_INLINE void sum_as(const Contributions<S, U>& a, int64_t at, int64_t n, T divisor, To* out) const {
    const int64_t vectors = t.D / kLanes<T>;
    if (vectors >= kWidest) return blocks<kSumKind, kWidest>(a, at, n, divisor, out);
    if (vectors >= 4) return blocks<kSumKind, 4>(a, at, n, divisor, out);
    if (vectors >= 2) return blocks<kSumKind, 2>(a, at, n, divisor, out);
    if (vectors >= 1) return blocks<kSumKind, 1>(a, at, n, divisor, out);
    block<kSumKind, true, 1>(a, at, n, divisor, out, 0);
  }
  // As in the forward pass, the last block ends at D and may recompute some columns.
  template <SumKind kSumKind, int kWidth, class To>
  __attribute__((noinline)) void blocks(const Contributions<S, U>& a, int64_t at, int64_t n, T divisor, To* out) const {
    constexpr int64_t kColumns = kWidth * kLanes<T>;
    for (int64_t done = 0; done < t.D; done += kColumns) {
      block<kSumKind, false, kWidth>(a, at, n, divisor, out, min(done, t.D - kColumns));
    }
  }
  template <SumKind kSumKind, bool kPartial, int kWidth, class To>
  SEQKERNELS_INLINE void block(const Contributions<S, U>& a, int64_t at, int64_t n, T divisor, To* out,
                               int64_t column) const {
    constexpr int kBytes = kWidth * kLanes<T> * int(sizeof(S));
    const S* grads = static_cast<const S*>(t.out) + column;
    const int64_t lanes = kPartial ? t.D : kLanes<T>;
    Native<T> sums[kWidth];
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) sums[v] = Native<T>{};
    for (int64_t i = at; i < at + n; ++i) {
      const char* near = reinterpret_cast<const char*>(grads + a.grads[i + Contributions<S, U>::kNear]);
#pragma GCC unroll 16
      for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(near + b, 0, 3);
      if constexpr (kSumKind == SumKind::kWinners) {
        const char* winners =
            reinterpret_cast<const char*>(t.arg + a.argument_rows[i + Contributions<S, U>::kNear] + column);
#pragma GCC unroll 16
        for (int b = 0; b < kWidth * kLanes<T> * 4; b += 64) __builtin_prefetch(winners + b, 0, 3);
      }
      const S* grad = grads + a.grads[i];
      const Native<T> coefficient = broadcast(kSumKind == SumKind::kPlain ? T(1) : a.coefficients[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) {
        Native<T> g = load(grad + v * kLanes<T>, lanes);
        if constexpr (kSumKind == SumKind::kWinners) {
          const Int winners = load_positions<T>(t.arg + a.argument_rows[i] + column + v * kLanes<T>, lanes);
          g = winners == Int{} + typename Vec<T>::Int(a.where[i]) ? g : Native<T>{};
        }
        sums[v] = kSumKind == SumKind::kPlain ? sums[v] + g : fma(coefficient, g, sums[v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      if (args.by_frequency) sums[v] = sums[v] / divisor;
      store(out + column + v * kLanes<T>, sums[v], lanes);
    }
  }

  // One optimizer step on one row.

  void step(int64_t row, const T* g) const {
    const RowStep& s = *to.step;
    S* w = static_cast<S*>(const_cast<void*>(t.table)) + row * t.row_stride;
    T* state1 = static_cast<T*>(s.state1);
    T* state2 = static_cast<T*>(s.state2);
    const T lr = T(s.lr), eps = T(s.eps);
    switch (s.optimizer) {
      case RowOptimizer::kSGD:
        return add_to_row(w, [&](int64_t d) { return -lr * g[d]; });
      case RowOptimizer::kAdagrad:
        state1 += row * t.D;
        for (int64_t d = 0; d < t.D; ++d) state1[d] += g[d] * g[d];
        return add_to_row(w, [&](int64_t d) { return -lr * (g[d] / (square_root(state1[d]) + eps)); });
      case RowOptimizer::kRowwiseAdagrad: {
        T squares = 0;
        for (int64_t d = 0; d < t.D; ++d) squares += g[d] * g[d];
        state1[row] += squares / T(t.D);
        const T factor = -lr / (square_root(state1[row]) + eps);
        return add_to_row(w, [&](int64_t d) { return factor * g[d]; });
      }
      case RowOptimizer::kAdam: {
        state1 += row * t.D;
        state2 += row * t.D;
        const T rest1 = T(1 - s.beta1), rest2 = T(1 - s.beta2);
        for (int64_t d = 0; d < t.D; ++d) {
          state1[d] += (g[d] - state1[d]) * rest1;
          state2[d] += (g[d] * g[d] - state2[d]) * rest2;
        }
        const T size = -lr * T(__builtin_sqrt(s.correction2) / s.correction1);
        return add_to_row(w, [&](int64_t d) { return size * (state1[d] / (square_root(state2[d]) + eps)); });
      }
    }
  }
  static SEQKERNELS_INLINE T square_root(T x) {
    if constexpr (sizeof(T) == 4) {
      return __builtin_sqrtf(x);
    } else {
      return __builtin_sqrt(x);
    }
  }
  // Adds f(d) to each element, 64 at a time, so that the conversion between types is vectorised.
  template <class F>
  SEQKERNELS_INLINE void add_to_row(S* w, F&& f) const {
    constexpr int64_t kElements = 64;
    S gathered[kElements];
    T values[kElements];
    for (int64_t from = 0; from < t.D; from += kElements) {
      const int64_t n = min(kElements, t.D - from), stride = t.column_stride;
      S* here = w + from * stride;
      for (int64_t d = 0; stride != 1 && d < n; ++d) gathered[d] = here[d * stride];
      convert(values, stride != 1 ? gathered : here, n);
      for (int64_t d = 0; d < n; ++d) values[d] += f(from + d);
      convert(stride != 1 ? gathered : here, values, n);
      for (int64_t d = 0; stride != 1 && d < n; ++d) here[d * stride] = gathered[d];
    }
  }
};

}  // namespace

void bag_reduce(const BagBackward& args, const RowSort& sort, const RowTarget& to) {
  dispatch(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (sort.wide) {
      Reducer<S, uint64_t>{args, sort, to}.run();
    } else {
      Reducer<S, uint32_t>{args, sort, to}.run();
    }
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
