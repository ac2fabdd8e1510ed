// Backward pass of EmbeddingBag by rows on CUDA.
//
// The positions of a call are sorted by row, so that the occurrences of a row are contiguous. Each group of lanes then
// sums kPerGroup consecutive places, however often a row occurs. A row within the places of one group is written
// directly. Rows that extend over several groups produce partial results, which a second launch merges in order. The
// result has the same bits in every run, without atomics, and the cost does not depend on the distribution of rows. The
// tables of a collection are processed together, with their rows numbered consecutively.
#include <vector>

#include "embedding_bag/cuda/row_targets.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

// Partial sums in the form that merge_chains requires; reset and merge serve all sums here.
template <class S, bool kWide>
struct RowPartials {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  struct State {
    T values[C::kCount];
  };
  C columns;
  Partials<T> partials;

  SK_DEVICE void reset(State& s) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) s.values[v] = 0;
  }
  SK_DEVICE void merge(State& s, const State& later) const {
    SK_UNROLL
    for (int v = 0; v < C::kCount; ++v) s.values[v] += later.values[v];
  }
  SK_DEVICE State saved(int64_t slot) const {
    State s;
    reset(s);
    load_row(columns, partials.row(slot), s.values, kWide);
    return s;
  }
  SK_DEVICE void save(const State& s, int64_t slot) const { store_row(columns, partials.row(slot), s.values, kWide); }
};

template <class T, int kCount>
SK_DEVICE void divide_by_count(const RowsArgs<T>& a, RowSum<T, kCount>& sum) {
  if (!a.by_frequency) return;
  SK_UNROLL
  for (int v = 0; v < kCount; ++v) sum.values[v] = sum.values[v] / T(sum.count);
}

// kWinners (max and min): a row receives the gradient of the columns that its position won.
template <class S, bool kWide, bool kWinners, template <class, bool> class Target>
SK_KERNEL(kWalkThreads, kWide && sizeof(S) == 4    ? 4
                        : !kWide && sizeof(S) == 8 ? 2
                                                   : 3)  // as registers allow
bag_reduce_kernel(const SK_GRID_CONSTANT RowsArgs<typename Element<S>::T> a) {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  using Rows = RowLoader<S, kWide>;
  using Partial = RowPartials<S, kWide>;
  constexpr int kRows = kWinners ? 4 : 8;  // rows in flight; with positions there are as many loads
  struct Winners {
    int32_t at[C::kCount];
  };

  const int64_t group = grid_thread_index() / a.group;
  if (group >= a.groups) return;
  const int64_t first = group * kPerGroup, N = a.sorted.N;
  const int stop = static_cast<int>(min(kPerGroup, N - first));
  const auto keys = a.sorted.keys() + first, positions = a.sorted.places() + first;
  const auto bag_of = global<const uint32_t>(a.bag_of, N);
  const auto scales = global<const T>(a.scales, a.bounds.bags);
  const Weights<S> weights{a.weights, N, a.wide_weights};
  const uint32_t before = first > 0 ? load<Cache::kReadOnly>(keys, -1) : a.sorted.none;

  Partial partial{{0, block_index_y() * C::kTile, thread_index() % a.group, a.group}, a.partials};
  const C& columns = partial.columns;
  TableDescriptor table;
  Rows rows{};
  int64_t next_ordinal = 0;
  if (a.ordinals != nullptr) {
    const uint32_t preceding = global<const uint32_t>(a.ordinals, a.groups + 1)[group];
    next_ordinal = preceding;
  }
  typename Partial::State state;
  typename Rows::Raw raw[kRows];
  Winners winners[kRows];
  T coefficients[kRows];
  int32_t within[kRows];
  uint32_t row[kRows];
  uint32_t current = a.sorted.none;
  int at = 0, step = 0, n = 0, begin = 0;  // places, relative to the group's first
  int64_t ordinal = 0, rows_end = 0;
  for (;;) {
    const uint32_t key = at < stop ? load<Cache::kReadOnly>(keys, at) : a.sorted.none;
    if (key != current || key == a.sorted.none) {
      if (current != a.sorted.none) {
        const bool continues = at == stop && first + stop < N && load<Cache::kReadOnly>(keys, stop) == current;
        if (begin == 0 && before == current) {
          partial.save(state, partial_slot(group, 0) - 1);
        } else if (continues) {
          partial.save(state, partial_slot(group, 0));
        } else {
          RowSum<T, C::kCount> sum{current, first + begin, at - begin, ordinal, {}};
          SK_UNROLL
          for (int v = 0; v < C::kCount; ++v) sum.values[v] = state.values[v];
          divide_by_count(a, sum);
          // The table is read again to save registers.
          Target<S, kWide>::finish(a, a.tables.of_row(current), columns, sum, NoPrefetch{});
        }
      }
      if (key == a.sorted.none) return;
      current = key;
      begin = at;
      ordinal = next_ordinal;
      if (at > 0 || before != key) ++next_ordinal;
      partial.reset(state);
      if (key >= rows_end) {
        table = a.tables.of_row(key);
        rows_end = table.rows_before + table.t.E;
        partial.columns.D = table.t.D;
        rows = Rows{global<const S>(table.t.out, table.rows_end(table.t.out_stride)), 1, columns};
      }
    }
    if (at == step + n) {
      step = at;
      n = 0;
      SK_UNROLL
      for (int j = 0; j < kRows; ++j) {
        row[j] = step + j < stop ? load<Cache::kReadOnly>(keys, step + j) : a.sorted.none;
        if (row[j] >= rows_end) continue;
        n = j + 1;
        const uint32_t position = load<Cache::kReadOnly>(positions, step + j);
        const uint32_t bag = bag_of ? load<Cache::kReadOnly>(bag_of, position) : position;
        rows.load(raw[j], table.output_offset(bag, table.t.out_stride));
        coefficients[j] = scales ? load<Cache::kReadOnly>(scales, bag) : T(1);
        if (a.weights != nullptr) coefficients[j] *= weights[position];
        if constexpr (kWinners) {
          const auto arg = global<const int32_t>(table.t.arg, table.rows_end(table.t.arg_stride));
          within[j] = static_cast<int32_t>(position - a.bounds.begin(bag));
          load_row(columns, arg + table.output_offset(bag, table.t.arg_stride), winners[j].at, kWide);
        }
      }
    }
    int used = 0;
    SK_UNROLL
    for (int j = 0; j < kRows; ++j) {
      if (step + j < at || j >= n || row[j] != current) continue;
      ++used;
      SK_UNROLL
      for (int v = 0; v < C::kCount; ++v) {
        const T grad = rows.value(raw[j], v);
        if constexpr (kWinners) {
          if (winners[j].at[v] == within[j]) state.values[v] = fma(coefficients[j], grad, state.values[v]);
        } else {
          state.values[v] = fma(coefficients[j], grad, state.values[v]);
        }
      }
    }
    at += used;
  }
}

// Shared-memory ring of a lane, filled by asynchronous copies: for each place the gradient of its bag; at the end of a
// row that is finished directly, also the operands of its step. Each lane reads only what it copied itself.
template <class S>
struct RowsRing {
  using C = Columns<S, true>;
  using T = typename Element<S>::T;
  static constexpr int kStep = 4, kStages = 2;
  static constexpr int kSlots = kStep * kStages * kWalkThreads;

  struct RingArrays {
    bool scales, weights, step, state1, state2, rowwise;
  };
  static SK_HOST_DEVICE RingArrays arrays(const RowsArgs<T>& a, bool step) {
    const RowOptimizer o = a.step.optimizer;
    return {a.scales != nullptr,
            a.weights != nullptr,
            step,
            step && (o == RowOptimizer::kAdagrad || o == RowOptimizer::kAdam),
            step && o == RowOptimizer::kAdam,
            step && o == RowOptimizer::kRowwiseAdagrad};
  }

  Shared<S> gradients, rows;           // [slots, columns]
  Shared<T> states1, states2;          // [slots, columns]
  Shared<T> scales, weights, rowwise;  // [slots]

  template <class Arena>
  static SK_HOST_DEVICE RowsRing in(Arena& arena, const RingArrays& w) {
    RowsRing r;
    r.gradients = arena.template array<S>(kSlots * C::kCount);
    r.rows = arena.template array<S>(w.step ? kSlots * C::kCount : 0);
    r.states1 = arena.template array<T>(w.state1 ? kSlots * C::kCount : 0);
    r.states2 = arena.template array<T>(w.state2 ? kSlots * C::kCount : 0);
    r.scales = arena.template array<T>(w.scales ? kSlots : 0);
    r.weights = arena.template array<T>(w.weights ? kSlots : 0);
    r.rowwise = arena.template array<T>(w.rowwise ? kSlots : 0);
    return r;
  }
  static SK_DEVICE int slot(int place) { return place % (kStep * kStages) * kWalkThreads + thread_index(); }

  template <class U, class From>
  static SK_DEVICE void prefetch(Shared<U> to, Global<From> from, bool in_row) {
    constexpr int kPart = 16 / int(sizeof(U));
    SK_UNROLL
    for (int p = 0; p < C::kCount; p += kPart) copy_async<16>(to + p, from + p, in_row);
  }
};

// The prefetched operands of a step at one place.
template <class S>
struct PrefetchedStep {
  static constexpr bool kAvailable = true;
  using C = Columns<S, true>;
  using T = typename Element<S>::T;
  const RowsRing<S>& ring;
  int slot;

  SK_DEVICE T rowwise() const { return ring.rowwise[slot]; }
  SK_DEVICE void weights(T (&values)[C::kCount]) const { read(values, ring.rows + slot * C::kCount); }
  SK_DEVICE void state1(T (&values)[C::kCount]) const { read(values, ring.states1 + slot * C::kCount); }
  SK_DEVICE void state2(T (&values)[C::kCount]) const { read(values, ring.states2 + slot * C::kCount); }

 private:
  template <class U>
  static SK_DEVICE void read(T (&values)[C::kCount], Shared<U> from) {
    constexpr int kPart = 16 / int(sizeof(U));
    SK_UNROLL
    for (int p = 0; p < C::kCount; p += kPart) {
      const Vec<U, kPart> v = load_vec<kPart>(from, p);
      SK_UNROLL
      for (int i = 0; i < kPart; ++i) values[p + i] = widen(v[i]);
    }
  }
};

// The same sums for wide rows. Rows of the table are read and written once and are far apart, so their latency is
// hidden only if many are in flight: they are prefetched together with the gradients, not when a sum is complete.
template <class S, template <class, bool> class Target>
SK_KERNEL(kWalkThreads, Target<S, true>::Reads::value ? 4 : 5)  // as registers allow
bag_reduce_wide_kernel(const SK_GRID_CONSTANT RowsArgs<typename Element<S>::T> a) {
  using C = Columns<S, true>;
  using T = typename Element<S>::T;
  using Ring = RowsRing<S>;
  using Partial = RowPartials<S, true>;
  constexpr int kStep = Ring::kStep;
  constexpr bool kSteps = Target<S, true>::Reads::value;

  const int64_t group = grid_thread_index() / a.group;
  if (group >= a.groups) return;
  const int64_t first = group * kPerGroup, N = a.sorted.N;
  const int stop = static_cast<int>(min(kPerGroup, N - first));
  const auto keys = a.sorted.keys() + first, places = a.sorted.places() + first;
  const uint32_t none = a.sorted.none;
  const auto key_at = [&](int i) -> uint32_t { return first + i < N ? load<Cache::kReadOnly>(keys, i) : none; };
  const uint32_t before = first > 0 ? load<Cache::kReadOnly>(keys, -1) : none;
  const auto bag_of = global<const uint32_t>(a.bag_of, N);
  const auto scales = global<const T>(a.scales, a.bounds.bags);
  const Weights<S> weights{a.weights, N, a.wide_weights};
  const typename Ring::RingArrays arrays = Ring::arrays(a, kSteps);
  SharedArena arena;
  const Ring ring = Ring::in(arena, arrays);

  Partial partial{{0, block_index_y() * C::kTile, thread_index() % a.group, a.group}, a.partials};
  const C& columns = partial.columns;
  int64_t next_ordinal = 0;
  if (a.ordinals != nullptr) {
    const uint32_t preceding = global<const uint32_t>(a.ordinals, a.groups + 1)[group];
    next_ordinal = preceding;
  }

  // Rows that extend over an edge are summed by the group in which they begin, unless they extend past the next group.
  const uint32_t last = key_at(stop - 1);
  const bool continues = last != none && last != before && key_at(stop) == last && key_at(stop + kPerGroup) != last;
  const int last_place =
      !continues ? stop : int(a.sorted.lower_bound(last + 1, first + stop, min(N, first + stop + kPerGroup)) - first);
  int from = 0, end = 0;  // places of one table, relative to the group's first
  if (before != none && key_at(0) == before && key_at(stop) != before &&
      (first == kPerGroup || load<Cache::kReadOnly>(keys, -kPerGroup - 1) != before)) {
    from = int(a.sorted.lower_bound(before + 1, first, first + stop) - first);
  }
  for (uint32_t key = key_at(from); key != none && from < stop; from = end) {
    const TableDescriptor table = a.tables.of_row(key);
    const BagTable& t = table.t;
    const int64_t rows_end = table.rows_before + t.E;
    end = last_place;
    if (last >= rows_end) {
      end = int(a.sorted.lower_bound(static_cast<uint32_t>(rows_end), first + from, first + stop) - first);
    }
    partial.columns.D = t.D;
    const bool in_row = columns.wide_in_row();
    const int64_t column = in_row ? columns.at(0) : 0;
    const auto gradients = global<const S>(t.out, table.rows_end(t.out_stride)) + column;
    const auto table_rows =
        global<const S>(t.table, kSteps && t.E > 0 ? (t.E - 1) * t.row_stride + (t.D - 1) * t.column_stride + 1 : 0) +
        column;
    const auto states1 = global<const T>(table.state1, arrays.state1 ? t.E * t.D : 0) + column;
    const auto states2 = global<const T>(table.state2, arrays.state2 ? t.E * t.D : 0) + column;
    const auto rowwise = global<const T>(table.state1, arrays.rowwise ? t.E : 0);

    uint32_t row[kStep + 1], place[kStep];  // of the next step to prefetch
    const auto fetch = [&](int p) {
      if (p >= end) return;
      SK_UNROLL
      for (int j = 0; j < kStep; ++j) {
        row[j] = key_at(p + j);
        place[j] = p + j < end ? load<Cache::kReadOnly>(places, p + j) : 0u;
      }
      row[kStep] = key_at(p + kStep);
    };
    const auto prefetch = [&](int p) {
      if (p < end) {
        SK_UNROLL
        for (int j = 0; j < kStep; ++j) {
          if (p + j >= end) continue;
          const int to = Ring::slot(p + j - from);
          const uint32_t bag = bag_of ? load<Cache::kReadOnly>(bag_of, place[j]) : place[j];
          Ring::prefetch(ring.gradients + to * C::kCount, gradients + table.output_offset(bag, t.out_stride), in_row);
          if (arrays.scales) copy_async<sizeof(T)>(ring.scales + to, scales + bag);
          if (arrays.weights) {
            if (a.wide_weights) {
              copy_async<sizeof(T)>(ring.weights + to, global<const T>(a.weights, N) + place[j]);
            } else {
              ring.weights[to] = weights[place[j]];
            }
          }
          if constexpr (kSteps) {
            if (row[j] == row[j + 1] || row[j] == before) continue;
            const int64_t r = row[j] - table.rows_before;
            Ring::prefetch(ring.rows + to * C::kCount, table_rows + r * t.row_stride, in_row);
            if (arrays.state1) Ring::prefetch(ring.states1 + to * C::kCount, states1 + r * t.D, in_row);
            if (arrays.state2) Ring::prefetch(ring.states2 + to * C::kCount, states2 + r * t.D, in_row);
            if (arrays.rowwise) copy_async<sizeof(T)>(ring.rowwise + to, rowwise + r);
          }
        }
      }
      copy_async_commit();
      fetch(p + kStep);
    };

    typename Partial::State state;
    partial.reset(state);
    fetch(from);
    prefetch(from);
    prefetch(from + kStep);
    uint32_t next = key_at(from + 1);
    int begin = from;
    for (int step = from; step < end; step += kStep) {
      copy_async_wait<Ring::kStages - 1>();
      const int step_end = step + kStep < end ? step + kStep : end;
      for (int p = step; p < step_end; ++p) {
        const uint32_t later = key_at(p + 2);
        const int slot = Ring::slot(p - from);
        const auto raw = load_vec<C::kCount>(ring.gradients, slot * C::kCount);
        T coefficient = 1;
        if (arrays.scales) coefficient = ring.scales[slot];
        if (arrays.weights) {
          const T weight = ring.weights[slot];
          coefficient *= weight;
        }
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) state.values[v] = fma(coefficient, widen(raw[v]), state.values[v]);
        if (next != key || p + 1 == last_place) {
          if (key == before) {
            partial.save(state, partial_slot(group, 0) - 1);
          } else {
            if (next == key) {
              partial.save(state, partial_slot(group, 0));
            } else {
              RowSum<T, C::kCount> sum{key, first + begin, p + 1 - begin, next_ordinal, {}};
              SK_UNROLL
              for (int v = 0; v < C::kCount; ++v) sum.values[v] = state.values[v];
              divide_by_count(a, sum);
              if constexpr (kSteps) {
                Target<S, true>::finish(a, table, columns, sum, PrefetchedStep<S>{ring, slot});
              } else {
                Target<S, true>::finish(a, table, columns, sum, NoPrefetch{});
              }
            }
            ++next_ordinal;
          }
          partial.reset(state);
          begin = p + 1;
        }
        key = next;
        next = later;
      }
      prefetch(step + 2 * kStep);
    }
    copy_async_wait<0>();
  }
}

// Chain q: the row that begins in group q and extends past it.
template <class S, template <class, bool> class Target>
struct LongRows {
  using Partial = RowPartials<S, false>;
  using T = typename Partial::T;
  const RowsArgs<T>& a;

  SK_DEVICE int64_t pieces(int64_t q) const {
    const int64_t last = (q + 1) * kPerGroup - 1;
    if (last + 1 >= a.sorted.N) return 0;
    const auto keys = a.sorted.keys();
    const uint32_t key = keys[last];
    if (key >= a.sorted.none || keys[last + 1] != key || (q > 0 && keys[q * kPerGroup - 1] == key)) return 0;
    if (a.reach > 0 && (last + 1 + a.reach >= a.sorted.N || keys[last + 1 + a.reach] != key)) return 0;
    return (end(q, key) - 1) / kPerGroup - q + 1;
  }
  SK_DEVICE int64_t end(int64_t q, uint32_t key) const {
    const int64_t from = (q + 1) * kPerGroup, near = min(a.sorted.N, from + kPerGroup);
    const int64_t found = a.sorted.lower_bound(key + 1, from, near);
    return found < near ? found : a.sorted.lower_bound(key + 1, near, a.sorted.N);
  }
  SK_DEVICE TableDescriptor table_of(int64_t q) const {
    return a.tables.of_row(a.sorted.keys()[(q + 1) * kPerGroup - 1]);
  }
  SK_DEVICE Partial reduction(int64_t q) const {
    using C = typename Partial::C;
    return {{table_of(q).t.D, block_index_y() * C::kTile, thread_index() % a.group, a.group}, a.partials};
  }
  SK_DEVICE void finish(int64_t q, int64_t, const Partial& r, const typename Partial::State& state) const {
    RowSum<T, Partial::C::kCount> sum;
    sum.key = a.sorted.keys()[(q + 1) * kPerGroup - 1];
    sum.begin = a.sorted.lower_bound(sum.key, q * kPerGroup, (q + 1) * kPerGroup);
    sum.count = end(q, sum.key) - sum.begin;
    sum.ordinal = 0;
    if (a.ordinals != nullptr) {
      const uint32_t following = global<const uint32_t>(a.ordinals, a.groups + 1)[q + 1];
      sum.ordinal = int64_t(following) - 1;
    }
    SK_UNROLL
    for (int v = 0; v < Partial::C::kCount; ++v) sum.values[v] = state.values[v];
    divide_by_count(a, sum);
    Target<S, false>::finish(a, table_of(q), r.columns, sum, NoPrefetch{});
  }
};

template <class S, template <class, bool> class Target>
SK_KERNEL(kThreads)
bag_merge_rows_kernel(const SK_GRID_CONSTANT RowsArgs<typename Element<S>::T> a) {
  merge_chains<RowPartials<S, false>>(LongRows<S, Target>{a}, a.groups, a.group);
}

// The states of a row-wise step on rows that several groups share. One thread per place; it acts where a row begins.
template <class T>
SK_KERNEL(kThreads)
bag_rowwise_kernel(const SK_GRID_CONSTANT RowsArgs<T> a, int64_t tile) {
  const int64_t i = grid_thread_index();
  if (i >= a.sorted.N || !a.sorted.begins(i)) return;
  const uint32_t key = a.sorted.keys()[i];
  const TableDescriptor table = a.tables.of_row(key);
  if (table.t.D == 0) return;
  const int64_t tiles = ceil_div(table.t.D, tile);
  const auto squares = global<T>(a.squares, tiles * a.sorted.N);
  T sum = 0;
  for (int64_t j = 0; j < tiles; ++j) sum += squares[j * a.sorted.N + i];
  const auto states = global<T>(table.state1, table.t.E);
  const int64_t row = key - table.rows_before;
  const T state = states[row] + sum / T(table.t.D);
  states[row] = state;
  squares[i] = state;
}

// Whether the destinations of sums can be accessed 16 bytes at a time.
bool wide_targets(const BagForward& bags, const RowTarget* targets) {
  for (int64_t i = 0; i < bags.count; ++i) {
    const RowTarget& to = targets[i];
    if (!aligned(to.dense, 16) || !aligned(to.values, 16)) return false;
    if (to.step != nullptr && (!aligned(to.step->state1, 16) || !aligned(to.step->state2, 16))) return false;
  }
  return true;
}

template <class S, bool kWide, template <class, bool> class Target, class T>
void launch_sums(const BagForward& bags, RowsArgs<T>& args, void* stream) {
  args.reach = 0;
  using C = Columns<S, kWide>;
  using Merging = Columns<S, false>;
  args.group = group_of<C>(bags);
  LaunchConfig config = blocks_of(args.groups * args.group, stream, tiles_of<C>(bags), kWalkThreads);
  if (bags.shape.extreme()) {
    launch(bag_reduce_kernel<S, kWide, true, Target>, config, args);
  } else if constexpr (kWide) {
    SharedBytes bytes;
    RowsRing<S>::in(bytes, RowsRing<S>::arrays(args, Target<S, true>::Reads::value));
    config.shared_bytes = bytes.bytes();
    if (config.shared_bytes > device_limits().shared_bytes) {  // e.g. Adam on 16-bit rows with 99 KiB per block
      return launch_sums<S, false, Target>(bags, args, stream);
    }
    args.reach = kPerGroup;
    launch(bag_reduce_wide_kernel<S, Target>, config, args);
  } else {
    launch(bag_reduce_kernel<S, kWide, false, Target>, config, args);
  }
  args.group = group_of<Merging>(bags);
  launch(bag_merge_rows_kernel<S, Target>, blocks_of_chains(args.groups, stream, tiles_of<Merging>(bags)), args);
}

template <class S, bool kWide, class T>
void reduce_rows(const BagForward& bags, const RowTarget* targets, RowsArgs<T>& args, void* stream) {
  if (targets[0].step == nullptr) return launch_sums<S, kWide, StoreRow>(bags, args, stream);
  constexpr int64_t kTile = Columns<S, false>::kTile;
  if (args.step.optimizer != RowOptimizer::kRowwiseAdagrad ||
      most_columns(bags) <= min(kTile, Columns<S, kWide>::kTile)) {
    return launch_sums<S, kWide, StepRow>(bags, args, stream);
  }
  // Both launches of the first phase must cut rows into the same tiles of columns.
  args.phase = Phase::kSquares;
  launch_sums<S, false, StepRow>(bags, args, stream);
  launch(bag_rowwise_kernel<T>, blocks_of(args.sorted.N, stream), args, kTile);
  args.phase = Phase::kStepFromState;
  launch_sums<S, kWide, StepRow>(bags, args, stream);
}

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

void launch_bag_reduce(const BagForward& bags, bool by_frequency, const RowTarget* targets, void* memory,
                       void* stream) {
  const int64_t element = bags.shape.dtype == DType::kFloat64 ? 8 : bags.shape.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < bags.count; ++i) {
    const BagTable& t = bags.tables[i];
    if (targets[i].dense != nullptr && t.E * t.D > 0) fill_bytes(targets[i].dense, 0, t.E * t.D * element, stream);
  }
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, true);
  if (m.groups == 0 || bounds_of(bags).bags == 0 || total_rows(bags) == 0) return;
  std::vector<TableDescriptor> tables = row_descriptors(bags);
  for (int64_t i = 0; i < bags.count; ++i) {
    tables[i].target = targets[i];
    tables[i].target.step = nullptr;
    if (targets[i].step == nullptr) continue;
    tables[i].state1 = targets[i].step->state1;
    tables[i].state2 = targets[i].step->state2;
  }
  bool values = false;  // a table without rows that occur may have a null pointer
  for (int64_t i = 0; i < bags.count; ++i) values |= targets[i].rows != nullptr;
  const ManyTables descriptors =
      upload_tables(tables.data(), bags.count, m.tables, stream, values ? m.values_before : nullptr);
  const BagTable& t = bags.tables[0];
  const bool wide = wide_rows(bags, targets[0].step != nullptr) && wide_targets(bags, targets);
  dispatch(bags.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = Compute<S>;
    RowsArgs<T> args{};
    args.tables = descriptors;
    args.bounds = bounds_of(bags);
    args.sorted = m.sorted(bags);
    args.groups = m.groups;
    args.bag_of = RowsMemory::by_position(bags) ? m.bag_of : nullptr;
    args.ordinals = values ? m.ordinals : nullptr;
    args.scales = bags.shape.mode == BagMode::kMean ? reinterpret_cast<const T*>(m.scales) : nullptr;
    args.weights = t.weights;
    args.wide_weights = bags.shape.wide_weights;
    args.by_frequency = by_frequency;
    args.partials.values = reinterpret_cast<T*>(m.partials);
    args.partials.slots = 2 * m.groups;
    args.partials.width = m.width;
    if (targets[0].step != nullptr) args.step = *targets[0].step;
    args.squares = reinterpret_cast<T*>(m.squares);
    if (wide) {
      reduce_rows<S, true>(bags, targets, args, stream);
    } else {
      reduce_rows<S, false>(bags, targets, args, stream);
    }
  });
}

}  // namespace seqkernels
