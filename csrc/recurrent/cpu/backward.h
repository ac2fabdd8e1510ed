// Backward pass of a recurrent layer.
//
// The time loop runs in the opposite direction of forward and stores the
// gradients of the pre-activations in an [N, G * H] buffer. The input gradient
// and all weight gradients are products over that buffer after the loop.
#pragma once

#include "recurrent/cpu/layer.h"
#include "recurrent/cpu/outer.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class Cell>
struct Backward : Layer<Cell> {
  using L = Layer<Cell>;
  using L::args, L::walk, L::D, L::H, L::P, L::all_H, L::all_P, L::projected, L::HV, L::PV, L::group_rows, L::kGates;
  using L::kCells, L::kWidth, L::kOptions, L::masks_h, L::streams;
  using typename L::S;
  using typename L::T;
  using typename L::V;
  static constexpr bool kTwoStages = Cell::kTwoStages;
  static constexpr int kFirstGates = Cell::First::kGates;
  static constexpr int kSums = Cell::kNorm ? 2 * Cell::kNormProducts * kGates + 2 * Cell::kNormC : Cell::kPeepholes;
  static constexpr bool kBiasOfProduct = !Cell::kNorm || Cell::kJointNorm;  // else the bias is a shift after it

  struct Second : Cell::Second {  // without gates in a cell of one stage
    static constexpr int kFactors = Cell::kFactors;
    static constexpr bool kInner = Cell::kInner;
  };

  const BackwardArgs& grad;
  Teams teams;
  const int64_t G = kGates * all_H;
  const int64_t tile_height = group_rows > kChunkRows ? group_rows : kChunkRows;
  T *packed_ih, *packed_hh, *packed_second, *packed_hr;
  T *dgates_x, *dgates_h;        // [directions, N, G] gradients of the two products;
                                 // one buffer where they are the same
  T *dinner_gates, *q_rows;      // two stages: [directions, N, 4 * H] gradients of
                                 // inner gates, [directions, N, kFactors * H] q
  T *dh_rows, *m_rows;           // projected: [directions, N, P] gradient of h,
                                 // [directions, N, H] h before the projection
  T* recurrent_rows;             // [directions, N, P] masked h, under variational dropout
  T* dc[Cell::kCellArray] = {};  // [teams, group_rows, HV] each
  T* direct;                     // the same
  T* sums;                       // [teams] UnitSums of the gradients of peepholes or, with
                                 // normalisation, of biases and gains
  T* tiles;                      // [threads, kTiles, tile_height, kPanel]
  const S** h_prev;              // [directions, N] address of the h before each row; null
                                 // for zeros
  OuterProduct<T> outer;
  static constexpr int kTiles = Second::kFactors > 1 ? Second::kFactors : 1;

  explicit Backward(const BackwardArgs& a) : L{a}, grad(a), teams{a, Cell::kJointNorm ? a.heads : 1} {}

  const Weights& weights(int64_t stream) const { return args.weights[this->direction(stream)]; }
  static const S* typed(const void* p) { return static_cast<const S*>(p); }

  Operand<S> ih(int64_t d) const { return {typed(args.weights[d].w_ih), G, D, {D, kPlainVectors}, Side::kAsIs}; }
  // Recurrent weights of the first stage; with several heads one segment per
  // gate, since the rows of a head are apart.
  int64_t segments() const { return args.heads > 1 ? kFirstGates : 1; }
  Operand<S> hh(int64_t stream, int64_t segment) const {
    const S* w = typed(weights(stream).w_hh) + (segment * all_H + this->unit0(stream)) * P;
    return {w, args.heads > 1 ? H : kFirstGates * H, P, {P, kPlainVectors}, Side::kAsIs};
  }
  Operand<S> second(int64_t stream, int factor) const {
    const Weights& w = weights(stream);
    const S* of = Second::kInner ? typed(factor == 0 ? w.inner_ih : w.inner_hh)
                                 : typed(w.w_hh) + (Second::kGate * all_H + this->unit0(stream)) * P;
    return {of, Second::kGates * H, H, {H, kPlainVectors}, Side::kAsIs};
  }
  Operand<S> hr(int64_t stream) const { return {typed(weights(stream).w_hr), P, H, {H, kPlainVectors}, Side::kAsIs}; }

  T* packed_hh_of(int64_t stream, int64_t segment) const {
    return packed_hh + (stream * segments() + segment) * hh(stream, segment).packed_size();
  }
  T* packed_second_of(int64_t stream, int factor) const {
    return packed_second + (stream * Second::kFactors + factor) * second(stream, factor).packed_size();
  }
  T* packed_hr_of(int64_t stream) const { return packed_hr + stream * hr(stream).packed_size(); }

  static int64_t to_panels(int64_t columns) { return ceil_div(columns, kPanel<T>); }
  int64_t outer_panels() const {
    int64_t most = to_panels(D) + to_panels(P);
    const auto cover = [&most](int64_t panels) { most = panels > most ? panels : most; };
    if (projected) cover(to_panels(H));
    if (Second::kFactors > 0) cover(to_panels(D) + Second::kFactors * to_panels(H));
    return most;
  }
  int64_t outer_columns() const {
    int64_t most = projected && P > G ? P : G;
    if (Second::kInner && Second::kGates * H > most) most = Second::kGates * H;
    return ceil_div(args.directions * most, teams.shares());
  }

  void carve(Arena& arena) {
    const int64_t tokens = args.directions * walk.N, state = teams.count() * group_rows * HV;
    packed_ih = grad.dx != nullptr ? arena.take<T>(args.directions * ih(0).packed_size()) : nullptr;
    packed_hh = arena.take<T>(streams * segments() * hh(0, 0).packed_size());
    packed_second = kTwoStages ? arena.take<T>(streams * Second::kFactors * second(0, 0).packed_size()) : nullptr;
    packed_hr = projected ? arena.take<T>(streams * hr(0).packed_size()) : nullptr;
    dgates_x = arena.take<T>(tokens * G);
    dgates_h = Cell::kSeparate ? arena.take<T>(tokens * G) : dgates_x;
    dinner_gates = Second::kInner ? arena.take<T>(tokens * Second::kGates * H) : nullptr;
    q_rows = kTwoStages ? arena.take<T>(tokens * Second::kFactors * all_H) : nullptr;
    dh_rows = projected ? arena.take<T>(tokens * P) : nullptr;
    m_rows = projected ? arena.take<T>(tokens * H) : nullptr;
    recurrent_rows = masks_h ? arena.take<T>(tokens * all_P) : nullptr;
    for (int k = 0; k < kCells; ++k) dc[k] = arena.take<T>(state);
    direct = Cell::kDirect ? arena.take<T>(state) : nullptr;
    sums = kSums > 0 && kOptions ? arena.take<T>(teams.count() * UnitSums<T>::size(kSums, HV)) : nullptr;
    tiles = arena.take<T>(teams.threads * kTiles * tile_height * kPanel<T>);
    h_prev = arena.take<const S*>(tokens);
    all_shares = arena.take<Share>(teams.threads * args.plan.unit_groups);
    teams.carve(arena);
    if (grad.weights_wanted) OuterProduct<T>::measure(arena, teams.threads, outer_columns(), outer_panels(), outer);
  }

  void run(int64_t thread) {
    teams.run_all(0, thread, [&](int64_t share) { prepare(share); });
    teams.each(thread, [&](Team& team) { run_sequences(team, thread); });
    teams.run_all(teams.phase_after_teams(), thread, [&](int64_t share) { finish(share, thread); });
  }

  __attribute__((noinline)) void prepare(int64_t part) {
    const int64_t all = teams.shares();
    const auto pack = [&](const Operand<S>& operand, T* packed) {
      const Range mine = share(operand.panels(), all, part, part + 1);
      operand.pack_panels(mine.begin, mine.end, packed);
    };
    const bool returns = walk.T > 1 || grad.dh0 != nullptr;  // some h before the row gets a gradient
    for (int64_t stream = 0; stream < streams; ++stream) {
      for (int64_t segment = 0; returns && segment < segments(); ++segment) {
        pack(hh(stream, segment), packed_hh_of(stream, segment));
      }
      for (int f = 0; f < Second::kFactors; ++f) pack(second(stream, f), packed_second_of(stream, f));
      if (projected) pack(hr(stream), packed_hr_of(stream));
    }
    for (int64_t d = 0; d < args.directions; ++d) {
      if (grad.dx != nullptr) pack(ih(d), packed_ih + d * ih(d).packed_size());
      find_previous(d, share(walk.T, all, part, part + 1));
    }
  }

  __attribute__((noinline)) void finish(int64_t part, int64_t thread) const {
    if (grad.dx != nullptr) input_gradient(share(walk.N, teams.shares(), part, part + 1), tile_of(thread, 0));
    if (grad.weights_wanted) weight_gradients(part, thread);
  }

  T* tile_of(int64_t thread, int which) const { return tiles + (thread * kTiles + which) * tile_height * kPanel<T>; }

  // Null if the states are zero: no initial states were given, or after a
  // reset.
  const S* before(const void* every, int64_t every_at_row, const void* initial, int64_t initial_at,
                  Previous what) const {
    switch (what) {
      case Previous::kRow:
        return typed(every) + every_at_row;
      case Previous::kInitial:
        return initial == nullptr ? nullptr : typed(initial) + initial_at;
      default:
        return nullptr;
    }
  }

  void find_previous(int64_t d, Range steps) {
    const int64_t stream = d * args.heads;  // the first of the direction
    for (int64_t t = steps.begin; t < steps.end; ++t) {
      for (int64_t j = 0; j < walk.batch_sizes[t]; ++j) {
        int64_t row = 0;
        const Previous what = previous_row(args, d, t, j, row);
        const int64_t n = walk.offsets[t] + j, initial = this->h_at(stream, walk.sequence[j]);
        const S* h = before(grad.y, what == Previous::kRow ? this->y_at(row, stream) : 0, args.h0, initial, what);
        h_prev[d * walk.N + n] = h;
        if (!masks_h) continue;
        const S* mask = typed(args.options.variational) + initial;
        T* to = recurrent_rows + (d * walk.N + n) * all_P;
        for (int64_t u = 0; u < all_P; u += kWidth) {
          const int64_t valid = min(kWidth, all_P - u);
          store(to + u, h == nullptr ? V{} : load(h + u, valid) * load(mask + u, valid), valid);
        }
      }
    }
  }

  // Workspace of a thread in a team.
  struct Workspace {
    int64_t stream;
    Rows rows;
    T *dc[Cell::kCellArray], *direct;  // of the team
    UnitSums<T> sums;
    T* tile[kTiles];
    int64_t run;  // rows summed since the last flush
  };

  // A share of a team: panels of hidden units, those units, and panels of outputs.
  struct Share {
    Range panels, own, own_p;
  };
  Share share_of(int64_t part) const {
    const int64_t parts = args.plan.unit_groups;
    const Range panels = share(to_panels(H), parts, part, part + 1);
    return {panels,
            {min(H, panels.begin * kPanel<T>), min(H, panels.end * kPanel<T>)},
            share(to_panels(P), parts, part, part + 1)};
  }
  Share* all_shares;  // [threads, unit_groups]

  // A step: its time and rows, and those of the step processed before.
  struct Step {
    int64_t t, active, before_t, before;
  };

  void run_sequences(Team& team, int64_t thread) {
    Workspace work = workspace_of(team.stream, team.group, thread);
    Share* const shares = all_shares + thread * args.plan.unit_groups;
    for (int64_t part = 0; part < args.plan.unit_groups; ++part) shares[part] = share_of(part);
    team.run([&](int64_t part) { begin_sequences(work, shares[part].own); });
    Step step{0, 0, 0, 0};
    for (int64_t s = walk.T - 1; s >= 0; --s) {
      step.t = this->step(s, work.stream);
      step.active = work.rows.at(step.t);
      if (step.active == 0 && step.before == 0) continue;
      const bool flushes = sums != nullptr && (work.run += step.active) >= UnitSums<T>::kRun;
      team.run([&](int64_t part) { second_stage(work, shares[part], step, flushes); });
      if (projected) team.run([&](int64_t part) { through_projection(work, shares[part], step, flushes); });
      if constexpr (kTwoStages) {
        team.run([&](int64_t part) { first_stage(work, shares[part], step); });
      }
      if (flushes) work.run = 0;
      step.before = step.active;
      step.before_t = step.t;
    }
    team.run(
        [&](int64_t part) { end_sequences(work, shares[part].own, shares[part].own_p, step.before_t, step.before); });
  }

  // The phases of a step, for one share.

  __attribute__((noinline)) void second_stage(Workspace& work, const Share& its, const Step& step, bool flushes) const {
    for (int64_t p = its.own_p.begin; p < its.own_p.end; ++p) {
      recurrent_gradient(work, step.before_t, step.before, p);
      if (projected) {
        output_gradient(work, step.t, step.active, step.before, p);
      } else {
        cells(work, step.t, step.active, step.before, p);
      }
      store_h(work, step.active, step.before, p);
    }
    if (flushes && !projected) work.sums.flush(kSums, its.own);
  }

  __attribute__((noinline)) void through_projection(Workspace& work, const Share& its, const Step& step,
                                                    bool flushes) const {
    for (int64_t p = its.panels.begin; p < its.panels.end; ++p) {
      const T* dh = dh_rows + (work.stream * walk.N + work.rows.packed(step.t, 0)) * P;
      panel_product(hr(work.stream), packed_hr_of(work.stream), nullptr, p, step.active, dh, work.rows.groups * P,
                    work.tile[0], kPanel<T>, Into::kReplace);
      cells(work, step.t, step.active, step.active, p);
    }
    if (flushes) work.sums.flush(kSums, its.own);
  }

  __attribute__((noinline)) void first_stage(Workspace& work, const Share& its, const Step& step) const {
    for (int64_t p = its.panels.begin; p < its.panels.end; ++p) {
      for (int f = 0; f < Second::kFactors; ++f) second_product(work, step.t, step.active, p, f);
      first_cells(work, step.t, step.active, p);
    }
  }

  Workspace workspace_of(int64_t stream, int64_t group, int64_t thread) const {
    const int64_t team = stream * args.plan.row_groups + group;
    const auto of_team = [team](T* all, int64_t size) { return all == nullptr ? nullptr : all + team * size; };
    const int64_t state = group_rows * HV;
    Workspace work{stream, {walk, args.plan.row_groups, group}, {}, of_team(direct, state), {}, {}, 0};
    for (int k = 0; k < kCells; ++k) work.dc[k] = of_team(dc[k], state);
    if (sums != nullptr) work.sums = sums_of(team);
    for (int i = 0; i < kTiles; ++i) work.tile[i] = tile_of(thread, i);
    return work;
  }

  // The gradients of the last states.
  void begin_sequences(const Workspace& work, Range own) const {
    if (sums != nullptr) work.sums.clear(kSums, own);
    for (int64_t i = 0; i < work.rows.all(); ++i) {
      for (int k = 0; k < kCells; ++k) {
        start(grad.dc_n[k], work.stream, work.rows.sequence(i), own, work.dc[k] + i * HV);
      }
    }
  }

  // The gradients of the initial states.
  void end_sequences(const Workspace& work, Range own, Range own_p, int64_t before_t, int64_t before) const {
    if (sums != nullptr) work.sums.flush(kSums, own);
    const int64_t stream = work.stream;
    const Rows& rows = work.rows;
    for (int64_t p = own_p.begin; p < own_p.end && grad.dh0 != nullptr; ++p) {
      recurrent_gradient(work, before_t, before, p);
      store_h(work, 0, before, p);
    }
    for (int64_t i = 0; i < rows.all(); ++i) {
      const int64_t b = rows.sequence(i);
      const auto write = [&](void* to, const T* from) {
        if (to != nullptr) {
          convert(static_cast<S*>(to) + this->c_at(stream, b) + own.begin, from + i * HV + own.begin, own.size());
        }
      };
      for (int k = 0; k < kCells; ++k) write(grad.dc0[k], work.dc[k]);
      if (grad.dh0 == nullptr || (walk.T > 0 && i < rows.at(0))) continue;
      for (int64_t u = min(P, own_p.begin * kPanel<T>); u < min(P, own_p.end * kPanel<T>); ++u) {  // length zero
        const int64_t at = this->h_at(stream, b) + u;
        const S zero{};
        static_cast<S*>(grad.dh0)[at] = grad.dh_n != nullptr ? typed(grad.dh_n)[at] : zero;
      }
    }
  }

  void start(const void* from, int64_t stream, int64_t b, Range own, T* to) const {
    for (int64_t u = own.begin; u < own.end; u += kWidth) {
      const int64_t valid = min(kWidth, own.end - u);
      store(to + u, from == nullptr ? V{} : load(typed(from) + this->c_at(stream, b) + u, valid));
    }
  }

  // One panel of the gradient of the h before the step processed last: dgates
  // W_hh plus the direct part.
  void recurrent_gradient(const Workspace& work, int64_t before_t, int64_t before, int64_t panel) const {
    if (before == 0) return;
    const int64_t lda = work.rows.groups * G;
    const T* from = dgates_h + this->gates_at(work.rows.packed(before_t, 0), work.stream);
    T* tile = work.tile[0];
    for (int64_t k = 0; k < segments(); ++k) {
      panel_product(hh(work.stream, k), packed_hh_of(work.stream, k), nullptr, panel, before, from + k * all_H, lda,
                    tile, kPanel<T>, k == 0 ? Into::kReplace : Into::kAdd);
    }
    if (!kOptions && !Cell::kDirect) return;
    for (int64_t i = 0; i < before; ++i) {
      T* row = tile + i * kPanel<T>;
      if (this->restarts(work.stream, before_t, work.rows.group + i * work.rows.groups)) {
        memset(row, 0, kPanel<T> * sizeof(T));
        continue;
      }
      const S* mask =
          masks_h ? typed(args.options.variational) + this->h_at(work.stream, work.rows.sequence(i)) : nullptr;
      for (int64_t c = 0; c < kPanel<T>; c += kWidth) {
        const int64_t u = panel * kPanel<T> + c;
        if (u >= P) break;
        V value = load(row + c);
        if (masks_h) value = value * load(mask + u, min(kWidth, P - u));
        if (Cell::kDirect && !projected) value = value + load(work.direct + i * HV + u);
        store(row + c, value);
      }
    }
  }

  // Gradient of h at (t, i) for a vector of units: from the following step or
  // h_n, plus dy.
  V gradient_of_h(const Workspace& work, int64_t n, int64_t i, int64_t before, int64_t u, int64_t valid,
                  const T* from) const {
    V dh = {};
    if (i < before) {
      dh = load(from);
    } else if (grad.dh_n != nullptr) {
      dh = load(typed(grad.dh_n) + this->h_at(work.stream, work.rows.sequence(i)) + u, valid);
    }
    if (grad.dy != nullptr) dh += load(typed(grad.dy) + this->y_at(n, work.stream) + u, valid);
    return dh;
  }

  void output_gradient(const Workspace& work, int64_t t, int64_t active, int64_t before, int64_t panel) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, P - u);
        if (valid <= 0) break;
        const V dh = gradient_of_h(work, n, i, before, u, valid, work.tile[0] + i * kPanel<T> + v * kWidth);
        store(dh_rows + (work.stream * walk.N + n) * P + u, dh, valid);
      }
    }
  }

  // Addresses of the states around a token.
  struct Around {
    const S *saved, *y, *h_prev, *c[Cell::kCellArray], *c_prev[Cell::kCellArray];
    int64_t cell;  // offset in the cells at every step
    bool restarts;
  };
  Around around(const Workspace& work, int64_t t, int64_t i, int64_t n) const {
    const int64_t stream = work.stream, d = this->direction(stream), j = work.rows.group + i * work.rows.groups;
    Around a{};
    a.cell = this->cell_at(n, stream);
    a.saved = typed(grad.saved) + this->saved_at(n, stream);
    a.y = typed(grad.y) + this->y_at(n, stream);
    a.h_prev = h_prev[d * walk.N + n];
    if (a.h_prev != nullptr) a.h_prev += stream % args.heads * P;
    int64_t row = 0;
    const Previous what = previous_row(args, d, t, j, row);
    a.restarts = what == Previous::kReset;
    for (int k = 0; k < kCells; ++k) {
      const int64_t every = what == Previous::kRow ? this->cell_at(row, stream) : 0;
      a.c[k] = typed(grad.cells[k]) + a.cell;
      a.c_prev[k] = before(grad.cells[k], every, args.c0[k], this->c_at(stream, walk.sequence[j]), what);
    }
    return a;
  }
  static V at(const S* row, int64_t u, int64_t valid) { return row == nullptr ? V{} : load(row + u, valid); }

  // Backward of the cell, or of its second stage, on one panel of units.
  // tile[0] holds the gradient of h.
  void cells(Workspace& work, int64_t t, int64_t active, int64_t before, int64_t panel) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      const Around a = around(work, t, i, n);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, H - u);
        if (valid <= 0) break;
        const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
        const T* from = work.tile[0] + i * kPanel<T> + v * kWidth;
        V dh = projected ? load(from) : gradient_of_h(work, n, i, before, u, valid, from);
        constexpr int kArray = Cell::kCellArray;
        V saved[Cell::kSaved + 1], c[kArray] = {}, c_prev[kArray] = {}, dc_now[kArray] = {}, h_before = {}, kept_h = {};
        for (int k = 0; k < Cell::kSaved; ++k) {
          saved[k] = Cell::kStored ? load(a.saved + k * all_H + u, valid) : load(a.y + u, valid);
        }
        for (int k = 0; k < kCells; ++k) {
          c[k] = load(a.c[k] + u, valid);
          c_prev[k] = at(a.c_prev[k], u, valid);
          dc_now[k] = load(work.dc[k] + i * HV + u);
          if (grad.dcells[k] != nullptr) dc_now[k] += load(typed(grad.dcells[k]) + a.cell + u, valid);
        }
        if (Cell::kReadsH) h_before = at(a.h_prev, u, valid);
        if constexpr (kOptions) {
          kept_h = dh * e.zoneout_h;
          dh = dh - kept_h;
        }
        V direct_vector;
        const int64_t gates = this->gates_at(n, work.stream) + u;
        if constexpr (kTwoStages) {
          V d[kFirstGates] = {}, d_second[Second::kGates];
          Cell::backward_second(saved, e, h_before, c, c_prev, dh, dc_now, d, d_second, direct_vector);
          for (int g = 0; g < kFirstGates; ++g) store(dgates_x + gates + g * all_H, d[g], valid);
          T* to = Second::kInner ? dinner_gates + (work.stream * walk.N + n) * Second::kGates * H + u
                                 : dgates_x + gates + Second::kGate * all_H;
          for (int g = 0; g < Second::kGates; ++g) store(to + g * all_H, d_second[g], valid);
        } else {
          if constexpr (Cell::kProjects) {
            T* to = m_rows + (work.stream * walk.N + n) * H + u;
            if (projected) store(to, Cell::output(saved, e, c[0], c_prev[0]), valid);
          }
          StepGradient<V> step;
          Cell::backward(saved, e, h_before, c, c_prev, dh, dc_now, step);
          for (int g = 0; g < kGates; ++g) {
            store(dgates_x + gates + g * all_H, step.x[g], valid);
            if constexpr (Cell::kSeparate) store(dgates_h + gates + g * all_H, step.h[g], valid);
          }
          if constexpr (Cell::kDirect) direct_vector = step.direct;
          if constexpr (kOptions && Cell::kPeepholes > 0) {
            for (int k = 0; k < Cell::kPeepholes; ++k) work.sums.add(k, u, step.peephole[k]);
          }
        }
        if constexpr (kOptions) {
          direct_vector = direct_vector + kept_h;
          for (int k = 0; k < kCells; ++k) {
            if (a.restarts && !kTwoStages) dc_now[k] = V{};  // with two stages, first_cells resets them
          }
        }
        for (int k = 0; k < kCells; ++k) store(work.dc[k] + i * HV + u, dc_now[k]);
        if constexpr (Cell::kDirect) store(work.direct + i * HV + u, direct_vector);
      }
    }
  }

  // The gradient of q: gradients of the second stage's gates times their
  // weights.
  void second_product(const Workspace& work, int64_t t, int64_t active, int64_t panel, int factor) const {
    const int64_t n = work.rows.packed(t, 0), ld = Second::kInner ? Second::kGates * H : G;
    const T* from = Second::kInner ? dinner_gates + (work.stream * walk.N + n) * ld
                                   : dgates_x + this->gates_at(n, work.stream) + Second::kGate * all_H;
    panel_product(second(work.stream, factor), packed_second_of(work.stream, factor), nullptr, panel, active, from,
                  work.rows.groups * ld, work.tile[factor], kPanel<T>, Into::kReplace);
  }

  void first_cells(const Workspace& work, int64_t t, int64_t active, int64_t panel) const {
    if constexpr (kTwoStages) {
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        const Around a = around(work, t, i, n);
        for (int v = 0; v < kPlainVectors; ++v) {
          const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, H - u);
          if (valid <= 0) break;
          const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
          constexpr int kArray = Cell::kCellArray;
          V saved[Cell::kSavedFirst], d[kFirstGates], dq[Second::kFactors], q[Second::kFactors];
          V c_prev[kArray] = {}, dc_now[kArray] = {};
          for (int k = 0; k < kCells; ++k) {
            c_prev[k] = at(a.c_prev[k], u, valid);
            dc_now[k] = load(work.dc[k] + i * HV + u);
          }
          for (int k = 0; k < Cell::kSavedFirst; ++k) saved[k] = load(a.saved + k * all_H + u, valid);
          for (int f = 0; f < Second::kFactors; ++f) dq[f] = load(work.tile[f] + i * kPanel<T> + v * kWidth);
          T* gates = dgates_x + this->gates_at(n, work.stream) + u;
          for (int g = 0; g < kFirstGates; ++g) d[g] = load(gates + g * all_H, valid);
          V direct_vector = load(work.direct + i * HV + u);
          Cell::backward_first(saved, e, at(a.h_prev, u, valid), c_prev, dq, dc_now, d, direct_vector, q);
          for (int g = 0; g < kFirstGates; ++g) store(gates + g * all_H, d[g], valid);
          T* to = q_rows + (this->direction(work.stream) * walk.N + n) * Second::kFactors * all_H +
                  this->unit0(work.stream) + u;
          for (int f = 0; f < Second::kFactors; ++f) store(to + f * all_H, q[f], valid);
          for (int k = 0; k < kCells; ++k) store(work.dc[k] + i * HV + u, a.restarts ? V{} : dc_now[k]);
          store(work.direct + i * HV + u, direct_vector);
        }
      }
    }
  }

  // Stores the gradient of h0 of sequences whose first step was processed last.
  void store_h(const Workspace& work, int64_t active, int64_t before, int64_t panel) const {
    if (grad.dh0 == nullptr) return;
    const int64_t u = panel * kPanel<T>;
    for (int64_t i = active; i < before; ++i) {
      S* to = static_cast<S*>(grad.dh0) + this->h_at(work.stream, work.rows.sequence(i)) + u;
      convert(to, work.tile[0] + i * kPanel<T>, min(kPanel<T>, P - u));
    }
  }

  // dx = sum over directions of dgates W_ih, for packed rows of a range.
  void input_gradient(Range rows, T* tile) const {
    for (int64_t n = rows.begin; n < rows.end; n += kChunkRows) {
      const int64_t count = min(kChunkRows, rows.end - n);
      for (int64_t p = 0; p < ih(0).panels(); ++p) {
        for (int64_t d = 0; d < args.directions; ++d) {
          panel_product(ih(d), packed_ih + d * ih(d).packed_size(), nullptr, p, count, dgates_x + (d * walk.N + n) * G,
                        G, tile, kPanel<T>, d == 0 ? Into::kReplace : Into::kAdd);
        }
        for (int64_t i = 0; i < count; ++i) {
          convert(static_cast<S*>(grad.dx) + walk.rows[n + i] * D + p * kPanel<T>, tile + i * kPanel<T>,
                  min(kPanel<T>, D - p * kPanel<T>));
        }
      }
    }
  }

  void weight_gradients(int64_t part, int64_t thread) const {
    const int64_t all = teams.shares();
    const OuterProduct<T> product = outer.of(thread, outer_panels());
    for (int64_t d = 0; d < args.directions; ++d) {
      const auto mine = [&](int64_t columns) {
        return within(share(args.directions * columns, all, part, part + 1), d * columns, columns);
      };
      gate_weights(product, d, mine(G));
      if (Second::kInner) inner_weights(product, d, mine(Second::kGates * H));
      if (projected) projection_weights(product, d, mine(P));
    }
    if (part == 0 && sums != nullptr) write_unit_sums();
  }

  // Gradients of rows m of W_ih and W_hh and of the biases. With several heads
  // or two stages the right operand of W_hh differs by gate.
  void gate_weights(const OuterProduct<T>& product, int64_t d, Range m) const {
    if (m.size() <= 0) return;
    const WeightGradients& dw = grad.dw[d];
    const bool none = walk.N == 0;
    const auto x = RightOperand{D, 0, [&](int64_t n) { return typed(args.x) + walk.x_offsets[n]; }};
    const T *of_x = dgates_x + d * walk.N * G, *of_h = dgates_h + d * walk.N * G;
    const auto write_x = [&](Range part) {
      if (kBiasOfProduct) product.write_sums(static_cast<S*>(dw.b_ih), part, none);
      product.write(static_cast<S*>(dw.w_ih), D, part, 0, none);
    };
    const auto write_h = [&](Range part) {
      if (kBiasOfProduct) product.write_sums(static_cast<S*>(dw.b_hh), part, none);
      product.write(static_cast<S*>(dw.w_hh), P, part, to_panels(D), none);
    };
    if (Cell::kSeparate) {
      product.accumulate(of_x, G, m, walk.N, x);
      write_x(m);
    }
    const bool apart = kTwoStages || args.heads > 1;
    for (Range part = m; part.begin < m.end; part = {part.end, m.end}) {
      const int64_t unit = part.begin % all_H, gate = part.begin / all_H;
      const int64_t head = unit / H, left = apart ? H - unit % H : m.end - part.begin;
      part.end = min(m.end, part.begin + left);
      const auto with = [&](auto row) {
        const auto right = RightOperand{P, to_panels(D), row};
        if constexpr (Cell::kSeparate) {
          product.accumulate(of_h, G, part, walk.N, right);
        } else {
          product.accumulate(of_h, G, part, walk.N, x, right);
          write_x(part);
        }
        write_h(part);
      };
      if (kTwoStages && !Second::kInner && gate >= Second::kGate) {
        with([&](int64_t n) -> const T* { return q_rows + (d * walk.N + n) * Second::kFactors * all_H + head * H; });
      } else if (masks_h) {
        with([&](int64_t n) -> const T* { return recurrent_rows + (d * walk.N + n) * all_P + head * P; });
      } else {
        with([&](int64_t n) -> const S* {
          const S* row = h_prev[d * walk.N + n];
          return row == nullptr ? nullptr : row + head * P;
        });
      }
    }
  }

  void inner_weights(const OuterProduct<T>& product, int64_t d, Range m) const {
    if (m.size() <= 0) return;
    const WeightGradients& dw = grad.dw[d];
    const bool none = walk.N == 0;
    const T* rows = q_rows + d * walk.N * Second::kFactors * all_H;
    const auto a = RightOperand{H, 0, [&](int64_t n) { return rows + n * Second::kFactors * all_H; }};
    const auto b =
        RightOperand{H, to_panels(H), [&](int64_t n) { return rows + n * Second::kFactors * all_H + all_H; }};
    product.accumulate(dinner_gates + d * walk.N * Second::kGates * H, Second::kGates * H, m, walk.N, a, b);
    product.write_sums(static_cast<S*>(dw.inner_b_ih), m, none);
    product.write_sums(static_cast<S*>(dw.inner_b_hh), m, none);
    product.write(static_cast<S*>(dw.inner_ih), H, m, 0, none);
    product.write(static_cast<S*>(dw.inner_hh), H, m, to_panels(H), none);
  }

  void projection_weights(const OuterProduct<T>& product, int64_t d, Range m) const {
    if (m.size() <= 0) return;
    const auto output = RightOperand{H, 0, [&](int64_t n) -> const T* { return m_rows + (d * walk.N + n) * H; }};
    product.accumulate(dh_rows + d * walk.N * P, P, m, walk.N, output);
    product.write(static_cast<S*>(grad.dw[d].w_hr), H, m, 0, walk.N == 0);
  }

  UnitSums<T> sums_of(int64_t team) const {
    return UnitSums<T>::at(sums + team * UnitSums<T>::size(kSums, HV), kSums, HV);
  }

  void write_unit_sums() const {
    for (int64_t stream = 0; stream < streams; ++stream) {
      const WeightGradients& dw = grad.dw[this->direction(stream)];
      int next = 0;
      const auto write = [&](void* to, int vectors) {
        for (int k = 0; k < vectors; ++k, ++next) {
          for (int64_t u = 0; u < H && to != nullptr; u += kWidth) {
            V sum = {};
            for (int64_t group = 0; group < args.plan.row_groups; ++group) {
              sum += load(sums_of(stream * args.plan.row_groups + group).total + next * HV + u);
            }
            store(static_cast<S*>(to) + k * all_H + this->unit0(stream) + u, sum, min(kWidth, H - u));
          }
        }
      };
      if constexpr (Cell::kJointNorm) {
        for (void* const of_gates : {dw.norm_bias, dw.norm_weight}) write(of_gates, kGates);
      } else if constexpr (Cell::kNorm) {
        for (void* const of_gates : {dw.b_ih, dw.b_hh, dw.gain_ih, dw.gain_hh}) write(of_gates, kGates);
        if constexpr (Cell::kNormC) {
          write(dw.gain_c, 1);
          write(dw.bias_c, 1);
        }
      } else {
        write(dw.peephole, Cell::kPeepholes);
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
