// Recurrent layers whose products with x and h, or their sum, are normalised
// over all units of a row, forward and backward.
//
// A step has more barriers than that of other cells, since the mean and
// variance of a row need all units: forward computes the products,
// synchronises, normalises and runs the cell (the c of an LSTM is normalised
// after another barrier); backward runs the cell, synchronises, and propagates
// the gradients through the normalisation. Members exchange sums per panel of
// units, which each member adds in the order of panels, by lane and then across
// lanes, so the result is independent of the division among threads.
//
// A normalisation of the sum covers all heads: the teams of the heads of one
// direction are joined (see Teams), and a thread runs each phase of a step for
// all of its teams before it synchronises.
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
  using F::chunk_rows, F::kWide1, F::states, F::products, F::team_size, F::member_size;
  using typename F::S;
  using typename F::T;
  using typename F::V;
  using Part = Moments<T>;
  static constexpr int kGroups = Cell::kNormGroups, kProducts = Cell::kNormProducts;
  static constexpr bool kNormC = Cell::kNormC, kJoint = Cell::kJointNorm;

  // Workspace of a thread in one team, beside Workspace.
  struct NormWorkspace {
    Part *x, *h, *c;  // of the joined teams
    T *now, *output_gate, *from_h;
    Norm<T>* norms;
    int64_t first_panel;  // of the team among the joined ones
    Range panels, own;
    bool first_member;  // writes the values that exist once per row
  };
  struct TeamWork {
    Workspace<T> work;
    NormWorkspace norm;
  };
  // The teams among the joined ones of which a thread runs members.
  struct TeamWorks {
    TeamWork *first, *last;
    TeamWork* begin() const { return first; }
    TeamWork* end() const { return last; }
  };

  Part *parts_x, *parts_h, *parts_c;  // [teams, panels, rows, kGroups]
  T *now, *output_gate;               // [teams, group_rows, HV] c before zoneout, o
  T* all_from_h;                      // [members, panels, group_rows, kWide1]
  Norm<T>* norms;                     // [members, chunk_rows, kGroups] of the input's share
  TeamWork* team_works;               // [members]

  explicit NormForward(const ForwardArgs& a) : F(a) {}

  void carve(Arena& arena) {
    F::carve(arena);
    const int64_t parts = teams.count() * first.panels();
    parts_x = kJoint ? nullptr : arena.take<Part>(parts * chunk_rows * kGroups);
    parts_h = arena.take<Part>(parts * group_rows * kGroups);
    parts_c = kNormC ? arena.take<Part>(parts * group_rows) : nullptr;
    now = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    output_gate = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    all_from_h = arena.take<T>(teams.members() * first.member_panels() * group_rows * kWide1);
    norms = kJoint ? nullptr : arena.take<Norm<T>>(teams.members() * chunk_rows * kGroups);
    team_works = arena.take<TeamWork>(teams.members());
  }

  void run(int64_t begin, int64_t end) {
    F::pack(begin, end);
    teams.each(begin, end, [&](const Member& member) { run_sequences(member, begin); });
  }

  TeamWorks works_of(const Member& all, int64_t slot) const {
    TeamWorks works{team_works + slot, team_works + slot};
    const int64_t panels = first.panels(), joined = teams.team(all) * teams.joined;
    teams.each_team(all, [&](const Member& member, int64_t before) {
      TeamWork& to = *new (works.last++) TeamWork{{member.stream, {walk, args.plan.row_groups, member.group}}, {}};
      Arena of_team{reinterpret_cast<char*>(states + teams.team(member) * team_size)};
      Arena of_member{reinterpret_cast<char*>(products + (slot + before) * member_size)};
      this->states_of(of_team, to.work);
      this->products_of(of_member, to.work);
      to.work.x_chunk = works.first->work.x_chunk;
      const int64_t team = teams.team(member);
      to.norm.x = kJoint ? nullptr : parts_x + joined * panels * chunk_rows * kGroups;
      to.norm.h = parts_h + joined * panels * group_rows * kGroups;
      if (kNormC) {
        to.norm.c = parts_c + joined * panels * group_rows;
        to.norm.now = now + team * group_rows * HV;
        to.norm.output_gate = output_gate + team * group_rows * HV;
      }
      to.norm.from_h = all_from_h + (slot + before) * first.member_panels() * group_rows * kWide1;
      to.norm.norms = kJoint ? nullptr : norms + slot * chunk_rows * kGroups;
      to.norm.first_panel = member.stream % teams.joined * panels;
      to.norm.panels = first.share_of(member);
      to.norm.own = first.units_of(to.norm.panels);
      to.norm.first_member = all.first == 0 && before == 0;
    });
    return works;
  }

  void run_sequences(const Member& member, int64_t slot) {
    const TeamWorks works = works_of(member, slot);
    const Workspace<T>& any = works.first->work;  // rows and direction are those of all teams
    for (const TeamWork& team : works) this->begin_sequences(team.work, team.norm.own, team.norm.own);
    member.sync();

    for (int64_t s = 0, next; s < walk.T; s = next) {
      const int64_t in_chunk = this->gather_chunk(any, s, next);
      if (in_chunk == 0) continue;
      for (const TeamWork& team : works) from_input(team, in_chunk);
      if constexpr (!kJoint) {
        member.sync();
        const NormWorkspace& norm = works.first->norm;
        for (int64_t row = 0; row < in_chunk; ++row) combine(norm.x, row, chunk_rows, norm.norms + row * kGroups);
      }
      for (int64_t row = 0; s < next; ++s) {
        const int64_t t = this->step(s, any.stream), active = any.rows.at(t);
        if (active == 0) continue;
        for (const TeamWork& team : works) from_state(team, active, row);
        member.sync();
        normed_cells(works, t, active, row);
        if (kNormC) {
          member.sync();
          outputs(any, works.first->norm, t, active);
        }
        for (TeamWork& team : works) {
          this->end_of_step(team.work, t, active, team.norm.own, team.norm.own);
          F::swap(team.work.h, team.work.h_next);
          F::swap(team.work.recurrent, team.work.recurrent_next);
        }
        row += active;
        member.sync();
      }
    }
  }

  // The products with the rows of x of a chunk. Not inlined, nor is from_state: among the loops of run_sequences, GCC
  // keeps the sums of some products in memory.
  __attribute__((noinline)) void from_input(const TeamWork& team, int64_t rows) const {
    const Workspace<T>& work = team.work;
    for (int64_t p = team.norm.panels.begin; p < team.norm.panels.end; ++p) {
      T* to = work.from_x + (p - team.norm.panels.begin) * chunk_rows * kWide1;
      first.product_x(work.stream, p, rows, work.x_chunk, work.scratch, to);
      if constexpr (!kJoint) measure(to, rows, team.norm.x + p * chunk_rows * kGroups);
    }
  }

  // The products with h of one step; where the sum is normalised, the sum with
  // those with x and the biases. row: the first row of the step in the chunk.
  __attribute__((noinline)) void from_state(const TeamWork& team, int64_t active, int64_t row) const {
    const Workspace<T>& work = team.work;
    for (int64_t p = team.norm.panels.begin; p < team.norm.panels.end; ++p) {
      const int64_t local = p - team.norm.panels.begin;
      T* to = team.norm.from_h + local * group_rows * kWide1;
      first.product_h(work.stream, 0, p, active, work.recurrent, PV, work.scratch, to, Into::kReplace);
      if constexpr (kJoint) {
        const T* from_x = work.from_x + (local * chunk_rows + row) * kWide1;
        for (int64_t i = 0; i < active; ++i) {
          V x[kGates], h[kGates];
          first.gates(work.stream, p, 0, from_x + i * kWide1, to + i * kWide1, x, h);
          for (int g = 0; g < kGates; ++g) store(to + i * kWide1 + g * kWidth, x[g] + h[g]);
        }
      }
      measure(to, active, team.norm.h + (team.norm.first_panel + p) * group_rows * kGroups);
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

  // Normalises and runs the cell on own panels. row: the first row of the step
  // in the chunk.
  void normed_cells(const TeamWorks& works, int64_t t, int64_t active, int64_t row) const {
    const Workspace<T>& any = works.first->work;
    const NormWorkspace& norm = works.first->norm;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = any.rows.packed(t, i);
      const Norm<T>* norms[kProducts];
      Norm<T> of_h[kGroups];
      combine(norm.h, i, group_rows, of_h);
      if constexpr (!kJoint) norms[0] = norm.norms + (row + i) * kGroups;
      norms[kProducts - 1] = of_h;
      if (norm.first_member && out.saved != nullptr) {
        S* to = scalars(any.stream, n);
        for (int product = 0; product < kProducts; ++product) {
          for (int group = 0; group < kGroups; ++group)
            put(to + product * kGroups + group, norms[product][group].inverse);
        }
      }
      for (const TeamWork& team : works) {
        for (int64_t p = team.norm.panels.begin; p < team.norm.panels.end; ++p) cell(team, i, n, p, row, norms);
      }
    }
  }

  // The i-th row and one panel.
  SEQKERNELS_INLINE void cell(const TeamWork& team, int64_t i, int64_t n, int64_t p, int64_t row,
                              const Norm<T>* const* norms) const {
    const Workspace<T>& work = team.work;
    const Weights& w = first.weights(work.stream);
    const int64_t u = p * kWidth, valid = min(kWidth, H - u), local = p - team.norm.panels.begin;
    const T* const from_h = team.norm.from_h + (local * group_rows + i) * kWide1;
    const T* const from[] = {kJoint ? from_h : work.from_x + (local * chunk_rows + row + i) * kWide1, from_h};
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
      store(team.norm.now + i * HV + u, result);
      store(team.norm.output_gate + i * HV + u, restore<Sigmoid>(e, values[3]).value);
      team.norm.c[p * group_rows + i] = Part::of(&result, 1);
    } else {
      this->store_h(work, i, n, u, valid, e, h_prev, result);
    }
  }

  // h = o tanh(norm(c)), and c after zoneout.
  void outputs(const Workspace<T>& work, const NormWorkspace& norm_work, int64_t t, int64_t active) const {
    if constexpr (kNormC) {
      const Weights& w = first.weights(work.stream);
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        const Norm<T> norm = Part::combine(norm_work.c + i, 1, first.panels(), group_rows, 1, H, args.options.norm_eps);
        if (norm_work.first_member && out.saved != nullptr) {
          put(scalars(work.stream, n) + 2 * kGroups, norm.mean);
          put(scalars(work.stream, n) + 2 * kGroups + 1, norm.inverse);
        }
        for (int64_t p = norm_work.panels.begin; p < norm_work.panels.end; ++p) {
          const int64_t u = p * kWidth, valid = min(kWidth, H - u);
          const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
          const V c_now = load(norm_work.now + i * HV + u), normal = (c_now - norm.mean) * norm.inverse;
          const V shown = tanh<T>(fma(at(w.gain_c, u, valid), normal, at(w.bias_c, u, valid)));
          const V c = zoneout<typename Cell::Arithmetic>(e.zoneout_c, load(work.c[0] + i * HV + u), c_now);
          this->store_cells(work, i, n, u, valid, &c);
          this->store_h(work, i, n, u, valid, e, load(work.h + i * PV + u),
                        load(norm_work.output_gate + i * HV + u) * shown);
        }
      }
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

  // Workspace of a thread in one team.
  struct TeamWork {
    Workspace work;
    V *parts, *parts_c;  // of the joined teams
    T* dc_normal;
    int64_t first_vector;  // of the team among the joined ones
    Range panels, own;
  };

  V *parts, *parts_c;    // [teams, vectors of units, group_rows, kParts or 2]
  T* dc_normal;          // [teams, group_rows, HV] gradient of the normalised c
  TeamWork* team_works;  // [members]

  explicit NormBackward(const BackwardArgs& a) : Bw(a) {}

  int64_t vectors() const { return HV / kWidth; }

  void carve(Arena& arena) {
    Bw::carve(arena);
    const int64_t count = teams.count() * vectors() * group_rows;
    parts = arena.take<V>(count * kParts);
    parts_c = kNormC ? arena.take<V>(count * 2) : nullptr;
    dc_normal = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    team_works = arena.take<TeamWork>(teams.members());
  }

  void run(int64_t begin, int64_t end) {
    Bw::prepare(begin, end);
    teams.each(begin, end, [&](const Member& member) { run_sequences(member, begin); });
    teams.everyone.arrive_and_wait(end - begin);
    Bw::finish(begin, end);
  }

  void run_sequences(const Member& all, int64_t slot) {
    TeamWork *const begin = team_works + slot, *end = begin;
    const int64_t count = vectors() * group_rows, joined = teams.team(all) * teams.joined;
    teams.each_team(all, [&](const Member& member, int64_t before) {
      TeamWork& to = *new (end++) TeamWork{this->workspace_of(member, slot + before), {}, {}, {}, {}, {}, {}};
      to.panels = share(Bw::to_panels(H), args.plan.unit_groups, member.first, member.last);
      to.own = {min(H, to.panels.begin * kPanel<T>), min(H, to.panels.end * kPanel<T>)};
      to.parts = parts + joined * count * kParts;
      to.first_vector = member.stream % teams.joined * vectors();
      if (kNormC) {
        to.parts_c = parts_c + joined * count * 2;
        to.dc_normal = dc_normal + teams.team(member) * group_rows * HV;
      }
      this->begin_sequences(to.work, to.own);
    });
    const Workspace& any = begin->work;  // rows and direction are those of all teams
    int64_t before = 0, before_t = 0;
    for (int64_t s = walk.T - 1; s >= 0; --s) {
      const int64_t t = this->step(s, any.stream), active = any.rows.at(t);
      if (active == 0 && before == 0) continue;
      for (TeamWork* team = begin; team < end; ++team) {
        for (int64_t p = team->panels.begin; p < team->panels.end; ++p) {
          this->recurrent_gradient(team->work, before_t, before, p);
          from_output(*team, t, active, before, p);
          this->store_h(team->work, active, before, p);
        }
      }
      all.sync();
      if (kNormC) {
        from_cell(*begin, t, active);
        all.sync();
      }
      through_norms(begin, end, t, active);
      for (TeamWork* team = begin; team < end; ++team) {
        if ((team->work.run += active) < UnitSums<T>::kRun) continue;
        team->work.sums.flush(kSums, team->own);
        team->work.run = 0;
      }
      before = active;
      before_t = t;
      all.sync();
    }
    for (TeamWork* team = begin; team < end; ++team) {
      team->work.sums.flush(kSums, team->own);
      this->end_sequences(team->work, team->own, team->panels, before_t, before);
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
  void from_output(TeamWork& team, int64_t t, int64_t active, int64_t before, int64_t panel) const {
    Workspace& work = team.work;
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
          store(team.dc_normal + i * HV + u, dnormal);
          V* to = team.parts_c + (u / kWidth * group_rows + i) * 2;
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
          through_gains(team, a, i, n, u, valid, step.x, step.h);
        }
      }
    }
  }

  // Own units: from the gradient of the normalised c through c and the gates.
  void from_cell(TeamWork& team, int64_t t, int64_t active) const {
    if constexpr (kNormC) {
      Workspace& work = team.work;
      const Range own = team.own;
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        const Around a = this->around(work, t, i, n);
        const T mean = get(scalars(work.stream, a) + 2 * kGroups),
                inverse = get(scalars(work.stream, a) + 2 * kGroups + 1);
        V sum = {}, sum_normal = {};
        for (int64_t p = 0; p < vectors(); ++p) {
          sum += team.parts_c[(p * group_rows + i) * 2];
          sum_normal += team.parts_c[(p * group_rows + i) * 2 + 1];
        }
        const T mean_d = sum_of_lanes<T>(sum) / T(H), mean_dn = sum_of_lanes<T>(sum_normal) / T(H);
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
          dc = fma(load(team.dc_normal + i * HV + u) - mean_d - normal * mean_dn, broadcast(inverse), dc);
          Cell::backward(saved, e, c_prev, dc, d);
          d[3] = load(dgates_x + this->gates_at(n, work.stream) + 3 * all_H + u, valid);
          store(work.dc[0] + i * HV + u, a.restarts ? V{} : dc + kept_c);
          through_gains(team, a, i, n, u, valid, d, d);
        }
      }
    }
  }

  // Adds the gradients of gains and shifts, and stores the gradients of the
  // normalised products and their sums.
  SEQKERNELS_INLINE void through_gains(TeamWork& team, const Around& a, int64_t i, int64_t n, int64_t u, int64_t valid,
                                       const V* dx, const V* dh) const {
    Workspace& work = team.work;
    const Weights& w = this->weights(work.stream);
    V* to = team.parts + ((team.first_vector + u / kWidth) * group_rows + i) * kParts;
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
  void through_norms(const TeamWork* begin, const TeamWork* end, int64_t t, int64_t active) const {
    const Workspace& any = begin->work;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = any.rows.packed(t, i);
      const S* const from = scalars(any.stream, this->around(any, t, i, n));
      T mean[kParts], inverse[kProducts][kGroups];
      for (int k = 0; k < kParts; ++k) {
        V sum = {};
        for (int64_t p = 0; p < teams.joined * vectors(); ++p) sum += begin->parts[(p * group_rows + i) * kParts + k];
        mean[k] = sum_of_lanes<T>(sum) / (T(teams.joined * H) * T(gates_in<Cell>(k / kPartsOfGroup)));
      }
      for (int product = 0; product < kProducts; ++product) {
        for (int group = 0; group < kGroups; ++group) inverse[product][group] = get(from + product * kGroups + group);
      }
      for (const TeamWork* team = begin; team < end; ++team) {
        const int64_t stream = team->work.stream, gates = this->gates_at(n, stream);
        const S* const saved = Bw::typed(grad.saved) + this->saved_at(n, stream);
        for (int product = 0; product < kProducts; ++product) {
          T* const d = (product == 0 ? dgates_x : dgates_h) + gates;
          for (int g = 0; g < kGates; ++g) {
            const int group = Cell::group_of(g);
            const T* of = mean + kPartsOfGroup * group + 2 * product;
            for (int64_t u = team->own.begin; u < team->own.end; u += kWidth) {
              const int64_t valid = min(kWidth, H - u);
              const V normal = load(saved + (Cell::kValues + product * kGates + g) * all_H + u, valid);
              T* to = d + g * all_H + u;
              store(to, (load(to, valid) - of[0] - normal * of[1]) * inverse[product][group], valid);
            }
          }
        }
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
