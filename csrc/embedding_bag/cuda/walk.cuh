// The walk over bags that all reductions share.
//
// Groups of lanes (bags.cuh) process the indices of one bag, or of several consecutive short ones, eight rows at a
// time: all eight loads are issued before the first row is used, and so are those of the next indices. Rows are added
// in the order of their positions, so a sum does not depend on how bags are distributed. A bag of more than kChunk
// indices is cut into pieces: the first launch reduces the first piece, a second launch the later ones, and a third
// launch merges them in order. The first launch records each long bag at every window of kChunk positions that begins
// within it, so that the later launches need no search and exit early where no bag is long.
#pragma once

#include "embedding_bag/cuda/bags.cuh"
#include "embedding_bag/cuda/index_loader.cuh"
#include "embedding_bag/cuda/partials.cuh"
#include "embedding_bag/cuda/reductions.cuh"

namespace seqkernels::bags_cuda {

// 16 steps of rows. Smaller chunks would write more partial results; these are a few percent of what is read.
constexpr int64_t kChunk = 128;
constexpr int kRows = 8;

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

// Number of windows in which pieces of long bags may begin; 0 if no bag can be long.
inline int64_t windows_of(const BagForward& bags) {
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

}  // namespace seqkernels::bags_cuda
