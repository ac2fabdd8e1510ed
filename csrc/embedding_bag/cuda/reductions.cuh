// The reductions of a bag: sum and mean, max and min, and the divisor of a mean. Each defines Raw (a row as loaded),
// State (the running result) and the epilogue that stores it.
#pragma once

#include "embedding_bag/cuda/bags.cuh"
#include "embedding_bag/cuda/partials.cuh"

namespace seqkernels::bags_cuda {

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

}  // namespace seqkernels::bags_cuda
