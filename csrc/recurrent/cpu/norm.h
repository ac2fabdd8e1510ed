// Recurrent layers whose products with x and h are normalised over all units of
// a row, forward and backward.
//
// A step has more barriers than that of other cells, since the mean and
// variance of a row need all units: forward computes the products,
// synchronises, normalises and runs the cell (the c of an LSTM is normalised
// after another barrier); backward runs the cell, synchronises, and propagates
// the gradients through the normalisation. Members exchange sums per panel of
// units, which each member adds in the order of panels, by lane and then across
// lanes, so the result is independent of the division among threads.
#pragma once

#include "recurrent/cpu/backward.h"
#include "recurrent/cpu/forward.h"

namespace seqkernels::SEQKERNELS_ISA {

constexpr double kNormEpsilon = 1e-5;

template <class T>
SEQKERNELS_INLINE T sum_of_lanes(Native<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
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

  // Combines `panels` moments of `each` values per lane, `stride` apart;
  // `units` lanes in total hold values.
  static Norm<T> combine(const Moments* parts, int64_t panels, int64_t stride, int each, int64_t units) {
    constexpr int64_t kWidth = kLanes<T>;
    V mean = {}, deviation = {}, count = {};
    const V more = broadcast(T(each));
    for (int64_t p = 0; p < panels; ++p) {
      const Moments& part = parts[p * stride];
      const V added = first_lanes<T>(more, units - p * kWidth), together = count + added;
      const V delta = first_lanes<T>(part.mean - mean, units - p * kWidth);
      const V share = together > T(0) ? added / together : V{};
      mean = fma(delta, share, mean);
      deviation = deviation + first_lanes<T>(part.deviation, units - p * kWidth) + delta * delta * count * share;
      count = together;
    }
    const T all = T(each) * T(units), center = sum_of_lanes<T>(mean * count) / all;
    const V off = mean - center;
    const T variance = sum_of_lanes<T>(fma(off * off, count, deviation)) / all;
    return {center, T(1 / __builtin_sqrt(variance + kNormEpsilon))};
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

template <class Cell>
struct NormForward : Forward<Cell> {
  using F = Forward<Cell>;
  using F::args, F::walk, F::H, F::all_H, F::HV, F::PV, F::group_rows, F::kGates, F::kWidth, F::first, F::out, F::teams;
  using F::chunk_rows, F::kWide1, F::states, F::products, F::team_size, F::member_size;
  using typename F::S;
  using typename F::T;
  using typename F::V;
  using Part = Moments<T>;
  static constexpr int kGroups = Cell::kNormGroups;
  static constexpr bool kNormC = Cell::kNormC;

  Part *parts_x, *parts_h, *parts_c;  // [teams, panels, rows, kGroups]
  T *now, *output_gate;               // [teams, group_rows, HV] c before zoneout, o
  T* all_from_h;                      // [members, panels, group_rows, kWide1]
  Norm<T>* norms;                     // [members, chunk_rows, kGroups] of the input's share

  explicit NormForward(const ForwardArgs& a) : F(a) {}

  void carve(Arena& arena) {
    F::carve(arena);
    const int64_t parts = teams.count() * first.panels();
    parts_x = arena.take<Part>(parts * chunk_rows * kGroups);
    parts_h = arena.take<Part>(parts * group_rows * kGroups);
    parts_c = kNormC ? arena.take<Part>(parts * group_rows) : nullptr;
    now = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    output_gate = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    all_from_h = arena.take<T>(teams.members() * first.member_panels() * group_rows * kWide1);
    norms = arena.take<Norm<T>>(teams.members() * chunk_rows * kGroups);
  }

  void run(int64_t begin, int64_t end) {
    F::pack(begin, end);
    teams.each(begin, end, [&](const Member& member) { run_sequences(member, begin); });
  }

  // Workspace of a member beside Workspace.
  struct NormWorkspace {
    Part *x, *h, *c;
    T *now, *output_gate, *from_h;
    Norm<T>* norms;
    Range panels, own;
    bool first_member;  // writes the values that exist once per row
  };

  void run_sequences(const Member& member, int64_t slot) {
    Workspace<T> work{member.stream, {walk, args.plan.row_groups, member.group}};
    Arena of_team{reinterpret_cast<char*>(states + teams.team(member) * team_size)};
    Arena of_member{reinterpret_cast<char*>(products + slot * member_size)};
    this->states_of(of_team, work);
    this->products_of(of_member, work);
    const int64_t team = teams.team(member), panels_all = first.panels(), stream = member.stream;
    NormWorkspace norm_work{};
    norm_work.x = parts_x + team * panels_all * chunk_rows * kGroups;
    norm_work.h = parts_h + team * panels_all * group_rows * kGroups;
    if (kNormC) {
      norm_work.c = parts_c + team * panels_all * group_rows;
      norm_work.now = now + team * group_rows * HV;
      norm_work.output_gate = output_gate + team * group_rows * HV;
    }
    norm_work.from_h = all_from_h + slot * first.member_panels() * group_rows * kWide1;
    norm_work.norms = norms + slot * chunk_rows * kGroups;
    norm_work.panels = first.share_of(member);
    norm_work.own = first.units_of(norm_work.panels);
    norm_work.first_member = member.first == 0;
    const Range panels = norm_work.panels;
    this->begin_sequences(work, norm_work.own, norm_work.own);
    member.sync();

    for (int64_t s = 0, next; s < walk.T; s = next) {
      const int64_t in_chunk = this->gather_chunk(work, s, next);
      if (in_chunk == 0) continue;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        T* to = work.from_x + (p - panels.begin) * chunk_rows * kWide1;
        first.product_x(stream, p, in_chunk, work.x_chunk, work.scratch, to);
        measure(to, in_chunk, norm_work.x + p * chunk_rows * kGroups);
      }
      member.sync();
      for (int64_t row = 0; row < in_chunk; ++row)
        combine(norm_work.x, row, chunk_rows, norm_work.norms + row * kGroups);
      for (int64_t row = 0; s < next; ++s) {
        const int64_t t = this->step(s, stream), active = work.rows.at(t);
        if (active == 0) continue;
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          T* to = norm_work.from_h + (p - panels.begin) * group_rows * kWide1;
          first.product_h(stream, 0, p, active, work.recurrent, PV, work.scratch, to, Into::kReplace);
          measure(to, active, norm_work.h + p * group_rows * kGroups);
        }
        member.sync();
        normed_cells(work, norm_work, t, active, row);
        if (kNormC) {
          member.sync();
          outputs(work, norm_work, t, active);
        }
        this->end_of_step(work, t, active, norm_work.own, norm_work.own);
        F::swap(work.h, work.h_next);
        F::swap(work.recurrent, work.recurrent_next);
        row += active;
        member.sync();
      }
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
      to[group] =
          Part::combine(parts + row * kGroups + group, first.panels(), rows * kGroups, gates_in<Cell>(group), H);
    }
  }

  SEQKERNELS_INLINE V at(const void* p, int64_t u, int64_t valid) const {
    return p == nullptr ? V{} : load(static_cast<const S*>(p) + u, valid);
  }

  // Normalises both products and runs the cell on own panels. row: the first
  // row of the step in the chunk.
  void normed_cells(const Workspace<T>& work, const NormWorkspace& norm_work, int64_t t, int64_t active,
                    int64_t row) const {
    const Weights& w = first.weights(work.stream);
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      const Norm<T>* of_x = norm_work.norms + (row + i) * kGroups;
      Norm<T> of_h[kGroups];
      combine(norm_work.h, i, group_rows, of_h);
      if (norm_work.first_member && out.saved != nullptr) {
        S* to = scalars(work.stream, n);
        for (int group = 0; group < kGroups; ++group) {
          put(to + group, of_x[group].inverse);
          put(to + kGroups + group, of_h[group].inverse);
        }
      }
      for (int64_t p = norm_work.panels.begin; p < norm_work.panels.end; ++p) {
        const int64_t u = p * kWidth, valid = min(kWidth, H - u), local = p - norm_work.panels.begin;
        const T* from_x = work.from_x + (local * chunk_rows + row + i) * kWide1;
        const T* from_h = norm_work.from_h + (local * group_rows + i) * kWide1;
        V x[kGates], h[kGates], values[Cell::kValues + 1], normal_x[kGates], normal_h[kGates];
        for (int g = 0; g < kGates; ++g) {
          const Norm<T>&nx = of_x[Cell::group_of(g)], &nh = of_h[Cell::group_of(g)];
          normal_x[g] = (load(from_x + g * kWidth) - nx.mean) * nx.inverse;
          normal_h[g] = (load(from_h + g * kWidth) - nh.mean) * nh.inverse;
          x[g] = fma(at(w.gain_ih, g * H + u, valid), normal_x[g], at(w.b_ih, g * H + u, valid));
          h[g] = fma(at(w.gain_hh, g * H + u, valid), normal_h[g], at(w.b_hh, g * H + u, valid));
        }
        const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
        const V h_prev = load(work.h + i * PV + u);
        V c[1] = {};
        if constexpr (kNormC) c[0] = load(work.c[0] + i * HV + u);
        const V result = Cell::forward(x, h, e, h_prev, c, values);
        this->save(work.stream, n, u, valid, values, 0, Cell::kValues);
        this->save(work.stream, n, u, valid, normal_x, Cell::kValues, Cell::kValues + kGates);
        this->save(work.stream, n, u, valid, normal_h, Cell::kValues + kGates, Cell::kSaved);
        if constexpr (kNormC) {
          store(norm_work.now + i * HV + u, result);
          store(norm_work.output_gate + i * HV + u, restore<Sigmoid>(e, values[3]).value);
          norm_work.c[p * group_rows + i] = Part::of(&result, 1);
        } else {
          this->store_h(work, i, n, u, valid, e, h_prev, result);
        }
      }
    }
  }

  // h = o tanh(norm(c)), and c after zoneout.
  void outputs(const Workspace<T>& work, const NormWorkspace& norm_work, int64_t t, int64_t active) const {
    if constexpr (kNormC) {
      const Weights& w = first.weights(work.stream);
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        const Norm<T> norm = Part::combine(norm_work.c + i, first.panels(), group_rows, 1, H);
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
  static constexpr int kGroups = Cell::kNormGroups;
  static constexpr bool kNormC = Cell::kNormC;
  static constexpr int kParts = 4 * kGroups;  // sums of v and of v times the normalised product, for x and
                                              // for h

  V *parts, *parts_c;  // [teams, vectors of units, group_rows, kParts or 2]
  T* dc_normal;        // [teams, group_rows, HV] gradient of the normalised c

  explicit NormBackward(const BackwardArgs& a) : Bw(a) {}

  int64_t vectors() const { return HV / kWidth; }

  void carve(Arena& arena) {
    Bw::carve(arena);
    const int64_t count = teams.count() * vectors() * group_rows;
    parts = arena.take<V>(count * kParts);
    parts_c = kNormC ? arena.take<V>(count * 2) : nullptr;
    dc_normal = kNormC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
  }

  void run(int64_t begin, int64_t end) {
    Bw::prepare(begin, end);
    teams.each(begin, end, [&](const Member& member) { run_sequences(member, begin); });
    teams.everyone.arrive_and_wait(end - begin);
    Bw::finish(begin, end);
  }

  struct NormWorkspace {
    V *parts, *parts_c;
    T* dc_normal;
  };

  void run_sequences(const Member& member, int64_t slot) {
    Workspace work = this->workspace_of(member, slot);
    const int64_t stream = member.stream, team = teams.team(member), count = vectors() * group_rows;
    const Range panels = share(Bw::to_panels(H), args.plan.unit_groups, member.first, member.last);
    const Range own = {min(H, panels.begin * kPanel<T>), min(H, panels.end * kPanel<T>)};
    NormWorkspace norm_work{parts + team * count * kParts, nullptr, nullptr};
    if (kNormC) {
      norm_work.parts_c = parts_c + team * count * 2;
      norm_work.dc_normal = dc_normal + team * group_rows * HV;
    }
    this->begin_sequences(work, own);
    int64_t before = 0, before_t = 0;
    for (int64_t s = walk.T - 1; s >= 0; --s) {
      const int64_t t = this->step(s, stream), active = work.rows.at(t);
      if (active == 0 && before == 0) continue;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        this->recurrent_gradient(work, before_t, before, p);
        from_output(work, norm_work, t, active, before, p);
        this->store_h(work, active, before, p);
      }
      member.sync();
      if (kNormC) {
        from_cell(work, norm_work, t, active, own);
        member.sync();
      }
      through_norms(work, norm_work, t, active, own);
      if ((work.run += active) >= UnitSums<T>::kRun) {
        work.sums.flush(kSums, own);
        work.run = 0;
      }
      before = active;
      before_t = t;
      member.sync();
    }
    work.sums.flush(kSums, own);
    this->end_sequences(work, own, panels, before_t, before);
  }

  static T get(const S* p) { return load(p, 1)[0]; }
  const S* scalars(const Around& a) const { return a.saved + Cell::kSaved * all_H; }
  V weight(const void* p, int64_t u, int64_t valid) const {
    return p == nullptr ? V{} : load(static_cast<const S*>(p) + u, valid);
  }

  // One panel: from the gradient of h in the tile to that of the normalised c,
  // or through the cell.
  void from_output(Workspace& work, const NormWorkspace& norm_work, int64_t t, int64_t active, int64_t before,
                   int64_t panel) const {
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
          const T mean = get(scalars(a) + 2 * kGroups), inverse = get(scalars(a) + 2 * kGroups + 1);
          const V c_prev = Bw::at(a.c_prev[0], u, valid);
          const V c = before_zoneout(e, load(a.c[0] + u, valid), Cell::unclipped(saved, e, c_prev));
          const V normal = first_lanes<T>((c - mean) * inverse, valid), gain = weight(w.gain_c, u, valid);
          const V shown = tanh<T>(fma(gain, normal, weight(w.bias_c, u, valid)));
          const auto o = restore<Sigmoid>(e, saved[3]);
          store(dgates_x + this->gates_at(n, work.stream) + 3 * all_H + u, dh * shown * o.slope, valid);
          const V du = first_lanes<T>(dh * o.value * Tanh::slope<typename Cell::Arithmetic>(shown), valid),
                  dnormal = du * gain;
          work.sums.add(4 * kGates, u, du * normal);
          work.sums.add(4 * kGates + 1, u, du);
          store(norm_work.dc_normal + i * HV + u, dnormal);
          V* to = norm_work.parts_c + (u / kWidth * group_rows + i) * 2;
          to[0] = dnormal;
          to[1] = dnormal * normal;
          store(work.direct + i * HV + u, kept_h);
        } else {
          const V normal = load(a.saved + (Cell::kValues + kGates + 2) * all_H + u, valid);
          saved[3] = fma(weight(w.gain_hh, 2 * H + u, valid), normal, weight(w.b_hh, 2 * H + u, valid));
          StepGradient<V> step;
          V none[1] = {};
          Cell::backward(saved, e, Bw::at(a.h_prev, u, valid), none, none, dh, none, step);
          store(work.direct + i * HV + u, step.direct + kept_h);
          through_gains(work, norm_work, a, i, n, u, valid, step.x, step.h);
        }
      }
    }
  }

  // Own units: from the gradient of the normalised c through c and the gates.
  void from_cell(Workspace& work, const NormWorkspace& norm_work, int64_t t, int64_t active, Range own) const {
    if constexpr (kNormC) {
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        const Around a = this->around(work, t, i, n);
        const T mean = get(scalars(a) + 2 * kGroups), inverse = get(scalars(a) + 2 * kGroups + 1);
        V sum = {}, sum_normal = {};
        for (int64_t p = 0; p < vectors(); ++p) {
          sum += norm_work.parts_c[(p * group_rows + i) * 2];
          sum_normal += norm_work.parts_c[(p * group_rows + i) * 2 + 1];
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
          dc = fma(load(norm_work.dc_normal + i * HV + u) - mean_d - normal * mean_dn, broadcast(inverse), dc);
          Cell::backward(saved, e, c_prev, dc, d);
          d[3] = load(dgates_x + this->gates_at(n, work.stream) + 3 * all_H + u, valid);
          store(work.dc[0] + i * HV + u, a.restarts ? V{} : dc + kept_c);
          through_gains(work, norm_work, a, i, n, u, valid, d, d);
        }
      }
    }
  }

  // Adds the gradients of gains and biases, and stores the gradients of the
  // normalised products and their sums.
  SEQKERNELS_INLINE void through_gains(Workspace& work, const NormWorkspace& norm_work, const Around& a, int64_t i,
                                       int64_t n, int64_t u, int64_t valid, const V* dx, const V* dh) const {
    const Weights& w = this->weights(work.stream);
    V* to = norm_work.parts + (u / kWidth * group_rows + i) * kParts;
    for (int k = 0; k < kParts; ++k) to[k] = V{};
    const int64_t gates = this->gates_at(n, work.stream) + u;
    for (int g = 0; g < kGates; ++g) {
      const V normal_x = load(a.saved + (Cell::kValues + g) * all_H + u, valid);
      const V normal_h = load(a.saved + (Cell::kValues + kGates + g) * all_H + u, valid);
      const V of_x = first_lanes<T>(dx[g], valid), of_h = first_lanes<T>(dh[g], valid);
      work.sums.add(g, u, of_x);
      work.sums.add(kGates + g, u, of_h);
      work.sums.add(2 * kGates + g, u, of_x * normal_x);
      work.sums.add(3 * kGates + g, u, of_h * normal_h);
      const V vx = of_x * weight(w.gain_ih, g * H + u, valid), vh = of_h * weight(w.gain_hh, g * H + u, valid);
      V* sums = to + 4 * Cell::group_of(g);
      sums[0] += vx;
      sums[1] = fma(vx, normal_x, sums[1]);
      sums[2] += vh;
      sums[3] = fma(vh, normal_h, sums[3]);
      store(dgates_x + gates + g * all_H, vx, valid);
      store(dgates_h + gates + g * all_H, vh, valid);
    }
  }

  // Own units: from the gradients of the normalised products to those of the
  // products.
  void through_norms(const Workspace& work, const NormWorkspace& norm_work, int64_t t, int64_t active,
                     Range own) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      const Around a = this->around(work, t, i, n);
      T mean[kParts], inverse_x[kGroups], inverse_h[kGroups];
      for (int k = 0; k < kParts; ++k) {
        V sum = {};
        for (int64_t p = 0; p < vectors(); ++p) sum += norm_work.parts[(p * group_rows + i) * kParts + k];
        mean[k] = sum_of_lanes<T>(sum) / (T(H) * T(gates_in<Cell>(k / 4)));
      }
      for (int group = 0; group < kGroups; ++group) {
        inverse_x[group] = get(scalars(a) + group);
        inverse_h[group] = get(scalars(a) + kGroups + group);
      }
      const int64_t gates = this->gates_at(n, work.stream);
      for (int g = 0; g < kGates; ++g) {
        const int group = Cell::group_of(g);
        const T* of = mean + 4 * group;
        for (int64_t u = own.begin; u < own.end; u += kWidth) {
          const int64_t valid = min(kWidth, H - u);
          const V normal_x = load(a.saved + (Cell::kValues + g) * all_H + u, valid);
          const V normal_h = load(a.saved + (Cell::kValues + kGates + g) * all_H + u, valid);
          T *x = dgates_x + gates + g * all_H + u, *h = dgates_h + gates + g * all_H + u;
          store(x, (load(x, valid) - of[0] - normal_x * of[1]) * inverse_x[group], valid);
          store(h, (load(h, valid) - of[2] - normal_h * of[3]) * inverse_h[group], valid);
        }
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
