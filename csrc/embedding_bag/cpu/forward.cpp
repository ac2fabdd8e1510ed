// Forward pass of EmbeddingBag.
//
// The rows of a bag are summed or compared in registers, one block of columns at a time. Rows are prefetched across the
// ends of bags. Work is distributed among threads by number of indices, not by number of bags.
#include "common/bytes.h"
#include "common/memory.h"
#include "embedding_bag/cpu/bags.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

// The rows of a unit, restricted to one block of columns.
template <class S>
struct Block {
  using T = Compute<S>;
  const S* table;
  int64_t D, column_stride;
  int64_t column, lanes;  // lanes: fewer than a vector if the table is narrower
  const int64_t* row_offsets;
  const T* weights;
  int64_t n;
  Prefetch prefetch;
  bool plain;  // no padding, contiguous columns
};

// Reads the row at an offset, from the block's first column on; gathers columns that are not contiguous.
template <class S, int kWidth>
struct RowReader {
  const Block<S>& b;
  S gathered[kWidth * kLanes<Compute<S>>];

  SEQKERNELS_INLINE explicit RowReader(const Block<S>& b) : b(b) {}  // leaves `gathered` uninitialised
  SEQKERNELS_INLINE Row<S> operator()(int64_t row_offset) {
    if constexpr (sizeof(S) != 1) {
      if (b.column_stride != 1) {
        const S* from = b.table + row_offset + b.column * b.column_stride;
        const int64_t n = kWidth == 1 ? b.lanes : kWidth * kLanes<Compute<S>>;
        for (int64_t c = 0; c < n; ++c) gathered[c] = from[c * b.column_stride];
        return Row<S>(gathered, 0, 0);
      }
    }
    return Row<S>(b.table + row_offset, b.D, b.column);
  }
};

template <class S, bool kPartial>
SEQKERNELS_INLINE Native<Compute<S>> vector_of(const Row<S>& row, int v, int64_t lanes) {
  if constexpr (kPartial) return row(0, lanes);
  return row(v * kLanes<Compute<S>>);
}

// Adds rows [i, end). kPlain: no padding, contiguous columns. A compile-time constant `prefetch` removes its branches,
// which would limit loops over a table that fits into a cache.
template <bool kWeighted, bool kPartial, bool kPlain, class S, int kWidth>
SEQKERNELS_INLINE void add_range(const Block<S>& b, int64_t i, int64_t end, const Prefetch prefetch,
                                 Native<Compute<S>> (&sums)[kWidth]) {
  using T = Compute<S>;
  RowReader<S, kWidth> reader(b);
  for (; i < end; ++i) {
    prefetch.template operator()<S, kWidth * kLanes<T>* int(sizeof(S))>(b.table + b.column, b.row_offsets, i);
    const int64_t row_offset = b.row_offsets[i];
    if (!kPlain && row_offset < 0) continue;
    const Row<S> row = kPlain ? Row<S>(b.table + row_offset, b.D, b.column) : reader(row_offset);
    const Native<T> w = broadcast(kWeighted ? b.weights[i] : T(1));
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      const Native<T> x = vector_of<S, kPartial>(row, v, b.lanes);
      sums[v] = kWeighted ? fma(w, x, sums[v]) : sums[v] + x;
    }
  }
}

// Sums rows in groups of kFold and then adds the groups' sums, which halves the error growth of long bags. Sums start
// from -0, so that the first row is added exactly.
template <bool kWeighted, bool kPartial, class S, int kWidth>
SEQKERNELS_INLINE void add_rows(const Block<S>& b, Native<Compute<S>> (&sums)[kWidth]) {
  using T = Compute<S>;
  constexpr int64_t kFold = 64;
  Native<T> total[kWidth];
#pragma GCC unroll 8
  for (int v = 0; v < kWidth; ++v) sums[v] = total[v] = broadcast(T(-0.0));
  for (int64_t i = 0; i < b.n;) {
    const int64_t end = min(b.n, i + kFold);
    if (!b.plain || kPartial) {
      add_range<kWeighted, kPartial, false>(b, i, end, b.prefetch, sums);
    } else if (b.prefetch.far) {
      add_range<kWeighted, false, true>(b, i, end, Prefetch{true, true}, sums);
    } else if (b.prefetch.near) {
      add_range<kWeighted, false, true>(b, i, end, Prefetch{true, false}, sums);
    } else {
      add_range<kWeighted, false, true>(b, i, end, Prefetch{false, false}, sums);
    }
    i = end;
    if (i == b.n) break;
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      total[v] += sums[v];
      sums[v] = broadcast(T(-0.0));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kWidth; ++v) sums[v] += total[v];
}

// `first` is the position of the unit's first row in its bag. A minimum is the maximum of the negated values.
template <bool kWeighted, bool kPartial, class S, int kWidth>
SEQKERNELS_INLINE void compare_rows(const Block<S>& b, bool minimum, int64_t first,
                                    Native<Compute<S>> (&values)[kWidth],
                                    typename Vec<Compute<S>>::NativeInt (&at)[kWidth]) {
  using T = Compute<S>;
  using Int = typename Vec<T>::NativeInt;
  RowReader<S, kWidth> reader(b);
  const Int sign = Int{} + (minimum ? std::numeric_limits<typename Vec<T>::Int>::min() : 0);
  const auto each = [&](int64_t i, auto&& f) __attribute__((always_inline)) {
    const Row<S> row = reader(b.row_offsets[i]);
    const Native<T> w = broadcast(kWeighted ? b.weights[i] : T(1));
    const Int where = Int{} + typename Vec<T>::Int(first + i);
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      Native<T> x = vector_of<S, kPartial>(row, v, b.lanes);
      if constexpr (kWeighted) x = x * w;
      f(v, (Native<T>)((Int)x ^ sign), where);
    }
  };
  int64_t i = 0;
  while (i < b.n && b.row_offsets[i] < 0) ++i;
#pragma GCC unroll 8
  for (int v = 0; v < kWidth; ++v) {
    values[v] = Native<T>{};
    at[v] = Int{} - 1;
  }
  if (i == b.n) return;
  each(i, [&](int v, Native<T> x, Int where) __attribute__((always_inline)) {
    values[v] = x;
    at[v] = where;
  });
  for (++i; i < b.n; ++i) {
    b.prefetch.template operator()<S, kWidth * kLanes<T>* int(sizeof(S))>(b.table + b.column, b.row_offsets, i);
    if (b.row_offsets[i] < 0) continue;
    each(i,
         [&](int v, Native<T> x, Int where) __attribute__((always_inline)) { update_max(values[v], at[v], x, where); });
  }
#pragma GCC unroll 8
  for (int v = 0; v < kWidth; ++v) values[v] = (Native<T>)((Int)values[v] ^ sign);
}

// Result of one chunk of a long bag.
template <class T>
struct Partial {
  T* values;    // [D]
  int32_t* at;  // [D]
  T* weight;    // the sum of its weights
  int64_t* count;
};

// Slots are derived from the chunk's position: no two first chunks and no two later chunks share kChunk positions.
template <class T>
struct Partials {
  char* base;
  int64_t D;

  static int64_t stride(int64_t D) { return (D * (sizeof(T) + 4) + 16 + 63) / 64 * 64; }
  static int64_t bytes(const BagTable& t) { return 2 * (t.N / kChunk + 1) * stride(t.D); }
  SEQKERNELS_INLINE Partial<T> of(int64_t position, bool first) const {
    char* p = base + (2 * (position / kChunk) + first) * stride(D);
    return {reinterpret_cast<T*>(p + 16), reinterpret_cast<int32_t*>(p + 16 + D * sizeof(T)),
            reinterpret_cast<T*>(p + 8), reinterpret_cast<int64_t*>(p)};
  }
};

template <class S>
struct Forward {
  using T = Compute<S>;
  using Out = typename OutputOf<S>::type;
  static constexpr int kWidest = kVectorBytes == 64 ? 8 : 4;

  const BagTable& t;
  const BagShape& shape;
  const Bounds bounds;
  const Partials<T> partials;
  Prefetch prefetch;
  const bool unsplit;  // no bag is split into chunks

  Forward(const BagTable& t, const BagShape& shape, char* scratch, bool unsplit)
      : t(t), shape(shape), bounds{t, shape.wide_offsets}, partials{scratch, t.D}, unsplit(unsplit) {
    prefetch.set(t.E * t.D * int64_t(sizeof(S)));
  }

  // Selects a kernel by what is constant over all bags.
  void run(int64_t low, int64_t high, BagFault& fault) const {
    if (copies()) {
      shape.wide_indices ? copy_rows<int64_t>(low, high, fault) : copy_rows<int32_t>(low, high, fault);
    } else if (t.weights == nullptr) {
      run_weighted<false>(low, high, fault);
    } else {
      run_weighted<true>(low, high, fault);
    }
  }
  template <bool kWeighted>
  SEQKERNELS_INLINE void run_weighted(int64_t low, int64_t high, BagFault& fault) const {
    const int64_t vectors = t.D / kLanes<T>;
    if (vectors >= kWidest) return run_width<kWeighted, false, kWidest>(low, high, fault);
    if (vectors >= 4) return run_width<kWeighted, false, 4>(low, high, fault);
    if (vectors >= 2) return run_width<kWeighted, false, 2>(low, high, fault);
    run_width<kWeighted, true, 1>(low, high, fault);
  }
  template <bool kWeighted, bool kPartial, int kWidth>
  SEQKERNELS_INLINE void run_width(int64_t low, int64_t high, BagFault& fault) const {
    if (shape.extreme()) {
      reduce_units<kWeighted, kPartial, kWidth, true>(low, high, fault);
    } else if (!kPartial && t.D == kWidth * kLanes<T> && unsplit && plain() && t.batch == t.bags &&
               (!kWeighted || shape.mode == BagMode::kSum)) {
      reduce_single_block_bags<kWeighted, kWidth>(low, high, fault);
    } else {
      reduce_units<kWeighted, kPartial, kWidth, false>(low, high, fault);
    }
  }

  bool plain() const { return t.padding < 0 && t.column_stride == 1; }
  // Whether each bag is one row, whose sum and mean are a copy.
  bool copies() const {
    return !shape.byte_rows && !shape.extreme() && t.weights == nullptr && t.offsets == nullptr && t.length == 1 &&
           t.batch == t.bags && plain();
  }

  template <class I>
  __attribute__((noinline)) void copy_rows(int64_t low, int64_t high, BagFault& fault) const {
    constexpr int64_t kAhead = 12, kPrefetchedBytes = 512;  // longer rows are left to the hardware's prefetcher
    const I* const indices = static_cast<const I*>(t.indices) + t.first;
    const char* const table = static_cast<const char*>(t.table);
    const int64_t E = t.E, size = int64_t(sizeof(S)), width = t.D * size, row_bytes = t.row_stride * size;
    const int64_t first = bounds.bag_at(low), last = bounds.bag_at(high), ahead = min(width, kPrefetchedBytes);
    const int64_t out_bytes = t.out_stride * size;
    char* out = static_cast<char*>(t.out) + first * out_bytes;
    for (int64_t bag = first; bag < last; ++bag, out += out_bytes) {
      const int64_t index = indices[bag], next = indices[min(bag + kAhead, last - 1)];
      if (uint64_t(next) < uint64_t(E)) {
        for (int64_t b = 0; b < ahead; b += 64) __builtin_prefetch(table + next * row_bytes + b);
      }
      if (uint64_t(index) < uint64_t(E)) {
        copy_row(out, table + index * row_bytes, width);
      } else {
        record_fault(fault, BagFault::kIndex, t.first + bag, index);
      }
    }
  }
  // Copies vector by vector; the last vector ends at the end of the row.
  static SEQKERNELS_INLINE void copy_row(char* to, const char* from, int64_t n) {
    typedef char Bytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
    if (n < kVectorBytes) {
      copy_bytes(to, from, n);
      return;
    }
    int64_t b = 0;
    for (; b + kVectorBytes <= n; b += kVectorBytes) {
      *reinterpret_cast<Bytes*>(to + b) = *reinterpret_cast<const Bytes*>(from + b);
    }
    if (b < n)
      *reinterpret_cast<Bytes*>(to + n - kVectorBytes) = *reinterpret_cast<const Bytes*>(from + n - kVectorBytes);
  }

  // Fast path for bags that are not split, have no padding and exactly one block of columns: minimal work per bag.
  template <bool kWeighted, int kWidth>
  __attribute__((noinline)) void reduce_single_block_bags(int64_t low, int64_t high, BagFault& fault) const {
    const Bounds bounds = this->bounds;
    const int64_t first = bounds.bag_at(low), last = bounds.bag_at(high);
    IndexStream<S> index_stream(this->t, this->shape, bounds.begin(last), fault);
    const BagTable t = this->t;
    const BagMode mode = shape.mode;
    Block<S> block{static_cast<const S*>(t.table), t.D, 1, 0, kLanes<T>, nullptr, nullptr, 0, prefetch, true};
    Out* out = static_cast<Out*>(t.out) + first * t.out_stride;
    int64_t begin = bounds.begin(first);
    for (int64_t bag = first; bag < last; ++bag, out += t.out_stride) {
      const int64_t end = bounds.begin(bag + 1);
      block.n = end - begin;
      block.row_offsets = index_stream.at(begin, end);
      block.weights = index_stream.weights_at(begin);
      begin = end;
      if (block.n == 0) {
        write_empty(out, nullptr);
        continue;
      }
      Native<T> sums[kWidth];
      add_rows<kWeighted, false>(block, sums);
      write_sum<false>(block, mode, T(block.n), out, sums);
    }
  }

  void write_empty(Out* out, int32_t* at) const {
    zero_bytes(out, int64_t{sizeof(Out)} * t.D);
    if (at != nullptr && t.D > 0) memset(at, 0xff, 4 * t.D);
  }

  // Iterates over blocks of equal width. The last block ends at D and may recompute some columns, with the same result.
  template <bool kPartial, int kWidth, class F>
  SEQKERNELS_INLINE static void each_block(Block<S>& block, F&& f) {
    constexpr int64_t kColumns = kWidth * kLanes<T>;
    if (kPartial) block.lanes = min(block.D, kColumns);
    for (int64_t done = 0; done < block.D; done += kColumns) {
      block.column = max(0, min(done, block.D - kColumns));
      f();
    }
  }
  template <bool kPartial, int kWidth, class To>
  SEQKERNELS_INLINE static void write(const Block<S>& block, To* out, const Native<T> (&values)[kWidth]) {
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      store(out + block.column + v * kLanes<T>, values[v], kPartial ? block.lanes : kLanes<T>);
    }
  }
  template <bool kPartial, int kWidth, class To>
  SEQKERNELS_INLINE static void write_sum(const Block<S>& block, BagMode mode, T divisor, To* out,
                                          Native<T> (&sums)[kWidth]) {
    if (mode == BagMode::kMean) {
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) sums[v] = sums[v] / divisor;
    }
    write<kPartial>(block, out, sums);
  }
  template <bool kWeighted, bool kPartial, int kWidth, bool kExtreme, class To>
  SEQKERNELS_INLINE static void reduce(BagMode mode, Block<S>& block, int64_t first, T divisor, To* out, int32_t* at) {
    each_block<kPartial, kWidth>(block, [&]() __attribute__((always_inline)) {
      Native<T> values[kWidth];
      if constexpr (kExtreme) {
        typename Vec<T>::NativeInt winners[kWidth];
        compare_rows<kWeighted, kPartial>(block, mode == BagMode::kMin, first, values, winners);
        if (at != nullptr) {
#pragma GCC unroll 8
          for (int v = 0; v < kWidth; ++v) {
            store_positions<T>(at + block.column + v * kLanes<T>, winners[v], kPartial ? block.lanes : kLanes<T>);
          }
        }
        write<kPartial>(block, out, values);
      } else {
        add_rows<kWeighted, kPartial>(block, values);
        write_sum<kPartial>(block, mode, divisor, out, values);
      }
    });
  }

  template <bool kWeighted, bool kPartial, int kWidth, bool kExtreme>
  __attribute__((noinline)) void reduce_units(int64_t low, int64_t high, BagFault& fault) const {
    IndexStream<S> index_stream(this->t, this->shape, min(bounds.begin(bounds.bags), high), fault);
    const BagTable t = this->t;  // copies that the compiler knows are not aliased by the output
    const BagShape shape = this->shape;
    Block<S> block{
        static_cast<const S*>(t.table), t.D, t.column_stride, 0, kLanes<T>, nullptr, nullptr, 0, prefetch, plain()};
    for_each_unit(bounds, low, high, [&](const Unit& unit) __attribute__((always_inline)) {
      block.n = unit.end - unit.begin;
      block.row_offsets = index_stream.at(unit.begin, unit.end);
      block.weights = index_stream.weights_at(unit.begin);
      const int64_t count = count_rows(t.padding, block.row_offsets, block.n);
      T divisor = 1;
      if (!kExtreme && shape.mode == BagMode::kMean) {
        divisor = T(count);
        if (kWeighted && shape.mean_by == MeanBy::kWeight)
          divisor = sum_weights(block.row_offsets, block.weights, block.n);
      }
      if (__builtin_expect(unit.chunks > 1, 0)) {
        const Partial<T> partial = partials.of(unit.begin, unit.chunk == 0);
        *partial.count = count;
        *partial.weight = divisor;
        reduce<kWeighted, kPartial, kWidth, kExtreme>(shape.mode, block, unit.chunk * kChunk, T(1), partial.values,
                                                      partial.at);
        return;
      }
      Out* out = static_cast<Out*>(t.out) + output_offset(t, unit.bag, t.out_stride);
      int32_t* at = t.arg == nullptr ? nullptr : t.arg + output_offset(t, unit.bag, t.arg_stride);
      if (count == 0) {
        write_empty(out, at);
      } else {
        reduce<kWeighted, kPartial, kWidth, kExtreme>(shape.mode, block, 0, divisor, out, at);
      }
    });
  }

  // Merges the chunks of long bags in order. The thread that owns a bag's first chunk merges the bag.
  void merge(int64_t low, int64_t high) const {
    for_each_unit(bounds, low, high, [&](const Unit& unit) {
      if (unit.chunks == 1 || unit.chunk != 0) return;
      Out* out = static_cast<Out*>(t.out) + output_offset(t, unit.bag, t.out_stride);
      int32_t* at = t.arg == nullptr ? nullptr : t.arg + output_offset(t, unit.bag, t.arg_stride);
      const Partial<T> all = partials.of(unit.begin, true);
      int64_t count = *all.count;
      T divisor = *all.weight;
      for (int64_t chunk = 1; chunk < unit.chunks; ++chunk) {
        const Partial<T> more = partials.of(unit.begin + chunk * kChunk, false);
        divisor += *more.weight;
        if (*more.count == 0) continue;
        count += *more.count;
        for (int64_t d = 0; d < t.D; ++d) {
          if (!shape.extreme()) {
            all.values[d] += more.values[d];
            continue;
          }
          const T x = more.values[d], y = all.values[d];
          const bool better = shape.mode == BagMode::kMax ? x > y : x < y;
          if (all.at[d] < 0 || better || (x != x && y == y)) {
            all.values[d] = x;
            all.at[d] = more.at[d];
          }
        }
      }
      if (count == 0) return write_empty(out, at);
      if (shape.mode == BagMode::kMean) {
        for (int64_t d = 0; d < t.D; ++d) all.values[d] /= divisor;
      }
      convert(out, all.values, t.D);
      if (at != nullptr) copy_bytes(at, all.at, 4 * t.D);
    });
  }
};

template <class S>
BagFault forward_of(const BagForward& args) {
  using T = Compute<S>;
  int64_t bytes = 0, scratch_bytes = 0, longest = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    const BagTable& t = args.tables[i];
    const BagFault fault = check_offsets(t, args.shape.wide_offsets, longest);
    if (fault.kind != BagFault::kNone) return fault;
    bytes += Bounds{t, args.shape.wide_offsets}.work() * t.D * int64_t(sizeof(S));
    scratch_bytes += Partials<T>::bytes(t);
  }
  const bool merges = longest > kChunk;
  Memory scratch(merges ? scratch_bytes : 0);
  const auto scratch_of = [&](int64_t table) {
    int64_t before = 0;
    for (int64_t i = 0; i < table && merges; ++i) before += Partials<T>::bytes(args.tables[i]);
    return scratch.get() + before;
  };
  const Division division = divide(bytes);
  Faults faults;
  for_each_share(args, division, [&](int64_t i, int64_t low, int64_t high) {
    BagFault fault{};
    Forward<S>(args.tables[i], args.shape, scratch_of(i), !merges).run(low, high, fault);
    faults.add(fault);
  });
  const BagFault fault = faults.first();
  if (fault.kind != BagFault::kNone || !merges) return fault;
  for_each_share(args, division, [&](int64_t i, int64_t low, int64_t high) {
    Forward<S>(args.tables[i], args.shape, scratch_of(i), false).merge(low, high);
  });
  return fault;
}

}  // namespace

BagFault bag_forward(const BagForward& args) {
  if (args.shape.byte_rows) return forward_of<Byte>(args);
  return dispatch(args.shape.dtype, [&](auto storage) { return forward_of<decltype(storage)>(args); });
}

BagKernels bag_kernels() { return {bag_forward, bag_weights, bag_sort, bag_reduce, bag_renorm, bag_pack_bytes}; }

}  // namespace seqkernels::SEQKERNELS_ISA
