// Shared by the CPU kernels of EmbeddingBag: units of work, their distribution among threads, and index loading.
#pragma once

#include "common/bytes.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "embedding_bag/embedding_bag.h"

namespace seqkernels::SEQKERNELS_ISA {

// A bag with more indices than this is reduced in chunks of this size, which are merged in order. Several threads may
// share the bag, and the result does not depend on their number.
constexpr int64_t kChunk = 2048;

SEQKERNELS_INLINE int64_t chunks_of(int64_t n) { return n > kChunk ? (n + kChunk - 1) / kChunk : 1; }

template <class T>
SEQKERNELS_INLINE int64_t integer(const void* p, int64_t i) {
  return static_cast<const T*>(p)[i];
}
SEQKERNELS_INLINE int64_t integer(const void* p, bool wide, int64_t i) {
  return wide ? integer<int64_t>(p, i) : integer<int32_t>(p, i);
}

// Begin and end of each bag. Passed by value, so that the compiler keeps the members in registers across stores of
// rows.
struct Bounds {
  const void* offsets;
  int64_t offset_count, N, length, base, bags;
  bool wide;

  Bounds(const BagTable& t, bool wide)
      : offsets(t.offsets),
        offset_count(t.offset_count),
        N(t.N),
        length(t.length),
        base(t.first),
        bags(t.bags),
        wide(wide) {}

  SEQKERNELS_INLINE int64_t begin(int64_t bag) const {
    if (offsets == nullptr) return base + bag * length;
    return bag < offset_count ? integer(offsets, wide, bag) : N;
  }
  // Number of bags and indices before this bag. Grows by at least one per bag, even if the bag is empty.
  SEQKERNELS_INLINE int64_t key(int64_t bag) const { return begin(bag) + bag; }
  SEQKERNELS_INLINE int64_t first() const { return key(0); }
  SEQKERNELS_INLINE int64_t work() const { return key(bags) - key(0); }
  // The first bag whose key is at least `wanted`.
  inline int64_t bag_at(int64_t wanted) const {
    int64_t low = 0, high = bags;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (key(middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Keeps the first fault by position, independent of the order of reports.
SEQKERNELS_INLINE void record_fault(BagFault& fault, BagFault::Kind kind, int64_t position, int64_t value) {
  if (fault.kind == BagFault::kNone || kind < fault.kind || (kind == fault.kind && position < fault.position)) {
    fault = {kind, position, value};
  }
}

// Collects the faults of all threads.
class Faults {
 public:
  void add(const BagFault& fault) {
    if (fault.kind == BagFault::kNone) return;
    while (__atomic_test_and_set(&held_, __ATOMIC_ACQUIRE)) {
    }
    record_fault(first_, fault.kind, fault.position, fault.value);
    __atomic_clear(&held_, __ATOMIC_RELEASE);
  }
  const BagFault& first() const { return first_; }

 private:
  BagFault first_{};
  bool held_ = false;
};

// Checks that the bags are consecutive and within the indices. Raises `longest` to the length of the longest bag.
inline BagFault check_offsets(const BagTable& t, bool wide, int64_t& longest) {
  if (t.bags == 0) return {};
  const Bounds bounds{t, wide};
  if (t.offsets == nullptr) {
    longest = max(longest, t.length);
  } else {
    int64_t before = bounds.begin(0);
    if (before < 0 || before > t.N) return {BagFault::kOffset, 0, before};
    bool invalid = false;
    int64_t longest_bag = longest;  // a local, which reads of the offsets cannot alias
    for (int64_t bag = 1; bag <= t.bags; ++bag) {
      const int64_t now = bounds.begin(bag);
      invalid |= now < before || now > t.N;
      longest_bag = max(longest_bag, int64_t(uint64_t(now) - uint64_t(before)));  // invalid offsets may overflow
      before = now;
    }
    longest = longest_bag;
    for (int64_t bag = 1; invalid; ++bag) {
      const int64_t now = bounds.begin(bag);
      if (now < bounds.begin(bag - 1) || now > t.N) return {BagFault::kOffset, bag, now};
    }
  }
  // The loops over rows assume that a first row exists.
  if (t.E == 0 && bounds.work() > t.bags) return {BagFault::kIndex, bounds.begin(0), 0};
  return {};
}

// Units of work: a bag, or a chunk of a long one.

struct Unit {
  int64_t bag, begin, end;  // end - begin <= kChunk
  int64_t chunk, chunks;
};

// Calls f(unit) for every unit whose key (that of its bag, plus the unit's place in it) lies in [low, high).
template <class F>
SEQKERNELS_INLINE void for_each_unit(const Bounds bounds, int64_t low, int64_t high, F&& f) {
  int64_t bag = bounds.bag_at(low);
  if (bag > 0) --bag;  // chunks of the preceding bag may lie in this range
  int64_t begin = bounds.begin(bag);
  for (; bag < bounds.bags; ++bag) {
    const int64_t end = bounds.begin(bag + 1), chunks = chunks_of(end - begin);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t from = begin + chunk * kChunk, key = from + bag;
      if (key >= high) return;
      if (key >= low) f(Unit{bag, from, chunks == 1 ? end : min(end, from + kChunk), chunk, chunks});
    }
    begin = end;
  }
}

// Rows.

struct Byte {  // an element of a quantised row
  uint8_t bits;
};
}  // namespace seqkernels::SEQKERNELS_ISA

namespace seqkernels {
template <>
struct ComputeOf<SEQKERNELS_ISA::Byte> {
  using type = float;
};
}  // namespace seqkernels

namespace seqkernels::SEQKERNELS_ISA {

// One row from a given column on, as vectors of the compute type.
template <class S>
struct Row {
  const S* p;
  SEQKERNELS_INLINE Row(const S* row, int64_t, int64_t first) : p(row + first) {}
  SEQKERNELS_INLINE Native<Compute<S>> operator()(int64_t column) const { return load(p + column); }
  SEQKERNELS_INLINE Native<Compute<S>> operator()(int64_t column, int64_t n) const { return load(p + column, n); }
};
template <>
struct Row<Byte> {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
  const Byte* p;
  Native<float> scale, bias;
  SEQKERNELS_INLINE Row(const Byte* row, int64_t D, int64_t first) : p(row + first) {
    float numbers[2];
    memcpy(numbers, row + D, sizeof(numbers));
    scale = broadcast(numbers[0]);
    bias = broadcast(numbers[1]);
  }
  SEQKERNELS_INLINE Native<float> value(Bytes bytes) const {
#if defined(__AVX512F__)
    const Native<float> f = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#else
    const Native<float> f = __builtin_convertvector(__builtin_convertvector(bytes, Bits32), Native<float>);
#endif
    return fma(f, scale, bias);
  }
  SEQKERNELS_INLINE Native<float> operator()(int64_t column) const {
    return value(*reinterpret_cast<const Bytes*>(p + column));
  }
  SEQKERNELS_INLINE Native<float> operator()(int64_t column, int64_t n) const {
    uint8_t lanes[kLanes<float>] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[column + i].bits;
    return value(*reinterpret_cast<const Bytes*>(lanes));
  }
};

// Output dtype of a table of S.
template <class S>
struct OutputOf {
  using type = S;
};
template <>
struct OutputOf<Byte> {
  using type = float;
};

// Indices as row offsets.

constexpr int64_t kPrefetchDistance = 32;  // prefetch distance in rows
constexpr int64_t kMaxOffsets = 2 * kChunk;
constexpr int64_t kOffsetBatch = 512;  // offsets computed at once, unless a unit has more

// Reads the indices of a table in order, as row offsets in the table, with their weights.
template <class S>
struct IndexStream {
  using T = Compute<S>;
  const BagTable& t;
  const BagShape& shape;
  const int64_t limit;  // positions from here on are outside all bags or belong to another thread
  BagFault& fault;
  int64_t begin = 0, end = 0;                            // positions that are loaded
  int64_t row_offsets[kMaxOffsets + kPrefetchDistance];  // of the row in the table, in elements; -1: padding index
  T weights[kMaxOffsets];

  IndexStream(const BagTable& t, const BagShape& shape, int64_t limit, BagFault& fault)
      : t(t), shape(shape), limit(limit), fault(fault) {}

  // Returns offsets such that offsets[i] belongs to position from + i, for the positions [from, to).
  SEQKERNELS_INLINE const int64_t* at(int64_t from, int64_t to) {
    if (from < begin || to > end) fill(from, to);
    return row_offsets + (from - begin);
  }
  SEQKERNELS_INLINE const T* weights_at(int64_t from) const { return weights + (from - begin); }

  __attribute__((noinline)) void fill(int64_t from, int64_t to) {
    begin = from;
    end = max(to, min(limit, from + kOffsetBatch));
    const int64_t ahead = min(t.N, end + kPrefetchDistance);
    if (shape.wide_indices) {
      fill_from<int64_t>(ahead);
    } else {
      fill_from<int32_t>(ahead);
    }
    for (int64_t i = ahead; i < end + kPrefetchDistance; ++i) row_offsets[i - begin] = 0;
    if (t.weights == nullptr) return;
    if (shape.wide_weights) {
      copy_bytes(weights, static_cast<const T*>(t.weights) + begin, int64_t{sizeof(T)} * (end - begin));
    } else {
      using W = typename OutputOf<S>::type;
      convert(weights, static_cast<const W*>(t.weights) + begin, end - begin);
    }
  }

  template <class I>
  SEQKERNELS_INLINE void fill_from(int64_t ahead) {
    const I* indices = static_cast<const I*>(t.indices);
    const int64_t E = t.E, stride = t.row_stride, padding = t.padding;
    int64_t invalid = 0;
    for (int64_t i = begin; i < ahead; ++i) {
      const int64_t index = indices[i];
      invalid |= uint64_t(index) >= uint64_t(E);
      // Unsigned, because the product of an invalid index may overflow.
      row_offsets[i - begin] = index == padding ? -1 : int64_t(uint64_t(index) * uint64_t(stride));
    }
    if (invalid == 0) return;
    for (int64_t i = begin; i < ahead; ++i) {
      const int64_t index = indices[i];
      if (uint64_t(index) < uint64_t(E)) continue;
      if (i < end) record_fault(fault, BagFault::kIndex, i, index);
      row_offsets[i - begin] = 0;  // the result is discarded, because the call fails
    }
  }
};

// Number of rows among n that are not padding.
SEQKERNELS_INLINE int64_t count_rows(int64_t padding, const int64_t* row_offsets, int64_t n) {
  if (padding < 0) return n;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += row_offsets[i] >= 0;
  return count;
}
template <class T>
SEQKERNELS_INLINE T sum_weights(const int64_t* row_offsets, const T* weights, int64_t n) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += row_offsets[i] >= 0 ? weights[i] : T(0);
  return sum;
}

// Offset of a bag's row in the output.
SEQKERNELS_INLINE int64_t output_offset(const BagTable& t, int64_t bag, int64_t stride) {
  if (t.batch == t.bags) return bag * stride;
  return bag % t.batch * stride + bag / t.batch * t.D;
}

// Positions are stored as int32 and compared in lanes of the values' width.
template <class T>
SEQKERNELS_INLINE void store_positions(int32_t* to, typename Vec<T>::NativeInt at, int64_t lanes) {
  typedef int32_t Narrow __attribute__((vector_size(4 * kLanes<T>), aligned(4), may_alias));
  if (lanes >= kLanes<T>) {
    *reinterpret_cast<Narrow*>(to) = __builtin_convertvector(at, Narrow);
  } else {
    for (int64_t i = 0; i < lanes; ++i) to[i] = int32_t(at[i]);
  }
}
template <class T>
SEQKERNELS_INLINE typename Vec<T>::NativeInt load_positions(const int32_t* p, int64_t lanes) {
  using Int = typename Vec<T>::NativeInt;
  typedef int32_t Narrow __attribute__((vector_size(4 * kLanes<T>), aligned(4), may_alias));
  if (lanes >= kLanes<T>) return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Int);
  Int at = Int{} - 1;
  for (int64_t i = 0; i < lanes; ++i) at[i] = p[i];
  return at;
}

// Replaces a value by x if x is larger, or is the first NaN.
template <class T, class Int>
SEQKERNELS_INLINE void update_max(Native<T>& value, Int& at, Native<T> x, Int where) {
  const auto better = (x > value) | ((x != x) & (value == value));
  value = better ? x : value;
  at = better ? where : at;
}
SEQKERNELS_INLINE void update_max(Native<float>& value, Vec<float>::NativeInt& at, Native<float> x,
                                  Vec<float>::NativeInt where) {
#if defined(__AVX512F__)
  const __mmask16 better = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), x, value, _CMP_NLE_UQ);
  value = _mm512_mask_mov_ps(value, better, x);
  at = (Vec<float>::NativeInt)_mm512_mask_mov_epi32((__m512i)at, better, (__m512i)where);
#else
  update_max<float, Vec<float>::NativeInt>(value, at, x, where);
#endif
}
SEQKERNELS_INLINE void update_max(Native<double>& value, Vec<double>::NativeInt& at, Native<double> x,
                                  Vec<double>::NativeInt where) {
#if defined(__AVX512F__)
  const __mmask8 better = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(value, value, _CMP_ORD_Q), x, value, _CMP_NLE_UQ);
  value = _mm512_mask_mov_pd(value, better, x);
  at = (Vec<double>::NativeInt)_mm512_mask_mov_epi64((__m512i)at, better, (__m512i)where);
#else
  update_max<double, Vec<double>::NativeInt>(value, at, x, where);
#endif
}

// Prefetches the part of a row that a block of columns will read, at two distances: far ahead into the L2 cache, then
// into the L1 cache. Tables that fit into a cache are not prefetched.
struct Prefetch {
  static constexpr int64_t kNear = 8;
  static constexpr int64_t kNearFrom = 1 << 20, kFarFrom = 16 << 20;  // minimum table size in bytes
  bool near, far;

  void set(int64_t bytes) {
    near = bytes > kNearFrom;
    far = bytes > kFarFrom;
  }
  template <class S, int kBytes>
  SEQKERNELS_INLINE void operator()(const S* table, const int64_t* row_offsets, int64_t i) const {
    if (near) {
      const char* p = reinterpret_cast<const char*>(table + row_offsets[i + kNear]);
#pragma GCC unroll 16
      for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(p + b, 0, 3);
    }
    if (far) {
      const char* p = reinterpret_cast<const char*>(table + row_offsets[i + kPrefetchDistance]);
#pragma GCC unroll 16
      for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(p + b, 0, 2);
    }
  }
};

// Calls f(part) for each of the parts of a division.
template <class F>
void for_each_part(const Division& division, F&& f) {
  parallel_for(division.threads, division.threads, division.nanoseconds, [&](int64_t, int64_t part) { f(part); });
}

// Calls f(table, low, high) with the range of keys of every table that belongs to each part of a division.
template <class F>
void for_each_share(const BagForward& args, const Division& division, F&& f) {
  const auto bounds_of = [&](int64_t i) { return Bounds{args.tables[i], args.shape.wide_offsets}; };
  int64_t total = 0;  // work per key is proportional to D
  for (int64_t i = 0; i < args.count; ++i) total += bounds_of(i).work() * max(1, args.tables[i].D);
  for_each_part(division, [&](int64_t thread) {
    const int64_t from = part(total, division.threads, thread), to = part(total, division.threads, thread + 1);
    int64_t before = 0;
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t D = max(1, args.tables[i].D), work = bounds_of(i).work(), first = bounds_of(i).first();
      const int64_t low = max(0, (from - before + D - 1) / D), high = min(work, (to - before + D - 1) / D);
      if (low < high) f(i, first + low, first + high);
      before += work * D;
    }
  });
}

// Defined in the files of the same names.
BagFault bag_weights(const BagBackward& args, void* dweights);
BagFault bag_sort(const BagBackward& args, RowSort& out);
void bag_reduce(const BagBackward& args, const RowSort& sort, const RowTarget& to);
BagFault bag_renorm(const BagBackward& args, double max_norm, double norm_type);
void bag_pack_bytes(const BagTable& t, DType dtype, uint8_t* packed);

}  // namespace seqkernels::SEQKERNELS_ISA
