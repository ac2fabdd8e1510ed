// Shared by the forward and backward CUDA kernels of EmbeddingBag: tables, bounds, indices, and the columns of a lane.
//
// A group of lanes (a power of two) processes one row, 16 bytes per lane, so that narrow rows share a warp. The lanes
// of a group read the same indices, which the L1 cache serves with one access. Groups do not synchronise with each
// other.
#pragma once

#include <stdexcept>
#include <vector>

#include "common/device.cuh"
#include "common/math.h"
#include "embedding_bag/cuda/launch.h"
#include "embedding_bag/embedding_bag.h"

namespace seqkernels::bags_cuda {

using namespace device;

constexpr int kThreads = 256;
constexpr int kWalkThreads = 128;  // for kernels with many registers: smaller blocks raise occupancy

struct Byte {  // an element of a quantised row
  uint8_t bits;
};

// Compute type of an element, and the dtype in which results are stored.
template <class S>
struct Element {
  using T = Compute<S>;
  using Out = S;
};
template <>
struct Element<Byte> {
  using T = float;
  using Out = float;
};

// Faults.

// Fault words order by kind, then by position: the first fault has the largest word, so atomic_max keeps it.
constexpr int kFaultBits = 60;
SK_HOST_DEVICE uint64_t fault_word(BagFault::Kind kind, int64_t position) {
  return ~(static_cast<uint64_t>(kind) << kFaultBits | static_cast<uint64_t>(position));
}

struct FaultReporter {
  BagFaultWord* word;

  SK_DEVICE void report(BagFault::Kind kind, int64_t position) const {
    if (word != nullptr) atomic_max(global<uint64_t>(word, 1), 0, fault_word(kind, position));
  }
};

// Integers of either width.

struct Integers {
  const void* data;
  int64_t count;
  bool wide;

  SK_DEVICE int64_t operator[](int64_t i) const {
    if (wide) return load<Cache::kReadOnly>(global<const int64_t>(data, count), i);
    return load<Cache::kReadOnly>(global<const int32_t>(data, count), i);
  }
  // Reads kMaxCount integers from `first` on, of which n exist. Branches once on the width.
  template <int kMaxCount>
  SK_DEVICE void read(int64_t (&out)[kMaxCount], int64_t first, int64_t n) const {
    if (wide) {
      read_as<int64_t>(out, first, n);
    } else {
      read_as<int32_t>(out, first, n);
    }
  }

 private:
  template <class I, int kMaxCount>
  SK_DEVICE void read_as(int64_t (&out)[kMaxCount], int64_t first, int64_t n) const {
    const auto from = global<const I>(data, count);
    SK_UNROLL
    for (int j = 0; j < kMaxCount; ++j) out[j] = j < n ? load<Cache::kReadOnly>(from, first + j) : I(-1);
  }
};

// Bags.

struct Span {
  int64_t begin, end;
  SK_DEVICE int64_t size() const { return end - begin; }
};

// Begin and end of the bags of a call; of a collection, those of all tables.
struct Bounds {
  Integers offsets;  // data null: bag b begins at first + b * length
  int64_t bags, N, length, first;

  SK_DEVICE int64_t begin(int64_t bag) const {
    if (offsets.data == nullptr) return first + bag * length;
    return bag < offsets.count ? offsets[bag] : N;
  }
  // The bag's positions, clamped to the indices, so that invalid offsets cannot cause reads outside of them.
  SK_DEVICE Span clamped(int64_t bag) const {
    const int64_t from = max(0, min(begin(bag), N));
    return {from, max(from, min(begin(bag + 1), N))};
  }
  SK_DEVICE void check(int64_t bag, const FaultReporter& faults) const {
    if (offsets.data == nullptr) return;
    const int64_t from = begin(bag), to = begin(bag + 1);
    if (bag == 0 && from != 0) faults.report(BagFault::kFirstOffset, 0);
    if (to < from || to > N) faults.report(BagFault::kOffset, bag + 1);
  }
  // The last of the bags [low, high) that begins at or before this position; `low` if there is none.
  SK_DEVICE int64_t bag_at(int64_t position, int64_t low, int64_t high) const {
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (begin(middle) <= position) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  SK_DEVICE int64_t bag_at(int64_t position) const {
    if (offsets.data == nullptr) return length == 0 ? 0 : max(0, min((position - first) / length, bags - 1));
    return bag_at(position, 0, bags);
  }
};

// Tables.

// A table with its offsets among the tables of a call, and the destination of its rows' gradients.
struct TableDescriptor {
  BagTable t;
  int64_t bags_before, rows_before;
  int64_t units_before;   // forward: units of work of preceding tables
  int64_t values_before;  // sparse gradients: distinct rows of preceding tables
  RowTarget target;       // its `step` is not set
  void* state1;
  void* state2;

  // Offset of a bag's row in an array whose rows are `stride` apart.
  SK_DEVICE int64_t output_offset(int64_t bag, int64_t stride) const {
    const int64_t j = bag - bags_before;
    if (t.batch == t.bags) return j * stride;
    return j % t.batch * stride + j / t.batch * t.D;
  }
  SK_HOST_DEVICE int64_t rows_end(int64_t stride) const {  // elements
    return t.bags == 0 ? 0 : (t.batch - 1) * stride + t.bags / t.batch * t.D;
  }
};

// The tables of a call, found by a unit, bag or row numbered across all tables.
struct OneTable {
  TableDescriptor only;
  SK_DEVICE TableDescriptor of_unit(int64_t) const { return only; }
  SK_DEVICE TableDescriptor of_bag(int64_t) const { return only; }
};
struct ManyTables {
  const TableDescriptor* descriptors;  // [count], device memory
  int64_t count;

  SK_DEVICE TableDescriptor of_unit(int64_t unit) const { return last<&TableDescriptor::units_before>(unit); }
  SK_DEVICE TableDescriptor of_bag(int64_t bag) const { return last<&TableDescriptor::bags_before>(bag); }
  SK_DEVICE TableDescriptor of_row(int64_t row) const { return last<&TableDescriptor::rows_before>(row); }

 private:
  // The last table with at most `wanted` before it. Tables without units, bags or rows share that number with the next
  // table and are skipped by this.
  template <int64_t TableDescriptor::* kBefore>
  SK_DEVICE TableDescriptor last(int64_t wanted) const {
    const auto tables = global<const TableDescriptor>(descriptors, count);
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (before(tables, middle, kBefore) <= wanted) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return tables[low];
  }
  static SK_DEVICE int64_t before(Global<const TableDescriptor> tables, int64_t i, int64_t TableDescriptor::* member) {
    const TableDescriptor& table = tables[i];
    return table.*member;
  }
};

// Columns.

// The columns of a lane. Wide: 16 contiguous bytes per lane (4 for quantised rows, which begin at multiples of 4).
// Narrow: single elements with any column stride; the columns of a lane are a group's width apart.
template <class S, bool kWide>
struct Columns {
  static constexpr int kCount = kWide && sizeof(S) != 1 ? 16 / int(sizeof(S)) : 4;
  static constexpr int kTile = kCount * kWarp;  // maximum columns of a group

  int64_t D, first;  // first column of the tile
  int lane, group;

  SK_DEVICE bool wide_in_row() const { return first + lane * kCount < D; }
  SK_DEVICE int64_t at(int v) const { return kWide ? first + lane * kCount + v : first + v * group + lane; }
  SK_DEVICE bool in_row(int v) const { return at(v) < D; }
  SK_DEVICE bool any() const { return in_row(0); }
};

// Number of lanes for a row of D columns.
template <class C>
inline int group_for(int64_t D) {
  int group = 1;
  while (group < kWarp && group * C::kCount < D) group *= 2;
  return group;
}

// Stores or loads the contiguous columns of a lane, up to 16 bytes per access.
template <int kCount, class To, class T>
SK_DEVICE void store_contiguous(Global<To> to, int64_t i, const T (&values)[kCount]) {
  constexpr int kPart = kCount * int(sizeof(To)) > 16 ? 16 / int(sizeof(To)) : kCount;
  SK_UNROLL
  for (int p = 0; p < kCount; p += kPart) {
    Vec<To, kPart> v;
    SK_UNROLL
    for (int j = 0; j < kPart; ++j) {
      if constexpr (std::is_integral<To>::value) {
        v[j] = values[p + j];
      } else {
        v[j] = narrow<To>(values[p + j]);
      }
    }
    store_vec(to, i + p, v);
  }
}
template <int kCount, class From, class T>
SK_DEVICE void load_contiguous(T (&values)[kCount], Global<From> from, int64_t i) {
  using Stored = std::remove_const_t<From>;
  constexpr int kPart = kCount * int(sizeof(From)) > 16 ? 16 / int(sizeof(From)) : kCount;
  SK_UNROLL
  for (int p = 0; p < kCount; p += kPart) {
    const Vec<Stored, kPart> v = load_vec<kPart>(from, i + p);
    SK_UNROLL
    for (int j = 0; j < kPart; ++j) {
      if constexpr (std::is_integral<Stored>::value) {
        values[p + j] = v[j];
      } else {
        values[p + j] = widen(v[j]);
      }
    }
  }
}

// Stores a lane's columns of a row of results with contiguous columns.
template <class C, class To, class T>
SK_DEVICE void store_row(const C& columns, Global<To> row, const T (&values)[C::kCount], bool wide) {
  if (wide) {
    if (columns.wide_in_row()) store_contiguous<C::kCount>(row, columns.at(0), values);
    return;
  }
  SK_UNROLL
  for (int v = 0; v < C::kCount; ++v) {
    if (!columns.in_row(v)) continue;
    if constexpr (std::is_integral<To>::value) {
      row[columns.at(v)] = values[v];
    } else {
      row[columns.at(v)] = narrow<To>(values[v]);
    }
  }
}

// Lane mask of this thread's group.
SK_DEVICE uint32_t group_mask(int group) {
  const uint32_t lanes = group == kWarp ? kAllLanes : (1u << group) - 1;
  return lanes << (lane_index() & ~(group - 1));
}
// Sum over the lanes of the group, returned to each of them. All lanes of the group must call this.
template <class T>
SK_DEVICE T group_sum(T x, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) {
    x += shuffle_xor(x, distance, kWarp, group_mask(group));
  }
  return x;
}

// Rows of a table.

// Loads a lane's columns of a row. Raw keeps them in the storage type, because many rows are in flight at once.
template <class S, bool kWide>
struct RowLoader {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  struct Raw {
    S values[C::kCount];
  };

  Global<const S> table;
  int64_t column_stride;
  C columns;

  SK_DEVICE void load(Raw& raw, int64_t place) const {
    if constexpr (kWide) {
      if (columns.wide_in_row()) {
        const Vec<S, C::kCount> v = load_vec<C::kCount, Cache::kReadOnly>(table, place + columns.at(0));
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) raw.values[i] = v[i];
      }
    } else {
      SK_UNROLL
      for (int v = 0; v < C::kCount; ++v) {
        if (columns.in_row(v)) {
          raw.values[v] = device::load<Cache::kReadOnly>(table, place + columns.at(v) * column_stride);
        }
      }
    }
  }
  SK_DEVICE T value(const Raw& raw, int v) const { return widen(raw.values[v]); }
};

// Quantised rows: scale and bias are loaded with every row.
template <bool kWide>
struct RowLoader<Byte, kWide> {
  using C = Columns<Byte, kWide>;
  using T = float;
  struct Raw {
    uint8_t values[C::kCount];
    float scale, bias;
  };

  Global<const uint8_t> table;
  C columns;

  SK_DEVICE void load(Raw& raw, int64_t place) const {
    if constexpr (kWide) {
      if (!columns.wide_in_row()) return;
      const Vec<uint8_t, 4> v = load_vec<4, Cache::kReadOnly>(table, place + columns.at(0));
      SK_UNROLL
      for (int i = 0; i < C::kCount; ++i) raw.values[i] = v[i];
    } else {
      SK_UNROLL
      for (int v = 0; v < C::kCount; ++v) {
        if (columns.in_row(v)) raw.values[v] = device::load<Cache::kReadOnly>(table, place + columns.at(v));
      }
    }
    raw.scale = number(place + columns.D);
    raw.bias = number(place + columns.D + 4);
  }
  SK_DEVICE float value(const Raw& raw, int v) const { return fmaf(float(raw.values[v]), raw.scale, raw.bias); }

 private:
  SK_DEVICE float number(int64_t place) const {
    if constexpr (kWide) {
      return bit_cast<float>(load_vec<4, Cache::kReadOnly>(table, place));
    } else {
      Vec<uint8_t, 4> bytes;
      SK_UNROLL
      for (int i = 0; i < 4; ++i) bytes[i] = device::load<Cache::kReadOnly>(table, place + i);
      return bit_cast<float>(bytes);
    }
  }
};

template <class S>
struct StoredAs {
  using type = S;
};
template <>
struct StoredAs<Byte> {
  using type = uint8_t;
};

template <class S, bool kWide>
SK_DEVICE RowLoader<S, kWide> row_loader(const BagTable& t, const Columns<S, kWide>& columns) {
  const auto table = global<const typename StoredAs<S>::type>(
      t.table, t.E == 0 ? 0 : (t.E - 1) * t.row_stride + (sizeof(S) == 1 ? t.D + 8 : (t.D - 1) * t.column_stride + 1));
  if constexpr (sizeof(S) == 1) {
    return {table, columns};
  } else {
    return {table, t.column_stride, columns};
  }
}

// Weights.

// Per-sample weights, converted to the compute type. They are stored in that type or in the table's dtype.
template <class S>
struct Weights {
  using T = typename Element<S>::T;
  using Narrow = typename Element<S>::Out;
  const void* data;
  int64_t count;
  bool wide;

  SK_DEVICE T operator[](int64_t i) const {
    if (wide) return load<Cache::kReadOnly>(global<const T>(data, count), i);
    return widen(load<Cache::kReadOnly>(global<const Narrow>(data, count), i));
  }
};

// Host functions.

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Divides scratch memory into arrays. Measuring (null base) and use must request the same arrays in the same order.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

inline LaunchConfig blocks_of(int64_t threads, void* stream, int64_t tiles = 1, int block = kThreads) {
  LaunchConfig config;
  config.grid = {ceil_div(threads, block), tiles};
  config.block = block;
  config.stream = stream;
  return config;
}

// The bounds of all bags of a call.
inline Bounds bounds_of(const BagForward& bags) {
  const BagTable& first = bags.tables[0];
  Bounds b{{first.offsets, 0, bags.shape.wide_offsets}, 0, first.N, first.length, first.first};
  const int64_t size = bags.shape.wide_offsets ? 8 : 4;
  for (int64_t i = 0; i < bags.count; ++i) {
    const BagTable& t = bags.tables[i];
    if (i > 0 && t.offsets != static_cast<const char*>(first.offsets) + b.bags * size) {
      throw std::logic_error("embedding_bag: the tables of a collection must share one array of offsets");
    }
    b.offsets.count = first.offsets == nullptr ? 0 : b.bags + t.offset_count;
    b.bags += t.bags;
  }
  return b;
}

// Writes table descriptors to device memory. Defined in tables.cu.
ManyTables upload_tables(const TableDescriptor* tables, int64_t count, TableDescriptor* to, void* stream,
                         const int64_t* values_before = nullptr);

inline int64_t most_columns(const BagForward& bags) {
  int64_t D = 0;
  for (int64_t i = 0; i < bags.count; ++i) D = max(D, bags.tables[i].D);
  return D;
}
template <class C>
inline int group_of(const BagForward& bags) {
  return group_for<C>(most_columns(bags));
}
template <class C>
inline int64_t tiles_of(const BagForward& bags) {
  return max(1, ceil_div(most_columns(bags), C::kTile));
}

// Whether every row can be read and stored in accesses of 16 bytes.
inline bool wide_rows(const BagForward& bags, bool reads_tables) {
  const BagShape& shape = bags.shape;
  const int64_t size = shape.byte_rows                  ? 1
                       : shape.dtype == DType::kFloat64 ? 8
                       : shape.dtype == DType::kFloat32 ? 4
                                                        : 2;
  const int64_t out_size = shape.byte_rows ? 4 : size, columns = shape.byte_rows ? 4 : 16 / size;
  const int64_t row_bytes = shape.byte_rows ? 4 : 16, arg_bytes = min(16, 4 * columns);
  for (int64_t i = 0; i < bags.count; ++i) {
    const BagTable& t = bags.tables[i];
    if (t.D % columns != 0) return false;
    if (!aligned(t.out, 16) || t.out_stride * out_size % 16 != 0) return false;
    if (t.arg != nullptr && (!aligned(t.arg, arg_bytes) || t.arg_stride * 4 % arg_bytes != 0)) return false;
    if (!reads_tables) continue;
    if (t.column_stride != 1 || !aligned(t.table, row_bytes) || t.row_stride * size % row_bytes != 0) return false;
  }
  return true;
}

// Calls f with a value of the rows' element type and with whether rows are wide. The only place where both become
// types.
template <class F>
inline void dispatch_rows(const BagForward& bags, bool reads_tables, F&& f) {
  const bool wide = wide_rows(bags, reads_tables);
  const auto by_width = [&](auto storage) {
    if (wide) {
      f(storage, std::true_type{});
    } else {
      f(storage, std::false_type{});
    }
  };
  if (bags.shape.byte_rows) return by_width(Byte{});
  dispatch(bags.shape.dtype, by_width);
}

// Descriptors of the tables of a call. Units of work hold `per_unit` bags.
inline std::vector<TableDescriptor> descriptors_of(const BagForward& bags, int64_t per_unit) {
  std::vector<TableDescriptor> tables(bags.count);
  TableDescriptor before{};
  for (int64_t i = 0; i < bags.count; ++i) {
    const BagTable& t = bags.tables[i];
    if (t.E >= 0xffffffff)
      throw std::runtime_error("embedding_bag: a table must have fewer than 2^32 - 1 rows on CUDA");
    tables[i] = before;
    tables[i].t = t;
    before.bags_before += t.bags;
    before.units_before += ceil_div(t.bags, per_unit);
  }
  return tables;
}

// Factors of a mean's gradients, [bags] in the compute type. `tables` is used only to look up bags. Defined in
// tallies.cu.
int64_t bag_scales_scratch_bytes(const BagForward& bags);
void launch_bag_scales(const BagForward& bags, const ManyTables& tables, void* scales, void* scratch, void* stream);
// Sums of per-sample weights, or numbers of rows, of every bag (`mean_by`), [bags] in the compute type. The scratch
// memory has the size that bag_scales_scratch_bytes returns. Defined in tallies.cu.
void launch_bag_tallies(const BagForward& bags, const ManyTables& tables, void* tallies, void* scratch, void* stream);

}  // namespace seqkernels::bags_cuda
