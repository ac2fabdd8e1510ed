// Sorts the positions of a call by row, the first step of the backward pass by rows: a stable radix sort.
#include "common/memory.h"
#include "embedding_bag/cpu/bags.h"
#include "embedding_bag/cpu/rows.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

constexpr int kMaxDigitBits = 11;              // 2,048 counters and write positions
constexpr int kSinglePassBits = 13;            // counters fit into the L1 cache
constexpr int kCounters = 6 << kMaxDigitBits;  // 62 bits in at most six digits
constexpr int64_t kMaxRanges = 32;
constexpr int kBucketBits = 11;    // of rows; a bucket belongs to one thread
constexpr int64_t kFewPairs = 64;  // fewer pairs are sorted faster by insertion than by counting digits

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
    out.division = divide(max(n, out.dense ? t.E : 0) * t.D * int64_t(sizeof(S)));
    threads = out.division.threads = min(kMaxRanges, out.division.threads);
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
    for_each_part(out.division, [&](int64_t thread) {
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
    for_each_part(out.division, [&](int64_t thread) {
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

  // Sorts the pairs of a thread's range into pairs[digits.passes % 2].
  void sort_range(int64_t thread, const Digits digits) const {
    const int64_t begin = out.begins[thread], end = out.begins[thread + 1];
    const Pair<U>* const sorted = pairs[digits.passes % 2];
    if (end - begin <= kFewPairs) {
      insert_pairs(begin, end, pairs[digits.passes % 2]);
    } else {
      sort_by_digits(thread, digits);
    }
    int64_t unique = 0;
    for (int64_t i = begin; out.counts_unique && i < end; ++i)
      unique += i == begin || sorted[i].row != sorted[i - 1].row;
    out.unique_before[thread + 1] = unique;
    bool frequent = false;  // conservative
    constexpr int64_t kHalf = kRowChunk / 2;
    for (int64_t i = begin; i + kHalf < end; i += kHalf) frequent |= sorted[i + kHalf].row == sorted[i].row;
    if (frequent) __atomic_store_n(&out.any_frequent, true, __ATOMIC_RELAXED);
  }

  // Insertion sort, which needs no counters.
  void insert_pairs(int64_t begin, int64_t end, Pair<U>* to) const {
    for (int64_t i = begin; i < end; ++i) {
      const Pair<U> pair = pairs[0][i];
      int64_t at = i;
      for (; at > begin && to[at - 1].row > pair.row; --at) to[at] = to[at - 1];
      to[at] = pair;
    }
  }

  // The digits of all passes are counted in one scan.
  void sort_by_digits(int64_t thread, const Digits digits) const {
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

}  // namespace

BagFault bag_sort(const BagBackward& args, RowSort& out) {
  return dispatch(args.shape.dtype, [&](auto storage) { return sort_of<decltype(storage)>(args, out); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
