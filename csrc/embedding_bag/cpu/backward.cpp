// Backward pass of EmbeddingBag by rows. A stable radix sort groups the occurrences of each row; each row's gradient is
// then summed in the order of positions and written once, to a dense or sparse gradient or as an optimizer step. Rows
// are distributed among threads by work. Frequent rows are summed in chunks of fixed size and merged in order, so that
// the result does not depend on the number of threads.
#include "common/memory.h"
#include "embedding_bag/cpu/bags.h"
#include "embedding_bag/row_sort.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

constexpr int kMaxDigitBits = 11;              // 2,048 counters and write positions
constexpr int kSinglePassBits = 13;            // counters fit into the L1 cache
constexpr int kCounters = 6 << kMaxDigitBits;  // 62 bits in at most six digits
constexpr int64_t kMaxRanges = 32;
constexpr int kBucketBits = 11;  // of rows; a bucket belongs to one thread

template <class U>
struct Pair {
  U row, source;  // source: a bag or a position
};

template <class S>
SEQKERNELS_INLINE Compute<S> load_value(const S* p) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return *p;
  } else {
    return load(p, 1)[0];
  }
}
SEQKERNELS_INLINE float load_value(const Half* p) { return half_to_float(p->bits); }
SEQKERNELS_INLINE float load_value(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// A row that occurs more often than this is summed in chunks of this size. Slots of partial sums are derived from the
// chunk's place among the sorted pairs: no two first chunks and no two later chunks share kRowChunk places.
constexpr int64_t kRowChunk = 512;
SEQKERNELS_INLINE int64_t partial_slots(int64_t n) { return 2 * (n / kRowChunk + 1); }
SEQKERNELS_INLINE int64_t partial_slot(int64_t begin, bool first) { return 2 * (begin / kRowChunk) + first; }

// The per-sample weight at a position.
template <class S>
SEQKERNELS_INLINE Compute<S> weight_at(const BagBackward& args, int64_t position) {
  if (args.shape.wide_weights) return static_cast<const Compute<S>*>(args.table.weights)[position];
  return load_value(static_cast<const S*>(args.table.weights) + position);
}

template <class F>
void for_each_thread(int64_t threads, F&& f) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) f(thread);
  };
  parallel_pieces(threads, body);
}

// The first pair with this row or a later one.
template <class U>
inline int64_t lower_bound(const Pair<U>* pairs, int64_t n, int64_t row) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (int64_t(pairs[middle].row) < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sort.

// Whether gradients depend on the position and not only on the bag: per-sample weights, max and min.
bool depends_on_position(const BagBackward& args) { return args.table.weights != nullptr || args.shape.extreme(); }

// Rows are assigned to threads in ranges of equal work. Each thread scans all indices for rows of its range and sorts
// them in memory of its own. With few threads, the scan takes a small part of the time.
template <class S, class U>
struct Sorter {
  using T = Compute<S>;
  const BagBackward& args;
  const BagTable& t = args.table;
  const Bounds bounds{t, args.shape.wide_offsets};
  RowSort& out;
  int64_t first, last, threads;  // positions within bags are [first, last)
  int bucket_shift;              // bucket = row >> bucket_shift; ranges end between buckets
  int64_t buckets;
  Pair<U>* pairs[2];
  int64_t* counts;  // [threads][buckets]
  U* counters;      // [threads][kCounters]
  U* bag_of;
  T* scale;
  Faults faults;

  Sorter(const BagBackward& args, RowSort& out) : args(args), out(out) {
    first = bounds.begin(0);
    last = bounds.begin(t.bags);
    const int64_t n = last - first;
    threads = min(kMaxRanges, threads_for(max(n, out.dense ? t.E : 0) * t.D * int64_t(sizeof(S))));
    const int width = bits_of(t.E);
    bucket_shift = threads == 1 ? width : width > kBucketBits ? width - kBucketBits : 0;
    buckets = (max(t.E - 1, 0) >> bucket_shift) + 1;

    const bool positions = depends_on_position(args), mean = args.shape.mode == BagMode::kMean;
    const int64_t pair_bytes = round_up(n * sizeof(Pair<U>), 64);
    const int64_t count_bytes = round_up(threads * buckets * 8, 64);
    const int64_t counter_bytes = kCounters * sizeof(U);
    const int64_t bag_bytes = positions ? round_up(n * sizeof(U), 64) : 0,
                  scale_bytes = mean ? round_up(t.bags * sizeof(T), 64) : 0;
    const int64_t cut_bytes = round_up(3 * (threads + 1) * 8, 64), partial_bytes = partial_slots(n) * t.D * sizeof(T);
    out.memory = new Memory(2 * pair_bytes + count_bytes + threads * counter_bytes + bag_bytes + scale_bytes +
                            cut_bytes + partial_bytes);
    char* p = out.memory->get();
    const auto take = [&](int64_t bytes) {
      p += bytes;
      return p - bytes;
    };
    pairs[0] = reinterpret_cast<Pair<U>*>(take(pair_bytes));
    pairs[1] = reinterpret_cast<Pair<U>*>(take(pair_bytes));
    counts = reinterpret_cast<int64_t*>(take(count_bytes));
    counters = reinterpret_cast<U*>(take(threads * counter_bytes));
    bag_of = positions ? reinterpret_cast<U*>(take(bag_bytes)) - first : nullptr;
    scale = mean ? reinterpret_cast<T*>(take(scale_bytes)) : nullptr;
    out.rows = reinterpret_cast<int64_t*>(take(cut_bytes));
    out.begins = out.rows + threads + 1;
    out.unique_before = out.begins + threads + 1;
    out.partials = take(partial_bytes);
    out.threads = threads;
  }

  // Splits the rows [0, range) into digits; one pass sorts by one digit.
  struct Digits {
    int passes, bits;
    explicit Digits(int64_t range) {
      const int width = bits_of(range);
      passes = width <= kSinglePassBits ? 1 : (width + kMaxDigitBits - 1) / kMaxDigitBits;
      bits = (width + passes - 1) / passes;
    }
  };
  static int bits_of(int64_t range) {
    int width = 1;
    while (width < 62 && (range - 1) >> width > 0) ++width;
    return width;
  }

  BagFault run() {
    for_each_thread(threads, [&](int64_t thread) {
      if (args.shape.wide_indices) {
        count_indices<int64_t>(thread);
      } else {
        count_indices<int32_t>(thread);
      }
      if (scale != nullptr) set_scales(thread);
      if (bag_of != nullptr) {
        each_bag(share(thread), share(thread + 1), [&](int64_t bag, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) bag_of[i] = U(bag);
        });
      }
    });
    if (faults.first().kind != BagFault::kNone) return faults.first();
    const int64_t widest = assign_ranges();
    const Digits digits(widest);
    for_each_thread(threads, [&](int64_t thread) {
      if (args.shape.wide_indices) {
        collect_pairs<int64_t>(thread);
      } else {
        collect_pairs<int32_t>(thread);
      }
      sort_range(thread, digits);
    });
    out.unique_before[0] = 0;
    for (int64_t thread = 0; thread < threads; ++thread) out.unique_before[thread + 1] += out.unique_before[thread];
    out.wide = sizeof(U) == 8;
    out.pairs = pairs[digits.passes % 2];
    out.n = out.begins[threads];
    out.bag_of = bag_of;
    out.scale = scale;
    return {};
  }

  SEQKERNELS_INLINE int64_t bucket(int64_t row) const { return row >> bucket_shift; }
  SEQKERNELS_INLINE int64_t share(int64_t thread) const { return first + part(last - first, threads, thread); }

  template <class I>
  __attribute__((noinline)) void count_indices(int64_t thread) {
    const I* indices = static_cast<const I*>(t.indices);
    int64_t* mine = counts + thread * buckets;
    memset(mine, 0, 8 * buckets);
    BagFault fault{};
    for (int64_t i = share(thread), end = share(thread + 1); i < end; ++i) {
      const int64_t index = indices[i];
      if (uint64_t(index) >= uint64_t(t.E)) {
        record_fault(fault, BagFault::kIndex, i, index);
      } else if (index != t.padding) {
        ++mine[bucket(index)];
      }
    }
    faults.add(fault);
  }

  // Assigns a range of rows and of pairs to each thread. Returns the number of rows of the widest range.
  int64_t assign_ranges() const {
    const int64_t of_row = out.dense ? 1 : 0;
    int64_t n = 0;
    for (int64_t i = 0; i < threads * buckets; ++i) n += counts[i];
    const int64_t total = n + of_row * t.E;
    int64_t owner = 0, before = 0, widest = 0;
    out.rows[0] = out.begins[0] = 0;
    for (int64_t b = 0; b < buckets; ++b) {
      const int64_t row = b << bucket_shift;
      while (owner + 1 < threads && before + of_row * row >= part(total, threads, owner + 1)) {
        out.rows[++owner] = row;
        out.begins[owner] = before;
      }
      for (int64_t thread = 0; thread < threads; ++thread) before += counts[thread * buckets + b];
    }
    while (owner < threads) {
      out.rows[++owner] = t.E;
      out.begins[owner] = before;
    }
    for (owner = 0; owner < threads; ++owner) widest = max(widest, out.rows[owner + 1] - out.rows[owner]);
    return widest;
  }

  // Calls f(bag, begin, end) for the positions of each bag within [from, stop).
  template <class F>
  SEQKERNELS_INLINE void each_bag(int64_t from, int64_t stop, F&& f) const {
    if (from >= stop) return;
    // The last bag that begins at or before `from`; the bags between have no indices.
    for (int64_t bag = t.offsets == nullptr ? (from - t.first) / t.length : bag_with(from); from < stop; ++bag) {
      const int64_t end = min(stop, bounds.begin(bag + 1));
      f(bag, from, end);
      from = end;
    }
  }
  int64_t bag_with(int64_t position) const {
    int64_t low = 0, high = t.bags;  // begin(low) <= position < begin(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (bounds.begin(middle) <= position ? low : high) = middle;
    }
    return low;
  }

  // Collects the pairs of a thread's range in the order of positions.
  template <class I>
  void collect_pairs(int64_t thread) const {
    if (bag_of == nullptr) {
      collect_pairs_as<I, false>(thread);
    } else {
      collect_pairs_as<I, true>(thread);
    }
  }
  template <class I, bool kPositions>
  __attribute__((noinline)) void collect_pairs_as(int64_t thread) const {
    const I* indices = static_cast<const I*>(t.indices);
    const U low = U(out.rows[thread]), range = U(out.rows[thread + 1]) - low;
    const int64_t padding = t.padding;  // -1 if there is none, which no valid index equals
    Pair<U>* to = pairs[0] + out.begins[thread];
    const Pair<U>* const stop = pairs[0] + out.begins[thread + 1];
    if (to == stop) return;
    each_bag(first, last, [&](int64_t bag, int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end && to < stop; ++i) {  // branch-free: the branch would be mispredicted
        const int64_t index = indices[i];
        *to = {U(index), kPositions ? U(i) : U(bag)};
        to += (U(index) - low < range) & (index != padding);
      }
    });
  }

  // Sorts the pairs of a thread's range; the digits of all passes are counted in one scan.
  void sort_range(int64_t thread, const Digits digits) const {
    const int64_t begin = out.begins[thread], end = out.begins[thread + 1], size = int64_t(1) << digits.bits;
    const U low = U(out.rows[thread]), mask = U(size - 1);
    U* const mine = counters + thread * kCounters;
    memset(static_cast<void*>(mine), 0, digits.passes * size * sizeof(U));
    for (int64_t i = begin; i < end; ++i) {
      U row = pairs[0][i].row - low;
      for (int pass = 0; pass < digits.passes; ++pass, row >>= digits.bits) ++mine[pass * size + (row & mask)];
    }
    for (int pass = 0; pass < digits.passes; ++pass) {
      U* const next_place = mine + pass * size;
      U before = U(begin);
      for (int64_t d = 0; d < size; ++d) {
        const U count = next_place[d];
        next_place[d] = before;
        before += count;
      }
      const Pair<U>* from = pairs[pass % 2];
      Pair<U>* to = pairs[1 - pass % 2];
      const int shift = pass * digits.bits;
      for (int64_t i = begin; i < end; ++i) to[next_place[(from[i].row - low) >> shift & mask]++] = from[i];
    }
    const Pair<U>* sorted = pairs[digits.passes % 2];
    int64_t unique = 0;
    for (int64_t i = begin; out.counts_unique && i < end; ++i)
      unique += i == begin || sorted[i].row != sorted[i - 1].row;
    out.unique_before[thread + 1] = unique;
    bool frequent = false;  // conservative
    constexpr int64_t kHalf = kRowChunk / 2;
    for (int64_t i = begin; i + kHalf < end; i += kHalf) frequent |= sorted[i + kHalf].row == sorted[i].row;
    if (frequent) __atomic_store_n(&out.any_frequent, true, __ATOMIC_RELAXED);
  }

  void set_scales(int64_t thread) const {
    for (int64_t bag = part(t.bags, threads, thread), last_bag = part(t.bags, threads, thread + 1); bag < last_bag;
         ++bag) {
      const int64_t begin = bounds.begin(bag), end = bounds.begin(bag + 1);
      const bool weighted = t.weights != nullptr && args.shape.mean_by == MeanBy::kWeight;
      if (!weighted && t.padding < 0) {
        scale[bag] = T(1) / T(end - begin);
        continue;
      }
      T sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        if (integer(t.indices, args.shape.wide_indices, i) == t.padding) continue;
        sum += weighted ? weight_at<S>(args, i) : T(1);
      }
      scale[bag] = T(1) / sum;
    }
  }
};

template <class S>
BagFault sort_of(const BagBackward& args, RowSort& out) {
  int64_t longest = 0;
  const BagFault fault = check_offsets(args.table, args.shape.wide_offsets, longest);
  if (fault.kind != BagFault::kNone) return fault;
  constexpr int64_t kNarrow = int64_t(1) << 32;
  if (args.table.E < kNarrow && args.table.N < kNarrow && args.table.bags < kNarrow) {
    return Sorter<S, uint32_t>(args, out).run();
  }
  return Sorter<S, uint64_t>(args, out).run();
}

// Sums of rows.

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
    if (sort.any_frequent) for_each_thread(sort.threads, [&](int64_t thread) { sum_chunks(thread); });
    for_each_thread(sort.threads, [&](int64_t thread) { sum_rows(thread); });
  }

  int64_t end_of(int64_t begin) const {
    const U row = pairs[begin].row;
    const int64_t near = min(sort.n, begin + 64);
    int64_t i = begin + 1;
    while (i < near && pairs[i].row == row) ++i;
    return i < near ? i : lower_bound(pairs, sort.n, int64_t(row) + 1);
  }

  // Sums the chunks of frequent rows. Each thread has an equal part of the pairs, independent of the rows.
  void sum_chunks(int64_t thread) const {
    const int64_t low = part(sort.n, sort.threads, thread), high = part(sort.n, sort.threads, thread + 1);
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
    memcpy(sums, static_cast<T*>(sort.partials) + partial_slot(begin, true) * t.D, sizeof(T) * t.D);
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
    if (from < end)
      memset(static_cast<void*>(static_cast<S*>(to.dense) + from * t.D), 0, sizeof(S) * (end - from) * t.D);
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

  // max_norm: scales rows with a larger norm down to it.

  void renorm(double max_norm, double p) const {
    for_each_thread(sort.threads, [&](int64_t thread) {
      for (int64_t begin = sort.begins[thread]; begin < sort.begins[thread + 1]; begin = end_of(begin)) {
        S* w = static_cast<S*>(const_cast<void*>(t.table)) + int64_t(pairs[begin].row) * t.row_stride;
        const auto value = [&](int64_t d) { return double(load_value(w + d * t.column_stride)); };
        const double norm = norm_of(value, p);
        if (!(norm > max_norm)) continue;
        const T factor = T(max_norm / (norm + 1e-7));
        for (int64_t d = 0; d < t.D; ++d) {
          const T scaled = load_value(w + d * t.column_stride) * factor;
          convert(w + d * t.column_stride, &scaled, 1);
        }
      }
    });
  }
  template <class F>
  double norm_of(F&& value, double p) const {
    double sum = 0;
    for (int64_t d = 0; d < t.D; ++d) {
      const double x = __builtin_fabs(value(d));
      if (p == 2) {
        sum += x * x;
      } else if (p == 1) {
        sum += x;
      } else if (__builtin_isinf(p)) {
        sum = p > 0 ? (x > sum || x != x ? x : sum) : (d == 0 || x < sum || x != x ? x : sum);
      } else if (p == 0) {
        sum += x != 0;
      } else {
        sum += __builtin_pow(x, p);
      }
    }
    return p == 2 ? __builtin_sqrt(sum) : p == 1 || p == 0 || __builtin_isinf(p) ? sum : __builtin_pow(sum, 1 / p);
  }
};

template <class F>
void reducer_of(const BagBackward& args, const RowSort& sort, const RowTarget& to, F&& f) {
  dispatch(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (sort.wide) {
      Reducer<S, uint64_t> reducer{args, sort, to};
      f(reducer);
    } else {
      Reducer<S, uint32_t> reducer{args, sort, to};
      f(reducer);
    }
  });
}

}  // namespace

BagFault bag_sort(const BagBackward& args, RowSort& out) {
  return dispatch(args.shape.dtype, [&](auto storage) { return sort_of<decltype(storage)>(args, out); });
}

void bag_reduce(const BagBackward& args, const RowSort& sort, const RowTarget& to) {
  reducer_of(args, sort, to, [](auto& reducer) { reducer.run(); });
}

BagFault bag_renorm(const BagBackward& args, double max_norm, double norm_type) {
  RowSort sort;
  const BagFault fault = bag_sort(args, sort);
  if (fault.kind != BagFault::kNone) return fault;
  reducer_of(args, sort, {}, [&](auto& reducer) { reducer.renorm(max_norm, norm_type); });
  return fault;
}

// Quantises rows: byte = round((x - min) * 255 / (max - min)).
void bag_pack_bytes(const BagTable& t, DType dtype, uint8_t* packed) {
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t threads = threads_for(t.E * t.D * int64_t(sizeof(S)));
    for_each_thread(threads, [&](int64_t thread) {
      for (int64_t row = part(t.E, threads, thread), last = part(t.E, threads, thread + 1); row < last; ++row) {
        const S* from = static_cast<const S*>(t.table) + row * t.row_stride;
        uint8_t* to = packed + row * (t.D + 8);
        const auto value = [&](int64_t d) { return float(load_value(from + d * t.column_stride)); };
        float lowest = value(0), highest = lowest;
        for (int64_t d = 1; d < t.D; ++d) {
          const float x = value(d);
          lowest = x < lowest ? x : lowest;
          highest = x > highest ? x : highest;
        }
        const float range = highest - lowest, numbers[2] = {range / 255.0f, lowest};
        const float inverse = 255.0f / (range + 1e-8f);
        for (int64_t d = 0; d < t.D; ++d) to[d] = uint8_t(__builtin_lrintf((value(d) - lowest) * inverse));
        memcpy(to + t.D, numbers, sizeof(numbers));
      }
    });
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
