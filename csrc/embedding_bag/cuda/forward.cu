// Forward pass of EmbeddingBag on CUDA. walk.cuh describes the algorithm.
#include <vector>

#include "embedding_bag/cuda/bags.cuh"
#include "embedding_bag/cuda/partials.cuh"

namespace seqkernels {

namespace bags_cuda {

// Descriptors are passed as kernel parameters, a few per launch, so that no host memory must outlive the call.
struct TablePack {
  static constexpr int kMaxCount = 15;
  TableDescriptor tables[kMaxCount];
  TableDescriptor* to;
  int64_t from, count;
  const int64_t* values_before;  // null, or an array over all tables
};
static_assert(sizeof(TablePack) <= 4096, "the limit of kernel parameters on every device");

SK_KERNEL(32) bag_tables_kernel(const SK_GRID_CONSTANT TablePack pack) {
  const auto to = global<TableDescriptor>(pack.to, pack.from + pack.count);
  const int i = thread_index();
  if (i >= pack.count) return;
  TableDescriptor table = pack.tables[i];
  if (pack.values_before != nullptr) {
    table.values_before = global<const int64_t>(pack.values_before, pack.from + pack.count)[pack.from + i];
  }
  to[pack.from + i] = table;
}

ManyTables upload_tables(const TableDescriptor* tables, int64_t count, TableDescriptor* to, void* stream,
                         const int64_t* values_before) {
  for (int64_t from = 0; from < count; from += TablePack::kMaxCount) {
    TablePack pack{};
    pack.to = to;
    pack.from = from;
    pack.values_before = values_before;
    pack.count = min(TablePack::kMaxCount, count - from);
    for (int64_t i = 0; i < pack.count; ++i) pack.tables[i] = tables[from + i];
    LaunchConfig config;
    config.block = 32;
    config.stream = stream;
    launch(bag_tables_kernel, config, pack);
  }
  return {to, count};
}

namespace {

// 16 steps of rows. Smaller chunks would write more partial results; these are a few percent of what is read.
constexpr int64_t kChunk = 128;
constexpr int kRows = 8;
constexpr int64_t kPositionsPerUnit = 64;  // positions per unit, if bags are shorter
constexpr int64_t kWaves = 4;

template <class Tables, class T>
struct ForwardArgs {
  static constexpr bool kUploaded = std::is_same<Tables, ManyTables>::value;
  Tables tables;
  Bounds bounds;
  FaultReporter faults;
  BagMode mode;
  MeanBy mean_by;
  bool wide_indices, wide_weights, weighted;
  int64_t ranges, bags_per_unit;  // units of work, of bags_per_unit bags each
  int64_t windows;                // of kChunk positions, in which pieces of long bags begin
  int64_t* window_owners;         // [windows] the long bag that extends over the window's begin; else arbitrary
  int group;
  Partials<T> partials;
  T* tallies;     // [bags]; for TallyRows
  bool inverted;  // store 1 / tally
};

// Indices.

// Loads the indices of some positions as rows of the table, with their weights.
template <class S>
struct IndexLoader {
  using T = typename Element<S>::T;
  static constexpr uint32_t kSkipped = 0xffffffffu;  // padding or out of range

  Integers indices;
  Weights<S> weights;
  int64_t E, padding;
  FaultReporter faults;

  SK_DEVICE IndexLoader(const BagTable& t, bool wide_indices, bool wide_weights, FaultReporter faults_)
      : indices{t.indices, t.N, wide_indices},
        weights{t.weights, t.N, wide_weights},
        E(t.E),
        padding(t.padding),
        faults(faults_) {}
  // Loads up to n indices from position `first` on; the others are kSkipped.
  template <int kMaxCount>
  SK_DEVICE void fetch(uint32_t (&rows)[kMaxCount], int64_t first, int n) const {
    if (indices.wide) {
      fetch_as<int64_t>(rows, first, n);
    } else {
      fetch_as<int32_t>(rows, first, n);
    }
  }
  SK_DEVICE T weight(int64_t position) const { return weights.data == nullptr ? T(1) : weights[position]; }

 private:
  template <class I, int kMaxCount>
  SK_DEVICE void fetch_as(uint32_t (&rows)[kMaxCount], int64_t first, int n) const {
    const auto from = global<const I>(indices.data, indices.count);
    I index[kMaxCount];
    bool invalid = false;
    SK_UNROLL
    for (int j = 0; j < kMaxCount; ++j) index[j] = j < n ? load<Cache::kReadOnly>(from, first + j) : I(0);
    SK_UNROLL
    for (int j = 0; j < kMaxCount; ++j) {
      const bool inside = static_cast<uint64_t>(index[j]) < static_cast<uint64_t>(E);
      invalid |= j < n && !inside;
      rows[j] = j < n && inside && index[j] != padding ? static_cast<uint32_t>(index[j]) : kSkipped;
    }
    if (invalid) report<I>(first, n < kMaxCount ? n : kMaxCount);
  }
  template <class I>
  SK_DEVICE void report(int64_t first, int64_t n) const {
    const auto from = global<const I>(indices.data, indices.count);
    for (int64_t i = first; i < first + n; ++i) {
      const int64_t index = from[i];
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(E)) return faults.report(BagFault::kIndex, i);
    }
  }
};

// Reductions. Each defines Raw (a row as loaded), State (the running result) and the epilogue that stores it.

// Count and sum of weights of the rows of a bag.
template <class T>
struct Tally {
  int64_t count;
  T weight;

  SK_DEVICE void reset() {
    count = 0;
    weight = 0;
  }
  SK_DEVICE void add(T w) {
    ++count;
    weight += w;
  }
  SK_DEVICE void merge(const Tally& later) {
    count += later.count;
    weight += later.weight;
  }
  SK_DEVICE void save(const Partials<T>& partials, int64_t slot) const {
    partials.count()[slot] = count;
    partials.weight()[slot] = weight;
  }
  SK_DEVICE void restore(const Partials<T>& partials, int64_t slot) {
    count = partials.count()[slot];
    weight = partials.weight()[slot];
  }
  SK_DEVICE T divisor(const BagTable& t, MeanBy mean_by) const {
    return t.weights != nullptr && mean_by == MeanBy::kWeight ? weight : T(count);
  }
};

template <class S, bool kWide>
struct RowReduction {
  using Storage = S;
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  using Out = typename Element<S>::Out;
  using Loader = RowLoader<S, kWide>;
  using Raw = typename Loader::Raw;
  using Ring = std::bool_constant<kWide && (sizeof(S) > 1)>;
  // Blocks per multiprocessor, as far as the number of registers allows.
  static constexpr int blocks(bool uploaded) {
    return Ring::value ? (uploaded ? 4 : sizeof(S) == 8 ? 5 : 6) : sizeof(S) == 8 ? 2 : kWide ? 4 - uploaded : 3;
  }

  TableDescriptor table;
  C columns;
  Loader loader;
  Partials<T> partials;

  template <class Args>
  SK_DEVICE RowReduction(const Args& a, const TableDescriptor& descriptors)
      : table(descriptors),
        columns{descriptors.t.D, block_index_y() * C::kTile, thread_index() % a.group, a.group},
        loader(row_loader<S, kWide>(descriptors.t, columns)),
        partials(a.partials) {}

  static int group(const BagForward& bags) { return group_of<C>(bags); }
  static int64_t tiles(const BagForward& bags) { return tiles_of<C>(bags); }
  SK_DEVICE void load(Raw& raw, int64_t row) const { loader.load(raw, row * table.t.row_stride); }
  SK_DEVICE bool idle() const { return columns.first >= columns.D && columns.first > 0; }
  SK_DEVICE void store(int64_t bag, const T (&values)[C::kCount]) const {
    const auto out = global<Out>(table.t.out, table.rows_end(table.t.out_stride));
    store_row(columns, out + table.output_offset(bag, table.t.out_stride), values, kWide);
  }
  SK_DEVICE void store_at(int64_t bag, const int32_t (&at)[C::kCount]) const {
    const auto arg = global<int32_t>(table.t.arg, table.rows_end(table.t.arg_stride));
    store_row(columns, arg + table.output_offset(bag, table.t.arg_stride), at, kWide);
  }
};

// Sum or mean. The sum starts from -0, so that the first row is added exactly.
template <class S, bool kWide>
struct SumRows : RowReduction<S, kWide> {
  using Base = RowReduction<S, kWide>;
  using typename Base::C;
  using typename Base::Raw;
  using typename Base::T;
  struct State {
    T values[C::kCount];
    Tally<T> tally;
  };
  bool mean;
  MeanBy mean_by;

  template <class Args>
  SK_DEVICE SumRows(const Args& a, const TableDescriptor& descriptors)
      : Base(a, descriptors), mean(a.mode == BagMode::kMean), mean_by(a.mean_by) {}

  SK_DEVICE void reset(State& s) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) s.values[v] = T(-0.0);
    s.tally.reset();
  }
  SK_DEVICE void add(State& s, const Raw& raw, T w, int64_t) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) s.values[v] = fma(w, this->loader.value(raw, v), s.values[v]);
    s.tally.add(w);
  }
  SK_DEVICE void merge(State& s, const State& later) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) s.values[v] += later.values[v];
    s.tally.merge(later.tally);
  }
  SK_DEVICE void save(const State& s, int64_t slot) const {
    store_row(this->columns, this->partials.row(slot), s.values, kWide);
    if (this->columns.lane == 0) s.tally.save(this->partials, slot);
  }
  SK_DEVICE State saved(int64_t slot) const {
    State s;
    reset(s);
    load_row(this->columns, this->partials.row(slot), s.values, kWide);
    s.tally.restore(this->partials, slot);
    return s;
  }
  SK_DEVICE void finish(int64_t bag, State& s) const {
    const T divisor = s.tally.divisor(this->table.t, mean_by);
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) {
      if (s.tally.count == 0) {
        s.values[v] = 0;
      } else if (mean) {
        s.values[v] = s.values[v] / divisor;
      }
    }
    this->store(bag, s.values);
  }
};

// Maximum or minimum; a minimum is the maximum of the negated values. The first NaN wins, then the first of equal
// values.
template <class S, bool kWide>
struct ExtremeRows : RowReduction<S, kWide> {
  using Base = RowReduction<S, kWide>;
  using typename Base::C;
  using typename Base::Raw;
  using typename Base::T;
  struct State {
    T values[C::kCount];
    int32_t at[C::kCount];
  };
  T sign;

  // With eight columns per lane, the positions leave too few registers for the ring.
  using Ring = std::bool_constant<Base::Ring::value && (sizeof(S) > 2)>;
  static constexpr int blocks(bool uploaded) {
    return Ring::value ? 5 - uploaded : Base::Ring::value ? 4 - uploaded : Base::blocks(uploaded);
  }

  template <class Args>
  SK_DEVICE ExtremeRows(const Args& a, const TableDescriptor& descriptors)
      : Base(a, descriptors), sign(a.mode == BagMode::kMin ? T(-1) : T(1)) {}

  SK_DEVICE void reset(State& s) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) {
      s.values[v] = 0;
      s.at[v] = -1;
    }
  }
  SK_DEVICE void take(State& s, int v, T x, int32_t at) const {
    const T y = s.values[v];
    if (s.at[v] < 0 || x > y || (x != x && y == y)) {
      s.values[v] = x;
      s.at[v] = at;
    }
  }
  SK_DEVICE void add(State& s, const Raw& raw, T w, int64_t at) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) take(s, v, this->loader.value(raw, v) * (w * sign), int32_t(at));
  }
  SK_DEVICE void merge(State& s, const State& later) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) {
      if (later.at[v] >= 0) take(s, v, later.values[v], later.at[v]);
    }
  }
  SK_DEVICE void save(const State& s, int64_t slot) const {
    store_row(this->columns, this->partials.row(slot), s.values, kWide);
    store_row(this->columns, this->partials.at_row(slot), s.at, kWide);
  }
  SK_DEVICE State saved(int64_t slot) const {
    State s;
    reset(s);
    load_row(this->columns, this->partials.row(slot), s.values, kWide);
    load_row(this->columns, this->partials.at_row(slot), s.at, kWide);
    return s;
  }
  SK_DEVICE void finish(int64_t bag, State& s) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) {
      if (s.at[v] >= 0) s.values[v] = s.values[v] * sign;
    }
    this->store(bag, s.values);
    if (this->table.t.arg != nullptr) this->store_at(bag, s.at);
  }
};

// Reads no columns: computes the divisors of means.
template <class S>
struct TallyRows {
  using Ring = std::false_type;
  static constexpr int blocks(bool) { return 6; }
  using Storage = S;
  using T = typename Element<S>::T;
  struct Raw {};
  struct State {
    Tally<T> tally;
  };
  TableDescriptor table;
  Partials<T> partials;
  MeanBy mean_by;
  T* tallies;
  int64_t bags;
  bool inverted;

  template <class Args>
  SK_DEVICE TallyRows(const Args& a, const TableDescriptor& descriptors)
      : table(descriptors),
        partials(a.partials),
        mean_by(a.mean_by),
        tallies(a.tallies),
        bags(a.bounds.bags),
        inverted(a.inverted) {}

  static int group(const BagForward&) { return 1; }
  static int64_t tiles(const BagForward&) { return 1; }
  SK_DEVICE bool idle() const { return false; }
  SK_DEVICE void load(Raw&, int64_t) const {}
  SK_DEVICE void reset(State& s) const { s.tally.reset(); }
  SK_DEVICE void add(State& s, const Raw&, T w, int64_t) const { s.tally.add(w); }
  SK_DEVICE void merge(State& s, const State& later) const { s.tally.merge(later.tally); }
  SK_DEVICE void save(const State& s, int64_t slot) const { s.tally.save(partials, slot); }
  SK_DEVICE State saved(int64_t slot) const {
    State s;
    s.tally.restore(partials, slot);
    return s;
  }
  SK_DEVICE void finish(int64_t bag, State& s) const {
    const T divisor = s.tally.divisor(table.t, mean_by);
    global<T>(tallies, bags)[bag] = inverted ? T(1) / divisor : divisor;
  }
};

// The walk over bags.

// Reduces the bags [bag, stop), whose n positions are contiguous from `begin`; or, if slot is not negative, a piece of
// one bag, `skipped` positions into it, whose result goes to that slot. Positions are relative to `begin` and fit into
// an int. `ends` holds the end of each bag but the last.
template <class R>
SK_DEVICE void walk(const R& r, Shared<const int64_t> ends, const IndexLoader<typename R::Storage>& loader, int64_t bag,
                    int64_t stop, int64_t begin, int n, int64_t slot, int64_t skipped) {
  using Loader = IndexLoader<typename R::Storage>;
  using T = typename R::T;
  const int64_t first_bag = bag;
  const auto end_of = [&](int64_t b) -> int {
    if (b + 1 == stop) return n;
    const int64_t end = ends[b - first_bag];
    return int(end - begin);
  };
  typename R::State state;
  r.reset(state);
  typename R::Raw raw[kRows];
  T weights[kRows];
  uint32_t counted = 0;
  uint32_t rows[kRows];  // rows of the next step
  loader.fetch(rows, begin, n);

  int at = 0, step = 0, step_end = 0, bag_begin = 0, bag_end = end_of(bag);
  for (;;) {
    if (at == bag_end) {
      if (slot >= 0) return r.save(state, slot);
      r.finish(bag, state);
      if (++bag == stop) return;
      r.reset(state);
      bag_begin = bag_end;
      bag_end = end_of(bag);
      continue;
    }
    if (at == step_end) {
      step = at;
      step_end = step + kRows < n ? step + kRows : n;
      counted = 0;
      SK_UNROLL
      for (int j = 0; j < kRows; ++j) {
        if (rows[j] == Loader::kSkipped) continue;
        counted |= 1u << j;
        r.load(raw[j], rows[j]);
        weights[j] = loader.weight(begin + step + j);
      }
      if (step_end < n) loader.fetch(rows, begin + step_end, n - step_end);
    }
    const int low = at - step, high = (bag_end < step_end ? bag_end : step_end) - step;
    SK_UNROLL
    for (int j = 0; j < kRows; ++j) {
      if (j >= low && j < high && (counted >> j & 1) != 0)
        r.add(state, raw[j], weights[j], skipped + step + j - bag_begin);
    }
    at = step + high;
  }
}

// For each window of kChunk positions, the long bag that extends into it from a preceding window.
template <class Args>
struct WindowOwners {
  const Args& a;

  SK_DEVICE Global<int64_t> all() const { return global<int64_t>(a.window_owners, a.windows); }
  SK_DEVICE void set_owner(int64_t bag, const Span& span, int lane) const {
    for (int64_t w = span.begin / kChunk + 1 + lane; w * kChunk < span.end; w += a.group) all()[w] = bag;
  }
  // Windows without a long bag hold arbitrary values, so `owner` is validated.
  SK_DEVICE bool find_span(int64_t w, int64_t owner, Span& span) const {
    if (static_cast<uint64_t>(owner) >= static_cast<uint64_t>(a.bounds.bags)) return false;
    span = a.bounds.clamped(owner);
    return span.begin < w * kChunk && w * kChunk < span.end && span.size() > kChunk;
  }
};

// A ring buffer for wide rows, filled by asynchronous copies. Compared with registers, twice as many rows are in
// flight, and bags may end anywhere. Each lane reads only what it copied itself, so no barrier is needed.
template <class R>
struct RowRing {
  using S = typename R::Storage;
  using C = typename R::C;
  static constexpr int kStages = 2;

  Shared<S> rows;                 // [stages, kRows, threads, columns]
  Shared<typename R::T> weights;  // [stages, kRows, threads], if the bags are weighted

  template <class Arena>
  static SK_HOST_DEVICE RowRing in(Arena& arena, bool weighted) {
    constexpr int kSlots = kStages * kRows * kWalkThreads;
    RowRing ring;
    ring.rows = arena.template array<S>(kSlots * C::kCount);
    ring.weights = arena.template array<typename R::T>(weighted ? kSlots : 0);
    return ring;
  }
  static SK_DEVICE int slot(int place) { return place % (kStages * kRows) * kWalkThreads + thread_index(); }
};

// Same as walk(), through the ring buffer.
template <class R>
SK_DEVICE void walk_ring(const R& r, const RowRing<R>& ring, Shared<const int64_t> ends,
                         const IndexLoader<typename R::Storage>& loader, int64_t bag, int64_t stop, int64_t begin,
                         int n, int64_t slot, int64_t skipped) {
  using Loader = IndexLoader<typename R::Storage>;
  using C = typename R::C;
  using T = typename R::T;
  const int64_t first_bag = bag;
  const auto end_of = [&](int64_t b) -> int {
    if (b + 1 == stop) return n;
    const int64_t end = ends[b - first_bag];
    return int(end - begin);
  };
  const bool weighted = loader.weights.data != nullptr, in_row = r.columns.wide_in_row();
  const auto table = r.loader.table + (in_row ? r.columns.at(0) : 0);
  uint32_t rows[kRows];  // rows of the next step to prefetch
  T weights[kRows];
  const auto fetch = [&](int from) {
    if (from >= n) return;
    loader.fetch(rows, begin + from, n - from);
    if (!weighted) return;
    SK_UNROLL
    for (int j = 0; j < kRows; ++j) weights[j] = rows[j] == Loader::kSkipped ? T(0) : loader.weight(begin + from + j);
  };
  const auto prefetch = [&](int from) -> uint32_t {
    uint32_t counted = 0;
    if (from < n) {
      SK_UNROLL
      for (int j = 0; j < kRows; ++j) {
        if (rows[j] == Loader::kSkipped) continue;
        counted |= 1u << j;
        const int to = ring.slot(from + j);
        copy_async<16>(ring.rows + to * C::kCount, table + rows[j] * r.table.t.row_stride, in_row);
        if (weighted) ring.weights[to] = weights[j];
      }
    }
    copy_async_commit();
    fetch(from + kRows);
    return counted;
  };
  typename R::State state;
  r.reset(state);
  fetch(0);
  uint32_t counted = prefetch(0), counted_next = prefetch(kRows);
  int at = 0, step = 0, bag_begin = 0, bag_end = end_of(bag);
  for (;; step += kRows) {
    copy_async_wait<1>();
    const int step_end = step + kRows < n ? step + kRows : n;
    for (;;) {
      const int high = bag_end < step_end ? bag_end : step_end;
      SK_NO_UNROLL  // saves registers; other warps hide the latency of shared memory
          for (; at < high; ++at) {
        if ((counted >> (at - step) & 1) == 0) continue;
        const int from = ring.slot(at);
        typename R::Raw raw;
        const auto v = load_vec<C::kCount>(ring.rows, from * C::kCount);
        SK_UNROLL
        for (int i = 0; i < C::kCount; ++i) raw.values[i] = v[i];
        T weight = T(1);
        if (weighted) weight = ring.weights[from];
        r.add(state, raw, weight, skipped + at - bag_begin);
      }
      if (at < bag_end) break;
      if (slot >= 0) return r.save(state, slot);
      r.finish(bag, state);
      if (++bag == stop) return;
      r.reset(state);
      bag_begin = bag_end;
      bag_end = end_of(bag);
    }
    counted = counted_next;
    counted_next = prefetch(step + 2 * kRows);
  }
}

// Selects the walk for a reduction, and reserves its shared memory.
template <class R, class Enable = void>
struct Walk {
  static void reserve(SharedBytes&, bool) {}
  SK_DEVICE Walk(SharedArena&, bool) {}
  template <class... Args>
  SK_DEVICE void operator()(const Args&... args) const {
    walk(args...);
  }
};
template <class R>
struct Walk<R, std::enable_if_t<R::Ring::value>> {
  RowRing<R> ring;
  static void reserve(SharedBytes& bytes, bool weighted) { RowRing<R>::in(bytes, weighted); }
  SK_DEVICE Walk(SharedArena& arena, bool weighted) : ring(RowRing<R>::in(arena, weighted)) {}
  template <class... Args>
  SK_DEVICE void operator()(const R& r, const Args&... args) const {
    walk_ring(r, ring, args...);
  }
};

template <class R, class Args>
SK_KERNEL(kWalkThreads, R::blocks(Args::kUploaded))
bag_forward_kernel(const SK_GRID_CONSTANT Args a) {
  const int64_t unit = grid_thread_index() / a.group;
  if (unit >= a.ranges) return;
  const TableDescriptor table = a.tables.of_unit(unit);
  const R r(a, table);
  if (r.idle()) return;
  SharedArena arena;
  const Walk<R> walk(arena, a.weighted);
  const IndexLoader<typename R::Storage> loader(table.t, a.wide_indices, a.wide_weights, a.faults);
  const int64_t first = table.bags_before + (unit - table.units_before) * a.bags_per_unit;
  const int bags = int(min(a.bags_per_unit, table.bags_before + table.t.bags - first));

  // Begin and end of the unit's bags, loaded by all lanes at once. Shared memory holds them for the later reads,
  // because rows evict them from the L1 cache.
  const int lane = thread_index() % a.group, local = thread_index() / a.group, edge_count = int(a.bags_per_unit) + 1;
  const auto edges = arena.array<int64_t>(kWalkThreads / a.group * edge_count) + local * edge_count;
  for (int i = lane; i <= bags; i += a.group) edges[i] = max(0, min(a.bounds.begin(first + i), a.bounds.N));
  if (a.faults.word != nullptr) {
    for (int i = lane; i < bags; i += a.group) a.bounds.check(first + i, a.faults);
  }
  warp_sync(group_mask(a.group));

  for (int i = 0; i < bags;) {
    const int64_t bag = first + i, begin = edges[i];
    int64_t end = edges[i + 1], slot = -1;
    end = max(begin, end);
    int stop = i + 1;
    if (end - begin > kChunk) {
      if (block_index_y() == 0) WindowOwners<Args>{a}.set_owner(bag, {begin, end}, lane);
      end = begin + kChunk;
      slot = 2 * (begin / kChunk) + 1;
    } else {
      for (; stop < bags; ++stop) {
        const int64_t from = edges[stop], to = edges[stop + 1];
        if (from != end || to < from || to - from > kChunk) break;
        end = to;
      }
    }
    walk(r, Shared<const int64_t>(edges + (i + 1)), loader, bag, first + stop, begin, int(end - begin), slot, 0);
    i = stop;
  }
}

// Reduces the later pieces of long bags; at most one begins in each window. Each group checks several windows at once,
// because most windows have none.
constexpr int kWindowsPerGroup = 4;

template <class R, class Args>
SK_KERNEL(kWalkThreads, R::blocks(Args::kUploaded))
bag_pieces_kernel(const SK_GRID_CONSTANT Args a) {
  const int64_t first = grid_thread_index() / a.group * kWindowsPerGroup;
  const WindowOwners<Args> window_owners{a};
  int64_t owner[kWindowsPerGroup];
  SK_UNROLL
  for (int j = 0; j < kWindowsPerGroup; ++j) {
    owner[j] = first + j < a.windows ? load<Cache::kDefault>(window_owners.all(), first + j) : int64_t{-1};
  }
  for (int j = 0; j < kWindowsPerGroup; ++j) {
    int64_t bag = owner[0];
    SK_UNROLL
    for (int k = 1; k < kWindowsPerGroup; ++k) bag = j == k ? owner[k] : bag;
    const int64_t edge = (first + j) * kChunk;
    Span span;
    if (!window_owners.find_span(first + j, bag, span)) continue;
    const int64_t skipped = ceil_div(edge - span.begin, kChunk) * kChunk, begin = span.begin + skipped;
    if (begin >= span.end) continue;
    const TableDescriptor table = a.tables.of_bag(bag);
    const R r(a, table);
    if (r.idle()) continue;
    SharedArena arena;
    const Walk<R> walk(arena, a.weighted);
    const IndexLoader<typename R::Storage> loader(table.t, a.wide_indices, a.wide_weights, a.faults);
    const int n = int(min(kChunk, span.end - begin));
    walk(r, Shared<const int64_t>(), loader, bag, bag + 1, begin, n, 2 * (begin / kChunk), skipped);
  }
}

// Chain q is the long bag that begins in window q.
template <class R, class Args>
struct LongBags {
  const Args& a;

  SK_DEVICE int64_t bag_of(int64_t q) const { return load<Cache::kDefault>(WindowOwners<Args>{a}.all(), q + 1); }
  SK_DEVICE int64_t pieces(int64_t q) const {
    Span span;
    if (q + 1 >= a.windows || !WindowOwners<Args>{a}.find_span(q + 1, bag_of(q), span)) return 0;
    return span.begin / kChunk == q ? ceil_div(span.size(), kChunk) : 0;
  }
  SK_DEVICE R reduction(int64_t q) const { return R(a, a.tables.of_bag(bag_of(q))); }
  SK_DEVICE void finish(int64_t q, int64_t, const R& r, typename R::State& state) const {
    if (!r.idle()) r.finish(bag_of(q), state);
  }
};

template <class R, class Args>
SK_KERNEL(kThreads)
bag_merge_kernel(const SK_GRID_CONSTANT Args a) {
  merge_chains<R>(LongBags<R, Args>{a}, a.windows, a.group);
}

// The gradient of per-sample weights.

struct WeightArgs {
  ManyTables tables;
  Bounds bounds;
  FaultReporter faults;
  bool extreme, wide_indices, wide_weights;
  int group;
  int64_t N;
  const void* scales;   // [bags] or null: factor of a bag's dot products
  void* dots;           // [N]
  bool wide_dots;       // dots are in the compute type; else in the table's dtype
  const void* weights;  // [N]; used for `weighted`
  void* weighted;       // [N] or null: weights * dots, in the compute type
};

// <gradient of the bag, row> for kDots consecutive positions per group. Lanes accumulate over the whole row and are
// summed once at its end.
constexpr int kDots = 4;  // with as many rows of gradients, eight loads are in flight

template <class S, bool kWide>
SK_KERNEL(kWalkThreads, sizeof(S) == 8 && !kWide ? 2 : 3)
bag_dots_kernel(const SK_GRID_CONSTANT WeightArgs a) {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  using Rows = RowLoader<S, kWide>;
  constexpr uint32_t kSkipped = IndexLoader<S>::kSkipped;
  const int64_t first = grid_thread_index() / a.group * kDots, stop = min(a.N, first + kDots);
  if (first >= a.N) return;
  const int lane = thread_index() % a.group;
  T dots[kDots];
  SK_UNROLL
  for (int j = 0; j < kDots; ++j) dots[j] = 0;

  int64_t at = max(first, a.bounds.clamped(0).begin);
  const int64_t end = min(stop, a.bounds.clamped(a.bounds.bags - 1).end);
  int64_t bag = at < end ? a.bounds.bag_at(at) : a.bounds.bags;
  while (bag < a.bounds.bags) {  // once for each table with some of the positions
    const TableDescriptor table = a.tables.of_bag(bag);
    const BagTable& t = table.t;
    const int64_t last_bag = table.bags_before + t.bags;
    const IndexLoader<S> loader(t, a.wide_indices, false, a.faults);
    uint32_t rows[kDots];
    int64_t bags[kDots];
    SK_UNROLL
    for (int j = 0; j < kDots; ++j) {
      const int64_t position = first + j;
      uint32_t row[1] = {kSkipped};
      bags[j] = bag;
      if (position >= at && position < end) {
        while (bag < last_bag && a.bounds.begin(bag + 1) <= position) ++bag;
        if (bag < last_bag) {
          at = position + 1;
          bags[j] = bag;
          loader.fetch(row, position, 1);
        }
      }
      rows[j] = row[0];
    }
    if (at == end) bag = a.bounds.bags;
    const auto grad = global<const S>(t.out, table.rows_end(t.out_stride));
    const auto arg = global<const int32_t>(t.arg, a.extreme ? table.rows_end(t.arg_stride) : 0);
    for (int64_t column = 0; column < t.D; column += C::kTile) {
      const C columns{t.D, column, lane, a.group};
      const Rows row_loads = row_loader<S, kWide>(t, columns), grad_loads{grad, 1, columns};
      typename Rows::Raw raw[kDots], raw_grad[kDots];
      SK_UNROLL
      for (int j = 0; j < kDots; ++j) {
        if (rows[j] == kSkipped) continue;
        row_loads.load(raw[j], rows[j] * t.row_stride);
        grad_loads.load(raw_grad[j], table.output_offset(bags[j], t.out_stride));
      }
      SK_UNROLL
      for (int j = 0; j < kDots; ++j) {
        if (rows[j] == kSkipped) continue;
        const int64_t arg_place = a.extreme ? table.output_offset(bags[j], t.arg_stride) : 0;
        const int64_t within = a.extreme ? first + j - a.bounds.begin(bags[j]) : 0;
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) {
          if (!columns.in_row(v)) continue;
          if (a.extreme && arg[arg_place + columns.at(v)] != within) continue;
          dots[j] = fma(grad_loads.value(raw_grad[j], v), row_loads.value(raw[j], v), dots[j]);
        }
      }
    }
  }
  SK_UNROLL
  for (int j = 0; j < kDots; ++j) dots[j] = group_sum(dots[j], a.group);
  if (lane != 0) return;
  const auto scales = global<const T>(a.scales, a.bounds.bags);
  SK_UNROLL
  for (int j = 0; j < kDots; ++j) {
    const int64_t position = first + j;
    if (position >= stop) continue;
    T dot = dots[j];
    if (scales && dot != 0) {  // the scale of a bag without counted rows is not finite
      const T scale = scales[a.bounds.bag_at(position)];
      dot *= scale;
    }
    if (a.wide_dots) {
      global<T>(a.dots, a.N)[position] = dot;
    } else {
      global<S>(a.dots, a.N)[position] = narrow<S>(dot);
    }
    if (a.weighted != nullptr) {
      const T weight = Weights<S>{a.weights, a.N, a.wide_weights}[position];
      global<T>(a.weighted, a.N)[position] = weight * dot;
    }
  }
}

// A mean by weight: dw_i = (d_i - sum(w d) / sum(w)) / sum(w), where d are the dot products.
struct CenterArgs {
  Bounds bounds;
  Integers indices;
  bool wide_weights;
  int64_t padding, N;
  const void* scales;  // [bags] 1 / sum of weights
  const void* sums;    // [bags] sum of weights * dots
  const void* dots;    // [N]
  void* dweights;      // [N]
};

template <class S>
SK_KERNEL(kThreads)
bag_center_kernel(const SK_GRID_CONSTANT CenterArgs a) {
  using T = typename Element<S>::T;
  const int64_t i = grid_thread_index();
  if (i >= a.N) return;
  T gradient = 0;
  if (i >= a.bounds.clamped(0).begin && i < a.bounds.clamped(a.bounds.bags - 1).end && a.indices[i] != a.padding) {
    const int64_t bag = a.bounds.bag_at(i);
    const T scale = global<const T>(a.scales, a.bounds.bags)[bag];
    const T sum = global<const T>(a.sums, a.bounds.bags)[bag];
    const T dot = global<const T>(a.dots, a.N)[i];
    gradient = (dot - sum * scale) * scale;
  }
  if (a.wide_weights) {
    global<T>(a.dweights, a.N)[i] = gradient;
  } else {
    global<S>(a.dweights, a.N)[i] = narrow<S>(gradient);
  }
}

// Quantised rows.

struct PackArgs {
  BagTable t;
  uint8_t* packed;  // [E, D + 8]
  int group;
};

// byte = round((x - min) * 255 / (max - min)); the scale and the minimum follow the row. One group per row.
template <class S>
SK_KERNEL(kThreads)
bag_pack_kernel(const SK_GRID_CONSTANT PackArgs a) {
  const BagTable& t = a.t;
  const int64_t row = grid_thread_index() / a.group;
  if (row >= t.E) return;
  const int lane = thread_index() % a.group;
  const auto from = global<const S>(t.table, (t.E - 1) * t.row_stride + (t.D - 1) * t.column_stride + 1);
  const auto to = global<uint8_t>(a.packed, t.E * (t.D + 8)) + row * (t.D + 8);
  const auto value = [&](int64_t d) -> float {
    return float(widen(load<Cache::kReadOnly>(from, row * t.row_stride + d * t.column_stride)));
  };
  float lowest = value(0), highest = lowest;
  for (int64_t d = lane; d < t.D; d += a.group) {
    const float x = value(d);
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
  }
  for (int distance = a.group / 2; distance > 0; distance /= 2) {
    const float x = shuffle_xor(lowest, distance, kWarp, group_mask(a.group));
    const float y = shuffle_xor(highest, distance, kWarp, group_mask(a.group));
    lowest = x < lowest ? x : lowest;
    highest = y > highest ? y : highest;
  }
  const float range = highest - lowest, inverse = 255.0f / (range + 1e-8f);
  for (int64_t d = lane; d < t.D; d += a.group) to[d] = uint8_t(rintf((value(d) - lowest) * inverse));
  if (lane != 0) return;
  const auto scale = bit_cast<Vec<uint8_t, 4>>(range / 255.0f), bias = bit_cast<Vec<uint8_t, 4>>(lowest);
  for (int i = 0; i < 4; ++i) {
    to[t.D + i] = scale[i];
    to[t.D + 4 + i] = bias[i];
  }
}

// Host functions.

// A single table is passed as a kernel parameter, several in device memory. A single table with narrow rows is also
// passed in memory, which saves instantiations.
bool needs_upload(const BagForward& bags) {
  return !bags.shape.byte_rows && (bags.count > 1 || !wide_rows(bags, true));
}

// Number of windows in which pieces of long bags may begin; 0 if no bag can be long.
int64_t windows_of(const BagForward& bags) {
  const BagTable& t = bags.tables[0];
  if (t.N <= kChunk || (t.offsets == nullptr && t.length <= kChunk)) return 0;
  return ceil_div(t.N, kChunk);
}

template <class T>
Partials<T> allocate_partials(Scratch& scratch, const BagForward& bags, bool tally_only) {
  const int64_t slots = 2 * windows_of(bags), width = tally_only ? 0 : ceil_div(most_columns(bags), 16) * 16;
  const int64_t at = bags.shape.extreme() ? slots * width : 0, tallies = at > 0 ? 0 : slots;
  Partials<T> partials{};
  partials.values = scratch.take<T>(slots * width);
  partials.at = scratch.take<int32_t>(at);
  partials.weights = scratch.take<T>(tallies);
  partials.counts = scratch.take<int64_t>(tallies);
  partials.slots = slots;
  partials.width = width;
  return partials;
}

// Bags per unit of work. Several bags per group amortise the latency of loading bounds and indices; enough groups to
// fill the device several times balance the load.
int64_t bags_per_unit(const Bounds& bounds, int64_t group, int64_t tiles) {
  if (bounds.N == 0) return 1;
  const int64_t held = device_limits().multiprocessors * int64_t{640};  // lanes
  const int64_t wanted = ceil_div(kPositionsPerUnit * bounds.bags, bounds.N),
                limit = bounds.bags * group * tiles / (kWaves * held);
  return max(1, min(min(wanted, limit), group));
}

std::vector<TableDescriptor> descriptors(const BagForward& bags, int64_t per_unit) {
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

// Partial results have the same layout for all readers, so one (narrow) merge kernel serves both.
template <class R, class Merging, class Tables>
void launch_walk(const BagForward& bags, ForwardArgs<Tables, typename R::T>& args, void* stream) {
  using Args = ForwardArgs<Tables, typename R::T>;
  args.group = R::group(bags);
  const auto config = [&](int64_t groups) {
    LaunchConfig c = blocks_of(groups * args.group, stream, R::tiles(bags), kWalkThreads);
    SharedBytes bytes;
    Walk<R>::reserve(bytes, args.weighted);
    bytes.array<int64_t>(kWalkThreads / args.group * (args.bags_per_unit + 1));
    c.shared_bytes = bytes.bytes();
    return c;
  };
  launch(bag_forward_kernel<R, Args>, config(args.ranges), args);
  if (args.windows == 0) return;
  launch(bag_pieces_kernel<R, Args>, config(ceil_div(args.windows, kWindowsPerGroup)), args);
  args.group = Merging::group(bags);
  launch(bag_merge_kernel<Merging, Args>, blocks_of_chains(args.windows, stream, Merging::tiles(bags)), args);
}

template <class Tables, class T>
ForwardArgs<Tables, T> forward_args(const BagForward& bags, BagFaultWord* fault) {
  ForwardArgs<Tables, T> args{};
  args.bounds = bounds_of(bags);
  args.faults.word = fault;
  args.mode = bags.shape.mode;
  args.mean_by = bags.shape.mean_by;
  args.wide_indices = bags.shape.wide_indices;
  args.wide_weights = bags.shape.wide_weights;
  args.weighted = bags.tables[0].weights != nullptr;
  args.windows = windows_of(bags);
  args.bags_per_unit = 1;
  return args;
}

}  // namespace

// Sums over bags that read no columns.

namespace {

struct LengthArgs {
  Bounds bounds;
  void* scales;
};

template <class T>
SK_KERNEL(kThreads)
bag_lengths_kernel(const SK_GRID_CONSTANT LengthArgs a) {
  const int64_t bag = grid_thread_index();
  if (bag >= a.bounds.bags) return;
  global<T>(a.scales, a.bounds.bags)[bag] = T(1) / T(a.bounds.clamped(bag).size());
}

template <class S>
void launch_tallies(const BagForward& bags, const ManyTables& tables, void* tallies, bool inverted, Scratch& scratch,
                    void* stream) {
  using T = typename Element<S>::T;
  auto args = forward_args<ManyTables, T>(bags, nullptr);
  args.tables = tables;
  args.ranges = args.bounds.bags;
  args.partials = allocate_partials<T>(scratch, bags, true);
  args.window_owners = scratch.take<int64_t>(args.windows);
  args.tallies = static_cast<T*>(tallies);
  args.inverted = inverted;
  launch_walk<TallyRows<S>, TallyRows<S>>(bags, args, stream);
}

}  // namespace

int64_t bag_scales_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  dispatch(bags.shape.dtype, [&](auto storage) { allocate_partials<Compute<decltype(storage)>>(scratch, bags, true); });
  scratch.take<int64_t>(windows_of(bags));
  return scratch.bytes();
}

void launch_bag_scales(const BagForward& bags, const ManyTables& tables, void* scales, void* memory, void* stream) {
  const BagTable& t = bags.tables[0];
  const bool by_weight = t.weights != nullptr && bags.shape.mean_by == MeanBy::kWeight;
  dispatch(bags.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (by_weight || t.padding >= 0) {
      Scratch scratch(memory);
      launch_tallies<S>(bags, tables, scales, true, scratch, stream);
    } else {
      const LengthArgs args{bounds_of(bags), scales};
      launch(bag_lengths_kernel<Compute<S>>, blocks_of(args.bounds.bags, stream), args);
    }
  });
}

// Scratch memory of the gradient of per-sample weights.

namespace {

struct WeightMemory {
  TableDescriptor* tables;  // [2, count]
  char* scales;             // [bags] each
  char* sums;
  char* dots;  // [N] each
  char* weighted;
  char* tallies;

  static bool needs_centering(const BagForward& bags) {
    return bags.shape.mode == BagMode::kMean && bags.shape.mean_by == MeanBy::kWeight;
  }
  WeightMemory(const BagForward& bags, Scratch& scratch) {
    const int64_t size = bags.shape.dtype == DType::kFloat64 ? 8 : 4, all = bounds_of(bags).bags, N = bags.tables[0].N;
    const bool mean = bags.shape.mode == BagMode::kMean, centering = needs_centering(bags);
    tables = scratch.take<TableDescriptor>(2 * bags.count);
    scales = scratch.take<char>(mean ? all * size : 0);
    sums = scratch.take<char>(centering ? all * size : 0);
    dots = scratch.take<char>(centering ? N * size : 0);
    weighted = scratch.take<char>(centering ? N * size : 0);
    tallies = scratch.take<char>(mean ? bag_scales_scratch_bytes(bags) : 0);
  }
};

}  // namespace
}  // namespace bags_cuda

// Launchers.

using namespace bags_cuda;

BagFault read_bag_fault(BagFaultWord* fault, const BagForward& bags, void* stream) {
  BagFaultWord word = 0;
  read_back(&word, fault, sizeof(word), stream);
  if (word == 0) return {};
  fill_bytes(fault, 0, sizeof(word), stream);
  const uint64_t found = ~word;
  BagFault result{static_cast<BagFault::Kind>(found >> kFaultBits),
                  static_cast<int64_t>(found & ((uint64_t{1} << kFaultBits) - 1)), 0};
  const Bounds bounds = bounds_of(bags);
  const bool index = result.kind == BagFault::kIndex;
  const bool wide = index ? bags.shape.wide_indices : bags.shape.wide_offsets;
  const void* from = index ? bags.tables[0].indices : bounds.offsets.data;
  if (!index && result.position >= bounds.offsets.count) {
    result.value = bounds.N;
  } else if (wide) {
    read_back(&result.value, static_cast<const int64_t*>(from) + result.position, 8, stream);
  } else {
    int32_t value = 0;
    read_back(&value, static_cast<const int32_t*>(from) + result.position, 4, stream);
    result.value = value;
  }
  return result;
}

int64_t bag_forward_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  scratch.take<TableDescriptor>(needs_upload(bags) ? bags.count : 0);
  dispatch(bags.shape.dtype,
           [&](auto storage) { allocate_partials<Compute<decltype(storage)>>(scratch, bags, false); });
  scratch.take<int64_t>(windows_of(bags));
  return scratch.bytes();
}

namespace bags_cuda {
namespace {

template <class S, bool kWide, class Tables>
void forward_of(const BagForward& bags, const ManyTables& uploaded, BagFaultWord* fault, Scratch& scratch,
                void* stream) {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  auto args = forward_args<Tables, T>(bags, fault);
  args.bags_per_unit = bags_per_unit(args.bounds, group_of<C>(bags), tiles_of<C>(bags));
  const std::vector<TableDescriptor> tables = descriptors(bags, args.bags_per_unit);
  for (const TableDescriptor& table : tables) args.ranges += ceil_div(table.t.bags, args.bags_per_unit);
  if constexpr (std::is_same<Tables, OneTable>::value) {
    args.tables.only = tables[0];
  } else {
    args.tables = upload_tables(tables.data(), bags.count, const_cast<TableDescriptor*>(uploaded.descriptors), stream);
  }
  args.partials = allocate_partials<T>(scratch, bags, false);
  args.window_owners = scratch.take<int64_t>(args.windows);
  if (bags.shape.extreme()) {
    launch_walk<ExtremeRows<S, kWide>, ExtremeRows<S, false>>(bags, args, stream);
  } else {
    launch_walk<SumRows<S, kWide>, SumRows<S, false>>(bags, args, stream);
  }
}

}  // namespace
}  // namespace bags_cuda

void launch_bag_forward(const BagForward& bags, BagFaultWord* fault, void* memory, void* stream) {
  if (bounds_of(bags).bags == 0) return;
  Scratch scratch(memory);
  const ManyTables uploaded{scratch.take<TableDescriptor>(needs_upload(bags) ? bags.count : 0), bags.count};
  dispatch_rows(bags, true, [&](auto storage, auto wide) {
    using S = decltype(storage);
    constexpr bool kBytes = std::is_same<S, Byte>::value;
    if constexpr (kBytes || wide.value) {
      if (!needs_upload(bags)) return forward_of<S, wide.value, OneTable>(bags, uploaded, fault, scratch, stream);
    }
    if constexpr (!kBytes) {
      forward_of<S, wide.value, ManyTables>(bags, uploaded, fault, scratch, stream);
    }
  });
}

int64_t bag_weights_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  WeightMemory memory(bags, scratch);
  return scratch.bytes();
}

void launch_bag_weights(const BagForward& bags, void* dweights, BagFaultWord* fault, void* memory, void* stream) {
  const BagShape& shape = bags.shape;
  const BagTable& t = bags.tables[0];
  Scratch scratch(memory);
  const WeightMemory m(bags, scratch);
  WeightArgs args{};
  args.bounds = bounds_of(bags);
  if (args.bounds.bags == 0) {
    const int64_t size = shape.dtype == DType::kFloat64                         ? 8
                         : shape.wide_weights || shape.dtype == DType::kFloat32 ? 4
                                                                                : 2;
    return fill_bytes(dweights, 0, t.N * size, stream);
  }
  std::vector<TableDescriptor> tables = descriptors(bags, 1);
  args.tables = upload_tables(tables.data(), bags.count, m.tables, stream);
  args.faults.word = fault;
  args.extreme = shape.extreme();
  args.wide_indices = shape.wide_indices;
  args.wide_weights = shape.wide_weights;
  args.N = t.N;
  args.scales = nullptr;
  args.dots = dweights;
  args.wide_dots = shape.wide_weights;
  if (shape.mode == BagMode::kMean) launch_bag_scales(bags, args.tables, m.scales, m.tallies, stream);
  const bool needs_centering = WeightMemory::needs_centering(bags);
  if (needs_centering) {
    args.dots = m.dots;
    args.wide_dots = true;
    args.weights = t.weights;
    args.weighted = m.weighted;
  } else if (shape.mode == BagMode::kMean) {
    args.scales = m.scales;
  }
  dispatch_rows(bags, true, [&](auto storage, auto wide) {
    using S = decltype(storage);
    if constexpr (!std::is_same<S, Byte>::value) {
      args.group = group_of<Columns<S, wide.value>>(bags);
      launch(bag_dots_kernel<S, wide.value>, blocks_of(ceil_div(args.N, kDots) * args.group, stream, 1, kWalkThreads),
             args);
    }
  });
  if (!needs_centering) return;
  BagForward sums = bags;
  std::vector<BagTable> weighted(bags.tables, bags.tables + bags.count);
  for (int64_t i = 0; i < bags.count; ++i) tables[i].t.weights = weighted[i].weights = m.weighted;
  sums.tables = weighted.data();
  sums.shape.wide_weights = true;
  const ManyTables uploaded_sums = upload_tables(tables.data(), bags.count, m.tables + bags.count, stream);
  dispatch(shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    Scratch tallies(m.tallies);
    launch_tallies<S>(sums, uploaded_sums, m.sums, false, tallies, stream);
    const CenterArgs centering{
        args.bounds, {t.indices, t.N, shape.wide_indices}, shape.wide_weights, t.padding, t.N, m.scales, m.sums, m.dots,
        dweights};
    launch(bag_center_kernel<S>, blocks_of(t.N, stream), centering);
  });
}

void launch_bag_pack_bytes(const BagTable& table, DType dtype, uint8_t* packed, void* stream) {
  if (table.E == 0) return;
  if (table.D == 0) return fill_bytes(packed, 0, table.E * 8, stream);
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    const int group = group_for<Columns<S, false>>(table.D);
    launch(bag_pack_kernel<S>, blocks_of(table.E * group, stream), PackArgs{table, packed, group});
  });
}

}  // namespace seqkernels
