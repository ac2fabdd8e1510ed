// Recurrent layers whose products with x and h, or their sum, are normalised
// over all units of a row, forward and backward.
//
// A step has more phases than that of other cells, since the mean and variance
// of a row need all units: forward computes the products in one phase, and
// normalises and runs the cell in the next (the c of an LSTM is normalised in a
// third); backward runs the cell in one phase, and propagates the gradients
// through the normalisation in the next. Shares exchange sums per panel of
// units, which each thread adds in the order of panels, by lane and then across
// lanes, so the result is independent of the division among threads.
//
// A normalisation of the sum covers all heads: the teams of the heads of one
// direction are joined (see Teams), and a share belongs to one head.
#pragma once

#include "common/lanes.h"
#include "recurrent/cpu/backward.h"
#include "recurrent/cpu/forward.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class T>
SEQKERNELS_INLINE Native<T> first_lanes(Native<T> v, int64_t valid) {  // the other lanes become zero
  if (valid >= kLanes<T>) return v;
  T lanes[kLanes<T>];
  store(lanes, v);
  return load<T>(lanes, valid);
}

template <class T>
struct Norm {
  T mean, inverse;  // 1 / standard deviation
};

// Mean and sum of squared deviations of every lane of a panel, and their
// combination over the panels of a row. Source: Chan, Golub and LeVeque,
// "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
// 1979.
template <class T>
struct Moments {
  using V = Native<T>;
  V mean, deviation;

  // Of `count` vectors.
  static SEQKERNELS_INLINE Moments of(const V* values, int count) {
    V sum = values[0];
    for (int g = 1; g < count; ++g) sum += values[g];
    const V mean = sum * T(1.0 / count);
    V deviation = {};
    for (int g = 0; g < count; ++g) deviation = fma(values[g] - mean, values[g] - mean, deviation);
    return {mean, deviation};
  }

  // Combines the moments of `each` values per lane, `stride` apart: `panels` of
  // each head, whose first `units` lanes hold values.
  static Norm<T> combine(const Moments* parts, int64_t heads, int64_t panels, int64_t stride, int each, int64_t units,
                         double eps) {
    constexpr int64_t kWidth = kLanes<T>;
    V mean = {}, deviation = {}, count = {};
    const V more = broadcast(T(each));
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t p = 0; p < panels; ++p, parts += stride) {
        const V added = first_lanes<T>(more, units - p * kWidth), together = count + added;
        const V delta = first_lanes<T>(parts->mean - mean, units - p * kWidth);
        const V share = together > T(0) ? added / together : V{};
        mean = fma(delta, share, mean);
        deviation = deviation + first_lanes<T>(parts->deviation, units - p * kWidth) + delta * delta * count * share;
        count = together;
      }
    }
    const T all = T(each) * T(heads * units), center = sum_of_lanes<T>(mean * count) / all;
    const V off = mean - center;
    const T variance = sum_of_lanes<T>(fma(off * off, count, deviation)) / all;
    return {center, T(1 / __builtin_sqrt(variance + eps))};
  }
};

// Gates that are normalised together.
template <class Cell>
constexpr int gates_in(int group) {
  int count = 0;
  for (int g = 0; g < Cell::kGates; ++g) count += Cell::group_of(g) == group;
  return count;
}
template <class Cell>
constexpr int first_gate(int group) {
  int g = 0;
  while (Cell::group_of(g) != group) ++g;
  return g;
}

// The weights of the normalisation of product 0 (with x, or the sum) or 1.
template <class Cell, class Pointer>
Pointer gain_of(const WeightsOf<Pointer>& w, int product) {
  return Cell::kJointNorm ? w.norm_weight : product == 0 ? w.gain_ih : w.gain_hh;
}
template <class Cell, class Pointer>
Pointer shift_of(const WeightsOf<Pointer>& w, int product) {
  return Cell::kJointNorm ? w.norm_bias : product == 0 ? w.b_ih : w.b_hh;
}

template <class Cell>
struct NormForward : Forward<Cell> {
  using F = Forward<Cell>;
  using F::args, F::walk, F::H, F::all_H, F::HV, F::PV, F::group_rows, F::kGates, F::kWidth, F::first, F::out, F::teams;
  using F::chunk_rows, F::kWide1;
  using typename F::S;
  using typename F::T;
  using typename F::V;
  using Part = Moments<T>;
  static constexpr int kGroups = Cell::kNormGroups, kProducts = Cell::kNormProducts;
  static constexpr bool kNormC = Cell::kNormC, kJoint = Cell::kJointNorm;

  // What a thread needs for one share: the workspace of the share's team, and buffers of the normalisation.
  struct ShareWork {
    Workspace<T> work;
    Share<T> its;
    Part *x, *h, *c;  // of the joined teams
    T *now, *output_gate, *from_h;
    int64_t first_panel;  // of the team among the joined ones
    bool first;           // writes the values that exist once per row
  };
  // The norms that a thread has computed from the parts of all shares: those of the input once per chunk, those of a
  // product with h, or of c, once per phase.
  struct Norms {
    Norm<T>*x, *step;  // [chunk_rows, kGroups], [group_rows, kGroups]
    int64_t chunk = -1, phase = -1;
  };

  Part *parts_x, *parts_h, *parts_c;  // [teams, panels, rows, kGroups]
  T *now, *output_gate;               // [teams, group_rows, HV] c before zoneout, o
  T* all_from_h;                      // [shares, panels, group_rows, kWide1]
  Norm<T>* norms;                     // [threads, chunk_rows + group_rows, kGroups]
  ShareWork* share_works;             // [threads, shares of joined teams]

  explicit NormForward(const ForwardArgs& a) : F(a) {}

  void carve(Arena& arena) {
    F::carve(arena);
    const int64_t parts = teams.count() * first.panels();
    parts_x = kJoint ? nullptr : arena.take<Part>(parts * chunk_rows * kGroups);
    parts_h = arena.take<Part>(parts * group_rows * kGroups);
    parts_c = kNormC ? arena.take<Part>(parts * group_rows) : nullptr;
    now = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    output_gate = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    all_from_h = arena.take<T>(teams.shares() * first.share_panels() * group_rows * kWide1);
    norms = arena.take<Norm<T>>(teams.threads * (chunk_rows + group_rows) * kGroups);
    share_works = arena.take<ShareWork>(teams.threads * teams.shares_of_team());
  }

  void run(int64_t thread) {
    teams.run_all(0, thread, [&](int64_t share) { this->pack(share); });
    teams.each(thread, [&](Team& team) { run_sequences(team, thread); });
  }

  ShareWork* works_of(const Team& team, int64_t thread) const {
    ShareWork* const works = share_works + thread * teams.shares_of_team();
    const int64_t panels = first.panels(), units = args.plan.unit_groups, groups = args.plan.row_groups;
    const int64_t joined = team.number * teams.joined;  // the first of the joined teams
    for (int64_t k = 0; k < teams.shares_of_team(); ++k) {
      const int64_t head = k / units, stream = team.stream * teams.joined + head, part = k % units;
      const int64_t of_team = stream * groups + team.group;
      ShareWork& to = *new (works + k)
                          ShareWork{this->workspace_of(stream, team.group, thread), {}, {}, {}, {}, {}, {}, {}, {}, {}};
      to.its = this->share_of(to.work, part);
      to.x = kJoint ? nullptr : parts_x + joined * panels * chunk_rows * kGroups;
      to.h = parts_h + joined * panels * group_rows * kGroups;
      if (kNormC) {
        to.c = parts_c + joined * panels * group_rows;
        to.now = now + of_team * group_rows * HV;
        to.output_gate = output_gate + of_team * group_rows * HV;
      }
      to.from_h = all_from_h + (of_team * units + part) * first.share_panels() * group_rows * kWide1;
      to.first_panel = head * panels;
      to.first = k == 0;
    }
    return works;
  }

  void run_sequences(Team& team, int64_t thread) {
    ShareWork* const works = works_of(team, thread);
    Workspace<T>& any = works[0].work;  // rows and direction are those of all shares
    Norms of{norms + thread * (chunk_rows + group_rows) * kGroups, {}, -1, -1};
    of.step = of.x + chunk_rows * kGroups;
    const auto each = [&](auto&& f) { team.run([&](int64_t k) { f(works[k]); }); };
    each([&](ShareWork& share) { this->begin_sequences(share.work, share.its.own_h, share.its.own_c); });
    for (int64_t s = 0; s < walk.T;) {
      const Chunk chunk = this->chunk_from(any, s);
      Step step{0, 0, 0};
      if (chunk.rows > 0) each([&](ShareWork& share) { from_input(any, share, chunk); });
      for (; s < chunk.end; ++s) {
        step.t = this->step(s, any.stream);
        step.active = any.rows.at(step.t);
        if (step.active == 0) continue;
        each([&](ShareWork& share) { from_state(share, step); });
        each([&](ShareWork& share) { normed_cells(share, of, chunk, step, team.phase); });
        if (kNormC) each([&](ShareWork& share) { outputs(share, of, step, team.phase); });
        for (int64_t k = 0; k < teams.shares_of_team(); ++k) {
          F::swap(works[k].work.h, works[k].work.h_next);
          F::swap(works[k].work.recurrent, works[k].work.recurrent_next);
        }
        step.row += step.active;
      }
    }
  }

  // The phases, for one share. Not inlined: among the loops of run_sequences, GCC keeps the sums of some products in
  // memory.

  // The products with the rows of x of a chunk. `any` holds the rows.
  __attribute__((noinline)) void from_input(Workspace<T>& any, const ShareWork& share, const Chunk& chunk) const {
    this->gather(any, chunk);
    for (int64_t p = share.its.panels.begin; p < share.its.panels.end; ++p) {
      T* to = share.its.from_x + (p - share.its.panels.begin) * chunk_rows * kWide1;
      first.product_x(share.work.stream, p, chunk.rows, this->input_of(any), any.scratch, to);
      if constexpr (!kJoint) measure(to, chunk.rows, share.x + p * chunk_rows * kGroups);
    }
  }

  // The products with h of one step; where the sum is normalised, the sum with those with x and the biases.
  __attribute__((noinline)) void from_state(const ShareWork& share, const Step& step) const {
    const Workspace<T>& work = share.work;
    const Activations state = this->state_of(work, step.active);
    for (int64_t p = share.its.panels.begin; p < share.its.panels.end; ++p) {
      const int64_t local = p - share.its.panels.begin;
      T* to = share.from_h + local * group_rows * kWide1;
      first.product_h(work.stream, 0, p, step.active, state, work.scratch, to, Into::kReplace);
      if constexpr (kJoint) {
        const T* from_x = share.its.from_x + (local * chunk_rows + step.row) * kWide1;
        for (int64_t i = 0; i < step.active; ++i) {
          V x[kGates], h[kGates];
          first.gates(work.stream, p, 0, from_x + i * kWide1, to + i * kWide1, x, h);
          for (int g = 0; g < kGates; ++g) store(to + i * kWide1 + g * kWidth, x[g] + h[g]);
        }
      }
      measure(to, step.active, share.h + (share.first_panel + p) * group_rows * kGroups);
    }
  }

  // The moments of one panel of a product.
  void measure(const T* product, int64_t rows, Part* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      V values[kGates];
      for (int g = 0; g < kGates; ++g) values[g] = load(product + i * kWide1 + g * kWidth);
      for (int group = 0; group < kGroups; ++group) {
        to[i * kGroups + group] = Part::of(values + first_gate<Cell>(group), gates_in<Cell>(group));
      }
    }
  }
  void combine(const Part* parts, int64_t row, int64_t rows, Norm<T>* to) const {
    for (int group = 0; group < kGroups; ++group) {
      to[group] = Part::combine(parts + row * kGroups + group, teams.joined, first.panels(), rows * kGroups,
                                gates_in<Cell>(group), H, args.options.norm_eps);
    }
  }

  SEQKERNELS_INLINE V at(const void* p, int64_t u, int64_t valid) const {
    return p == nullptr ? V{} : load(static_cast<const S*>(p) + u, valid);
  }

  // Normalises and runs the cell.
  __attribute__((noinline)) void normed_cells(ShareWork& share, Norms& of, const Chunk& chunk, const Step& step,
                                              int64_t phase) const {
    const Workspace<T>& work = share.work;
    if (!kJoint && of.chunk != chunk.begin) {
      of.chunk = chunk.begin;
      for (int64_t row = 0; row < chunk.rows; ++row) combine(share.x, row, chunk_rows, of.x + row * kGroups);
    }
    if (of.phase != phase) {
      of.phase = phase;
      for (int64_t i = 0; i < step.active; ++i) combine(share.h, i, group_rows, of.step + i * kGroups);
    }
    for (int64_t i = 0; i < step.active; ++i) {
      const int64_t n = work.rows.packed(step.t, i);
      const Norm<T>* norms[kProducts];
      if constexpr (!kJoint) norms[0] = of.x + (step.row + i) * kGroups;
      norms[kProducts - 1] = of.step + i * kGroups;
      if (share.first && out.saved != nullptr) {
        S* to = scalars(work.stream, n);
        for (int product = 0; product < kProducts; ++product) {
          for (int group = 0; group < kGroups; ++group)
            put(to + product * kGroups + group, norms[product][group].inverse);
        }
      }
      for (int64_t p = share.its.panels.begin; p < share.its.panels.end; ++p) cell(share, i, n, p, step.row, norms);
    }
    if (!kNormC) this->end_of_step(work, step.t, step.active, share.its.own_h, share.its.own_c);
  }

  // The i-th row and one panel. row: the first row of the step in the chunk.
  SEQKERNELS_INLINE void cell(const ShareWork& share, int64_t i, int64_t n, int64_t p, int64_t row,
                              const Norm<T>* const* norms) const {
    const Workspace<T>& work = share.work;
    const Weights& w = first.weights(work.stream);
    const int64_t u = p * kWidth, valid = min(kWidth, H - u), local = p - share.its.panels.begin;
    const T* const from_h = share.from_h + (local * group_rows + i) * kWide1;
    const T* const from[] = {kJoint ? from_h : share.its.from_x + (local * chunk_rows + row + i) * kWide1, from_h};
    V inputs[2][kGates], normal[kProducts][kGates], values[Cell::kValues + 1];
    if constexpr (kJoint) memset(inputs[1], 0, sizeof inputs[1]);
    for (int product = 0; product < kProducts; ++product) {
      for (int g = 0; g < kGates; ++g) {
        const Norm<T>& of = norms[product][Cell::group_of(g)];
        const int64_t at_weight = g * all_H + this->unit0(work.stream) + u;
        normal[product][g] = (load(from[product] + g * kWidth) - of.mean) * of.inverse;
        inputs[product][g] = fma(at(gain_of<Cell>(w, product), at_weight, valid), normal[product][g],
                                 at(shift_of<Cell>(w, product), at_weight, valid));
      }
    }
    const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
    const V h_prev = load(work.h + i * PV + u);
    V c[1] = {};
    if constexpr (kNormC) c[0] = load(work.c[0] + i * HV + u);
    const V result = Cell::forward(inputs[0], inputs[1], e, h_prev, c, values);
    this->save(work.stream, n, u, valid, values, 0, Cell::kValues);
    this->save(work.stream, n, u, valid, normal[0], Cell::kValues, Cell::kSaved);
    if constexpr (kNormC) {
      store(share.now + i * HV + u, result);
      store(share.output_gate + i * HV + u, restore<Sigmoid>(e, values[3]).value);
      share.c[p * group_rows + i] = Part::of(&result, 1);
    } else {
      this->store_h(work, i, n, u, valid, e, h_prev, result);
    }
  }

  // h = o tanh(norm(c)), and c after zoneout.
  __attribute__((noinline)) void outputs(ShareWork& share, Norms& of, const Step& step, int64_t phase) const {
    if constexpr (kNormC) {
      const Workspace<T>& work = share.work;
      const Weights& w = first.weights(work.stream);
      if (of.phase != phase) {
        of.phase = phase;
        for (int64_t i = 0; i < step.active; ++i) {
          of.step[i * kGroups] = Part::combine(share.c + i, 1, first.panels(), group_rows, 1, H, args.options.norm_eps);
        }
      }
      for (int64_t i = 0; i < step.active; ++i) {
        const int64_t n = work.rows.packed(step.t, i);
        const Norm<T> norm = of.step[i * kGroups];
        if (share.first && out.saved != nullptr) {
          put(scalars(work.stream, n) + 2 * kGroups, norm.mean);
          put(scalars(work.stream, n) + 2 * kGroups + 1, norm.inverse);
        }
        for (int64_t p = share.its.panels.begin; p < share.its.panels.end; ++p) {
          const int64_t u = p * kWidth, valid = min(kWidth, H - u);
          const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
          const V c_now = load(share.now + i * HV + u), normal = (c_now - norm.mean) * norm.inverse;
          const V shown = tanh<T>(fma(at(w.gain_c, u, valid), normal, at(w.bias_c, u, valid)));
          const V c = zoneout<typename Cell::Arithmetic>(e.zoneout_c, load(work.c[0] + i * HV + u), c_now);
          this->store_cells(work, i, n, u, valid, &c);
          this->store_h(work, i, n, u, valid, e, load(work.h + i * PV + u),
                        load(share.output_gate + i * HV + u) * shown);
        }
      }
      this->end_of_step(work, step.t, step.active, share.its.own_h, share.its.own_c);
    }
  }

  S* scalars(int64_t stream, int64_t n) const {
    return static_cast<S*>(out.saved) + this->saved_at(n, stream) + Cell::kSaved * all_H;
  }
  static void put(S* to, T value) { store(to, broadcast(value), 1); }
};

template <class Cell>
struct NormBackward : Backward<Cell> {
  using Bw = Backward<Cell>;
  using Bw::args, Bw::walk, Bw::H, Bw::all_H, Bw::HV, Bw::group_rows, Bw::kGates, Bw::kWidth, Bw::grad, Bw::teams,
      Bw::G;
  using Bw::dgates_x, Bw::dgates_h, Bw::kSums;
  using typename Bw::Around;
  using typename Bw::S;
  using typename Bw::T;
  using typename Bw::V;
  using typename Bw::Workspace;
  static constexpr int kGroups = Cell::kNormGroups, kProducts = Cell::kNormProducts;
  static constexpr bool kNormC = Cell::kNormC;
  // Sums of v and of v times the normalised product, for each group and product.
  static constexpr int kPartsOfGroup = 2 * kProducts, kParts = kPartsOfGroup * kGroups;

  // What a thread needs for one share: the workspace of the share's team, and sums over units.
  struct ShareWork {
    Workspace work;
    V *parts, *parts_c;  // of the joined teams
    T* dc_normal;
    int64_t first_vector;  // of the team among the joined ones
    Range panels, own;
  };
  // Means over units that a thread has computed from the parts of all shares, once per phase.
  struct Means {
    T* values;  // [group_rows, kMeans]
    int64_t phase = -1;
  };
  static constexpr int kMeans = kParts > 2 ? kParts : 2;

  V *parts, *parts_c;      // [teams, vectors of units, group_rows, kParts or 2]
  T* dc_normal;            // [teams, group_rows, HV] gradient of the normalised c
  T* all_means;            // [threads, group_rows, kMeans]
  ShareWork* share_works;  // [threads, shares of joined teams]

  explicit NormBackward(const BackwardArgs& a) : Bw(a) {}

  int64_t vectors() const { return HV / kWidth; }

  void carve(Arena& arena) {
    Bw::carve(arena);
    const int64_t count = teams.count() * vectors() * group_rows;
    parts = arena.take<V>(count * kParts);
    parts_c = kNormC ? arena.take<V>(count * 2) : nullptr;
    dc_normal = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    all_means = arena.take<T>(teams.threads * group_rows * kMeans);
    share_works = arena.take<ShareWork>(teams.threads * teams.shares_of_team());
  }

  void run(int64_t thread) {
    teams.run_all(0, thread, [&](int64_t share) { this->prepare(share); });
    teams.each(thread, [&](Team& team) { run_sequences(team, thread); });
    teams.run_all(teams.phase_after_teams(), thread, [&](int64_t share) { this->finish(share, thread); });
  }

  ShareWork* works_of(const Team& team, int64_t thread) const {
    ShareWork* const works = share_works + thread * teams.shares_of_team();
    const int64_t count = vectors() * group_rows, units = args.plan.unit_groups;
    const int64_t joined = team.number * teams.joined;  // the first of the joined teams
    for (int64_t k = 0; k < teams.shares_of_team(); ++k) {
      const int64_t head = k / units, stream = team.stream * teams.joined + head;
      ShareWork& to =
          *new (works + k) ShareWork{this->workspace_of(stream, team.group, thread), {}, {}, {}, {}, {}, {}};
      const auto its = this->share_of(k % units);
      to.panels = its.panels;
      to.own = its.own;
      to.parts = parts + joined * count * kParts;
      to.first_vector = head * vectors();
      if (kNormC) {
        to.parts_c = parts_c + joined * count * 2;
        to.dc_normal = dc_normal + (stream * args.plan.row_groups + team.group) * group_rows * HV;
      }
    }
    return works;
  }

  void run_sequences(Team& team, int64_t thread) {
    ShareWork* const works = works_of(team, thread);
    const Workspace& any = works[0].work;  // rows and direction are those of all shares
    Means means{all_means + thread * group_rows * kMeans, -1};
    const auto each = [&](auto&& f) { team.run([&](int64_t k) { f(works[k]); }); };
    each([&](ShareWork& share) { this->begin_sequences(share.work, share.own); });
    typename Bw::Step step{0, 0, 0, 0};
    int64_t summed = 0;  // rows since the last flush of sums
    for (int64_t s = walk.T - 1; s >= 0; --s) {
      step.t = this->step(s, any.stream);
      step.active = any.rows.at(step.t);
      if (step.active == 0 && step.before == 0) continue;
      const bool flushes = (summed += step.active) >= UnitSums<T>::kRun;
      each([&](ShareWork& share) { from_outputs(share, step); });
      if (kNormC) each([&](ShareWork& share) { from_cell(share, means, step, team.phase); });
      each([&](ShareWork& share) { through_norms(share, means, step, team.phase, flushes); });
      if (flushes) summed = 0;
      step.before = step.active;
      step.before_t = step.t;
    }
    each([&](ShareWork& share) {
      this->end_sequences(share.work, share.own, share.panels, step.before_t, step.before);
    });
  }

  // The phases, for one share.

  __attribute__((noinline)) void from_outputs(ShareWork& share, const typename Bw::Step& step) const {
    for (int64_t p = share.panels.begin; p < share.panels.end; ++p) {
      this->recurrent_gradient(share.work, step.before_t, step.before, p);
      from_output(share, step.t, step.active, step.before, p);
      this->store_h(share.work, step.active, step.before, p);
    }
  }

  static T get(const S* p) { return load(p, 1)[0]; }
  const S* scalars(int64_t stream, const Around& a) const {
    return a.saved - this->unit0(stream) + Cell::kSaved * all_H;
  }
  V weight(const void* p, int64_t u, int64_t valid) const {
    return p == nullptr ? V{} : load(static_cast<const S*>(p) + u, valid);
  }

  // One panel: from the gradient of h in the tile to that of the normalised c,
  // or through the cell.
  void from_output(ShareWork& share, int64_t t, int64_t active, int64_t before, int64_t panel) const {
    Workspace& work = share.work;
    const Weights& w = this->weights(work.stream);
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      const Around a = this->around(work, t, i, n);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, H - u);
        if (valid <= 0) break;
        const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
        V dh = this->gradient_of_h(work, n, i, before, u, valid, work.tile[0] + i * kPanel<T> + v * kWidth);
        const V kept_h = dh * e.zoneout_h;
        dh = dh - kept_h;
        V saved[Cell::kValues + 1];
        for (int k = 0; k < Cell::kValues; ++k) saved[k] = load(a.saved + k * all_H + u, valid);
        if constexpr (kNormC) {
          const T mean = get(scalars(work.stream, a) + 2 * kGroups),
                  inverse = get(scalars(work.stream, a) + 2 * kGroups + 1);
          const V c_prev = Bw::at(a.c_prev[0], u, valid);
          const V c = before_zoneout(e, load(a.c[0] + u, valid), Cell::unclipped(saved, e, c_prev));
          const V normal = first_lanes<T>((c - mean) * inverse, valid), gain = weight(w.gain_c, u, valid);
          const V shown = tanh<T>(fma(gain, normal, weight(w.bias_c, u, valid)));
          const auto o = restore<Sigmoid>(e, saved[3]);
          store(dgates_x + this->gates_at(n, work.stream) + 3 * all_H + u, dh * shown * o.slope, valid);
          const V du = first_lanes<T>(dh * o.value * Tanh::slope<typename Cell::Arithmetic>(shown), valid),
                  dnormal = du * gain;
          work.sums.add(2 * kProducts * kGates, u, du * normal);
          work.sums.add(2 * kProducts * kGates + 1, u, du);
          store(share.dc_normal + i * HV + u, dnormal);
          V* to = share.parts_c + (u / kWidth * group_rows + i) * 2;
          to[0] = dnormal;
          to[1] = dnormal * normal;
          store(work.direct + i * HV + u, kept_h);
        } else {
          constexpr int kProduct = kProducts - 1, kGate = Cell::kReadsGate;
          const V normal = load(a.saved + (Cell::kValues + kProduct * kGates + kGate) * all_H + u, valid);
          const int64_t at_weight = kGate * all_H + this->unit0(work.stream) + u;
          saved[Cell::kValues] = fma(weight(gain_of<Cell>(w, kProduct), at_weight, valid), normal,
                                     weight(shift_of<Cell>(w, kProduct), at_weight, valid));
          StepGradient<V> step;
          V none[1] = {};
          Cell::backward(saved, e, Bw::at(a.h_prev, u, valid), none, none, dh, none, step);
          store(work.direct + i * HV + u, step.direct + kept_h);
          through_gains(share, a, i, n, u, valid, step.x, step.h);
        }
      }
    }
  }

  // Own units: from the gradient of the normalised c through c and the gates.
  __attribute__((noinline)) void from_cell(ShareWork& share, Means& means, const typename Bw::Step& step,
                                           int64_t phase) const {
    if constexpr (kNormC) {
      const int64_t t = step.t, active = step.active;
      if (means.phase != phase) {
        means.phase = phase;
        for (int64_t i = 0; i < active; ++i) {
          V sum = {}, sum_normal = {};
          for (int64_t p = 0; p < vectors(); ++p) {
            sum += share.parts_c[(p * group_rows + i) * 2];
            sum_normal += share.parts_c[(p * group_rows + i) * 2 + 1];
          }
          means.values[i * kMeans] = sum_of_lanes<T>(sum) / T(H);
          means.values[i * kMeans + 1] = sum_of_lanes<T>(sum_normal) / T(H);
        }
      }
      Workspace& work = share.work;
      const Range own = share.own;
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        const Around a = this->around(work, t, i, n);
        const T mean = get(scalars(work.stream, a) + 2 * kGroups),
                inverse = get(scalars(work.stream, a) + 2 * kGroups + 1);
        const T mean_d = means.values[i * kMeans], mean_dn = means.values[i * kMeans + 1];
        for (int64_t u = own.begin; u < own.end; u += kWidth) {
          const int64_t valid = min(kWidth, H - u);
          const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
          V saved[Cell::kValues], d[kGates];
          for (int k = 0; k < Cell::kValues; ++k) saved[k] = load(a.saved + k * all_H + u, valid);
          const V c_prev = Bw::at(a.c_prev[0], u, valid);
          const V c = before_zoneout(e, load(a.c[0] + u, valid), Cell::unclipped(saved, e, c_prev));
          const V normal = (c - mean) * inverse;
          V dc = load(work.dc[0] + i * HV + u);
          if (grad.dcells[0] != nullptr) dc += load(static_cast<const S*>(grad.dcells[0]) + a.cell + u, valid);
          const V kept_c = dc * e.zoneout_c;
          dc = dc - kept_c;
          dc = fma(load(share.dc_normal + i * HV + u) - mean_d - normal * mean_dn, broadcast(inverse), dc);
          Cell::backward(saved, e, c_prev, dc, d);
          d[3] = load(dgates_x + this->gates_at(n, work.stream) + 3 * all_H + u, valid);
          store(work.dc[0] + i * HV + u, a.restarts ? V{} : dc + kept_c);
          through_gains(share, a, i, n, u, valid, d, d);
        }
      }
    }
  }

  // Adds the gradients of gains and shifts, and stores the gradients of the
  // normalised products and their sums.
  SEQKERNELS_INLINE void through_gains(ShareWork& share, const Around& a, int64_t i, int64_t n, int64_t u,
                                       int64_t valid, const V* dx, const V* dh) const {
    Workspace& work = share.work;
    const Weights& w = this->weights(work.stream);
    V* to = share.parts + ((share.first_vector + u / kWidth) * group_rows + i) * kParts;
    for (int k = 0; k < kParts; ++k) to[k] = V{};
    const int64_t gates = this->gates_at(n, work.stream) + u, first_weight = this->unit0(work.stream) + u;
    for (int product = 0; product < kProducts; ++product) {
      const V* d = product == 0 ? dx : dh;
      for (int g = 0; g < kGates; ++g) {
        const V normal = load(a.saved + (Cell::kValues + product * kGates + g) * all_H + u, valid);
        const V of = first_lanes<T>(d[g], valid);
        work.sums.add(product * kGates + g, u, of);
        work.sums.add((kProducts + product) * kGates + g, u, of * normal);
        const V v = of * weight(gain_of<Cell>(w, product), g * all_H + first_weight, valid);
        V* sums = to + kPartsOfGroup * Cell::group_of(g) + 2 * product;
        sums[0] += v;
        sums[1] = fma(v, normal, sums[1]);
        store((product == 0 ? dgates_x : dgates_h) + gates + g * all_H, v, valid);
      }
    }
  }

  // Own units: from the gradients of the normalised products to those of the
  // products.
  __attribute__((noinline)) void through_norms(ShareWork& share, Means& means, const typename Bw::Step& step,
                                               int64_t phase, bool flushes) const {
    const int64_t stream = share.work.stream;
    if (means.phase != phase) {
      means.phase = phase;
      for (int64_t i = 0; i < step.active; ++i) {
        for (int k = 0; k < kParts; ++k) {
          V sum = {};
          for (int64_t p = 0; p < teams.joined * vectors(); ++p) {
            sum += share.parts[(p * group_rows + i) * kParts + k];
          }
          means.values[i * kMeans + k] =
              sum_of_lanes<T>(sum) / (T(teams.joined * H) * T(gates_in<Cell>(k / kPartsOfGroup)));
        }
      }
    }
    for (int64_t i = 0; i < step.active; ++i) {
      const int64_t n = share.work.rows.packed(step.t, i), gates = this->gates_at(n, stream);
      const S* const saved = Bw::typed(grad.saved) + this->saved_at(n, stream);
      const T* const mean = means.values + i * kMeans;
      for (int product = 0; product < kProducts; ++product) {
        T* const d = (product == 0 ? dgates_x : dgates_h) + gates;
        for (int g = 0; g < kGates; ++g) {
          const int group = Cell::group_of(g);
          const T* of = mean + kPartsOfGroup * group + 2 * product;
          const T inverse = get(saved - this->unit0(stream) + Cell::kSaved * all_H + product * kGroups + group);
          for (int64_t u = share.own.begin; u < share.own.end; u += kWidth) {
            const int64_t valid = min(kWidth, H - u);
            const V normal = load(saved + (Cell::kValues + product * kGates + g) * all_H + u, valid);
            T* to = d + g * all_H + u;
            store(to, (load(to, valid) - of[0] - normal * of[1]) * inverse, valid);
          }
        }
      }
    }
    if (flushes) share.work.sums.flush(kSums, share.own);
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
