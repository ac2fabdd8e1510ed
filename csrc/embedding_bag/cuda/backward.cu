// Backward pass of EmbeddingBag by rows on CUDA.
//
// The positions of a call are sorted by row, so that the occurrences of a row are contiguous. Each group of lanes then
// sums kPerGroup consecutive places, however often a row occurs. A row within the places of one group is written
// directly. Rows that extend over several groups produce partial results, which a second launch merges in order. The
// result has the same bits in every run, without atomics, and the cost does not depend on the distribution of rows. The
// tables of a collection are processed together, with their rows numbered consecutively.
#include <vector>

#include "embedding_bag/cuda/bags.cuh"
#include "embedding_bag/cuda/partials.cuh"
#include "embedding_bag/cuda/radix_sort.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

constexpr int kPerGroup = 32;  // places per group; a warp counts the rows that begin in them by one ballot
static_assert(kPerGroup == kWarp, "bag_heads_kernel assigns one warp to the places of one group");
constexpr int kKeys = 8;  // positions per thread

// Keys.

struct KeyArgs {
  ManyTables tables;
  Bounds bounds;
  FaultReporter faults;
  bool wide_indices;
  int64_t N;
  uint32_t none;     // key of positions that do not count; above all rows
  uint32_t* keys;    // [N]
  uint32_t* bag_of;  // [N]
};

// Bounds::bag_at by all threads of a block, which must all call it: a few steps that divide the range into kThreads
// parts.
SK_DEVICE int64_t block_bag_at(const Bounds& bounds, int64_t position) {
  int64_t low = 0, high = bounds.bags;
  while (high - low > 1) {
    const int64_t part = ceil_div(high - low, kThreads), mine = low + thread_index() * part;
    const int before = block_sync_count(mine < high && (thread_index() == 0 || bounds.begin(mine) <= position));
    low += (before - 1) * part;
    high = min(high, low + part);
  }
  return low;
}

// Each block handles kThreads * kKeys consecutive positions. It finds the bags of the first and the last position; each
// thread searches only between these two.
SK_KERNEL(kThreads) bag_keys_kernel(const SK_GRID_CONSTANT KeyArgs a) {
  const Bounds& bounds = a.bounds;
  if (a.faults.word != nullptr) {
    for (int64_t bag = grid_thread_index(); bag < bounds.bags; bag += grid_threads()) bounds.check(bag, a.faults);
  }
  const int64_t first = block_index() * (kThreads * kKeys), last = min(first + kThreads * kKeys, a.N) - 1;
  int64_t low = 0, high = 0;
  if (bounds.offsets.data != nullptr) {
    low = block_bag_at(bounds, first);
    high = max(low, block_bag_at(bounds, last));
  }
  const int64_t begin = bounds.clamped(0).begin, end = bounds.clamped(bounds.bags - 1).end;
  const Integers indices{a.tables.of_bag(0).t.indices, a.N, a.wide_indices};
  const auto keys = global<uint32_t>(a.keys, a.N), bag_of = global<uint32_t>(a.bag_of, a.N);
  for (int k = 0; k < kKeys; ++k) {
    const int64_t position = first + k * kThreads + thread_index();
    if (position > last) return;
    uint32_t key = a.none, bag = 0;
    if (position >= begin && position < end) {
      bag = static_cast<uint32_t>(bounds.offsets.data == nullptr ? bounds.bag_at(position)
                                                                 : bounds.bag_at(position, low, high + 1));
      const TableDescriptor table = a.tables.of_bag(bag);
      const int64_t index = indices[position];
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(table.t.E)) {
        a.faults.report(BagFault::kIndex, position);
      } else if (index != table.t.padding) {
        key = static_cast<uint32_t>(table.rows_before + index);
      }
    }
    keys[position] = key;
    bag_of[position] = bag;
  }
}

// Rows that occur.

struct Sorted {
  const uint32_t* keys_;
  const uint32_t* places_;  // bags, or positions if gradients depend on the position
  int64_t N;
  uint32_t none;

  SK_DEVICE Global<const uint32_t> keys() const { return global<const uint32_t>(keys_, N); }
  SK_DEVICE Global<const uint32_t> places() const { return global<const uint32_t>(places_, N); }
  // The first place in [low, high) whose key is at least `key`.
  SK_DEVICE int64_t lower_bound(uint32_t key, int64_t low, int64_t high) const {
    const auto sorted = keys();
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sorted[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  SK_DEVICE bool begins(int64_t i) const {
    const auto sorted = keys();
    return sorted[i] < none && (i == 0 || sorted[i] != sorted[i - 1]);
  }
};

struct CountArgs {
  Sorted sorted;
  uint32_t* ordinals;  // [groups + 1] rows that begin in each group, later in preceding groups
  int64_t groups;
  ManyTables tables;
  int64_t* values_before;  // [tables + 1]
};

SK_KERNEL(kThreads) bag_heads_kernel(const SK_GRID_CONSTANT CountArgs a) {
  const int64_t i = grid_thread_index();
  const uint32_t heads = ballot(i < a.sorted.N && a.sorted.begins(i));
  if (lane_index() == 0 && i < a.sorted.N) {
    global<uint32_t>(a.ordinals, a.groups + 1)[i / kPerGroup] = static_cast<uint32_t>(popcount(heads));
  }
}

// Prefix sums over all groups; launched with one block.
SK_KERNEL(kThreads) bag_ordinals_kernel(const SK_GRID_CONSTANT CountArgs a) {
  constexpr int kBatch = 8;  // groups per thread and step
  SK_SHARED(uint32_t, sums, kWarps);
  const auto ordinals = global<uint32_t>(a.ordinals, a.groups + 1);
  uint32_t before = 0;
  for (int64_t first = 0; first < a.groups; first += kThreads * kBatch) {
    const int64_t mine = first + thread_index() * kBatch;
    uint32_t counts[kBatch], sum = 0, total;
    SK_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      counts[j] = mine + j < a.groups ? load<Cache::kDefault>(ordinals, mine + j) : 0u;
      sum += counts[j];
    }
    uint32_t place = before + block_scan(sum, total, sums);
    SK_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      if (mine + j < a.groups) ordinals[mine + j] = place;
      place += counts[j];
    }
    before += total;
  }
  if (thread_index() == 0) ordinals[a.groups] = before;
}

// One thread per table, and one for the end of the last table.
SK_KERNEL(kThreads) bag_values_kernel(const SK_GRID_CONSTANT CountArgs a) {
  const int64_t i = grid_thread_index();
  if (i > a.tables.count) return;
  uint32_t row = a.sorted.none;
  if (i < a.tables.count) {
    const TableDescriptor table = global<const TableDescriptor>(a.tables.descriptors, a.tables.count)[i];
    row = static_cast<uint32_t>(table.rows_before);
  }
  const int64_t at = a.sorted.lower_bound(row, 0, a.sorted.N), group = at / kPerGroup;
  const uint32_t preceding = global<const uint32_t>(a.ordinals, a.groups + 1)[group];
  int64_t ordinal = preceding;
  for (int64_t j = group * kPerGroup; j < at; ++j) ordinal += a.sorted.begins(j);
  global<int64_t>(a.values_before, a.tables.count + 1)[i] = ordinal;
}

// Destinations of sums.

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

// Sums.

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

// max_norm.

struct RenormArgs {
  BagTable t;
  Sorted sorted;
  double max_norm, p;
  int group;
};

// One group per place; it acts where a row begins.
template <class S>
SK_KERNEL(kThreads)
bag_renorm_kernel(const SK_GRID_CONSTANT RenormArgs a) {
  using T = typename Element<S>::T;
  const BagTable& t = a.t;
  const int64_t i = grid_thread_index() / a.group;
  if (i >= a.sorted.N || !a.sorted.begins(i)) return;
  const int64_t row = a.sorted.keys()[i];
  const int lane = thread_index() % a.group;
  const auto w = global<S>(const_cast<void*>(t.table), (t.E - 1) * t.row_stride + (t.D - 1) * t.column_stride + 1) +
                 row * t.row_stride;
  const bool largest = a.p > 0 && a.p * 2 == a.p, smallest = a.p < 0 && a.p * 2 == a.p;  // p is infinite
  double sum = smallest ? 1.0 / 0.0 : 0.0;
  for (int64_t d = lane; d < t.D; d += a.group) {
    const double x = fabs(double(widen(load<Cache::kDefault>(w, d * t.column_stride))));
    if (largest) {
      sum = x > sum || x != x ? x : sum;
    } else if (smallest) {
      sum = x < sum || x != x ? x : sum;
    } else {
      sum += a.p == 2 ? x * x : a.p == 1 ? x : a.p == 0 ? double(x != 0) : pow(x, a.p);
    }
  }
  for (int distance = a.group / 2; distance > 0; distance /= 2) {
    const double x = shuffle_xor(sum, distance, kWarp, group_mask(a.group));
    if (largest) {
      sum = x > sum || x != x ? x : sum;
    } else if (smallest) {
      sum = x < sum || x != x ? x : sum;
    } else {
      sum += x;
    }
  }
  const double norm = a.p == 2 ? sqrt(sum) : a.p == 1 || a.p == 0 || largest || smallest ? sum : pow(sum, 1 / a.p);
  if (!(norm > a.max_norm)) return;
  const T factor = T(a.max_norm / (norm + 1e-7));
  for (int64_t d = lane; d < t.D; d += a.group) {
    const T x = widen(load<Cache::kDefault>(w, d * t.column_stride));
    w[d * t.column_stride] = narrow<S>(x * factor);
  }
}

// Host functions.

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }  // size of the compute type

int64_t total_rows(const BagForward& bags) {
  int64_t rows = 0;
  for (int64_t i = 0; i < bags.count; ++i) rows += bags.tables[i].E;
  return rows;
}

// Scratch memory of a backward pass; its layout is the same for all callers. Arrays that only sums need come last.
struct RowsMemory {
  TableDescriptor* tables;
  uint32_t* bag_of;
  SortMemory sort;
  int64_t groups, width, tiles;
  char* scales;            // [bags]
  char* tallies;           // scratch memory to compute them
  uint32_t* ordinals;      // [groups + 1]
  int64_t* values_before;  // [tables + 1]
  char* partials;          // [2 groups, width]
  char* squares;           // [tiles, N]

  RowsMemory(const BagForward& bags, Scratch& scratch, bool sums)
      : tables(scratch.take<TableDescriptor>(bags.count)),
        bag_of(scratch.take<uint32_t>(bags.tables[0].N)),
        sort(bags.tables[0].N, static_cast<uint32_t>(total_rows(bags)), scratch) {
    constexpr int64_t kMaxCount = 0xffffffff;
    const int64_t N = bags.tables[0].N, all = bounds_of(bags).bags, size = size_of(bags.shape.dtype);
    if (total_rows(bags) >= kMaxCount || N >= kMaxCount || all >= kMaxCount) {
      throw std::runtime_error("embedding_bag: rows, indices and bags must be below 2^32 - 1 each on CUDA");
    }
    const bool mean = bags.shape.mode == BagMode::kMean;
    groups = ceil_div(N, kPerGroup);
    width = sums ? ceil_div(most_columns(bags), 16) * 16 : 0;
    constexpr int64_t kLeastTile = 64;  // the smallest tile of any loader
    tiles = ceil_div(width, kLeastTile);
    scales = scratch.take<char>(sums && mean ? all * size : 0);
    tallies = scratch.take<char>(sums && mean ? bag_scales_scratch_bytes(bags) : 0);
    ordinals = scratch.take<uint32_t>(sums ? groups + 1 : 0);
    values_before = scratch.take<int64_t>(sums ? bags.count + 1 : 0);
    partials = scratch.take<char>(2 * groups * width * size);
    squares = scratch.take<char>(tiles > 1 ? tiles * N * size : 0);
  }
  Sorted sorted(const BagForward& bags) const {
    return {sort.keys[sort.result], sort.values[sort.result], sort.n, static_cast<uint32_t>(total_rows(bags))};
  }
  // Whether gradients depend on the position and not only on the row and the bag.
  static bool by_position(const BagForward& bags) { return bags.tables[0].weights != nullptr || bags.shape.extreme(); }
};

std::vector<TableDescriptor> row_descriptors(const BagForward& bags) {
  std::vector<TableDescriptor> tables(bags.count);
  int64_t bags_before = 0, rows_before = 0;
  for (int64_t i = 0; i < bags.count; ++i) {
    const BagTable& t = bags.tables[i];
    tables[i] = {};
    tables[i].t = t;
    tables[i].bags_before = bags_before;
    tables[i].rows_before = rows_before;
    bags_before += t.bags;
    rows_before += t.E;
  }
  return tables;
}

void sort_positions(const BagForward& bags, const RowsMemory& m, const ManyTables& tables, BagFaultWord* fault,
                    void* stream) {
  KeyArgs args{};
  args.tables = tables;
  args.bounds = bounds_of(bags);
  args.faults.word = fault;
  args.wide_indices = bags.shape.wide_indices;
  args.N = bags.tables[0].N;
  args.none = static_cast<uint32_t>(total_rows(bags));
  args.keys = m.sort.keys[0];
  args.bag_of = m.bag_of;
  launch(bag_keys_kernel, blocks_of(max(1, ceil_div(args.N, kKeys)), stream), args);
  SortMemory sort = m.sort;
  if (!RowsMemory::by_position(bags)) sort.first_values = m.bag_of;
  launch_sort(sort, stream);
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

int64_t bag_rows_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  RowsMemory memory(bags, scratch, true);
  return scratch.bytes();
}

void launch_bag_sort(const BagForward& bags, BagFaultWord* fault, void* memory, void* stream) {
  if (bounds_of(bags).bags == 0) return;
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, true);
  const std::vector<TableDescriptor> tables = row_descriptors(bags);
  const ManyTables descriptors = upload_tables(tables.data(), bags.count, m.tables, stream);
  sort_positions(bags, m, descriptors, fault, stream);
  if (bags.shape.mode == BagMode::kMean) launch_bag_scales(bags, descriptors, m.scales, m.tallies, stream);
}

void count_bag_rows(const BagForward& bags, int64_t* counts, void* memory, void* stream) {
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, true);
  for (int64_t i = 0; i < bags.count; ++i) counts[i] = 0;
  if (m.groups == 0 || bounds_of(bags).bags == 0) return;
  const CountArgs args{m.sorted(bags), m.ordinals, m.groups, {m.tables, bags.count}, m.values_before};
  launch(bag_heads_kernel, blocks_of(m.sort.n, stream), args);
  launch(bag_ordinals_kernel, blocks_of(1, stream), args);
  launch(bag_values_kernel, blocks_of(bags.count + 1, stream), args);
  std::vector<int64_t> before(bags.count + 1);
  read_back(before.data(), m.values_before, (bags.count + 1) * 8, stream);
  for (int64_t i = 0; i < bags.count; ++i) counts[i] = before[i + 1] - before[i];
}

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

int64_t bag_renorm_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  RowsMemory memory(bags, scratch, false);
  return scratch.bytes();
}

void launch_bag_renorm(const BagForward& bags, double max_norm, double norm_type, void* memory, void* stream) {
  const BagTable& t = bags.tables[0];
  if (t.N == 0 || t.bags == 0 || t.D == 0 || t.E == 0) return;
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, false);
  dispatch(bags.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int group = group_for<Columns<S, false>>(t.D);
    const RenormArgs args{t, m.sorted(bags), max_norm, norm_type, group};
    launch(bag_renorm_kernel<S>, blocks_of(t.N * group, stream), args);
  });
}

}  // namespace seqkernels
