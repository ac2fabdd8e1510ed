// A recurrent layer forward.
//
// A thread walks the whole sequence. Time is taken in chunks of rows: the input's share of the gates is one product for
// a chunk (it stays in the second-level cache), then each step adds h W_hh^T panel by panel and runs the cell on the
// panel while it is hot. A cell of two stages makes its second product once all units have done the first, and a
// projection follows the same way.
#pragma once

#include "recurrent/cells.h"

namespace seqkernels::SEQKERNELS_ISA {

// The weights of one stage of a cell, packed, for all strands: gates [Of::kGate, Of::kGate + Of::kGates) of W_ih and of
// kFactors matrices of the recurrent product. inner: that they are the inner weights, without a share of the input.
template <class Cell, class Of, int kFactors, bool kInner>
struct Stage {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kGates = Of::kGates, kUnits = Of::kUnits, kVectors = kUnits * kGates;
  static constexpr int64_t kWidth = kLanes<T>, kWidthOfPanel = kPanel<T, kVectors>, kPanelUnits = kUnits * kWidth;

  const Layer<Cell>& layer;
  const bool pack_first;  // weights used for one step only are packed as they are used, not beforehand
  T *packed_x = nullptr, *packed_h[kFactors] = {}, *bias_x = nullptr, *bias_h = nullptr;

  Stage(const Layer<Cell>& of, bool pack) : layer(of), pack_first(pack) {}

  Columns columns() const { return {layer.H, kUnits, layer.all_H}; }
  int64_t panels() const { return columns().template panels<T>(); }
  int64_t row0(int64_t strand) const { return Of::kGate * layer.all_H + layer.unit0(strand); }
  const Weights& weights(int64_t strand) const { return layer.args.weights[layer.direction(strand)]; }

  Operand<S, kVectors> of_x(int64_t strand) const {
    const S* w = static_cast<const S*>(weights(strand).w_ih);
    return {w + row0(strand) * layer.D, layer.D, layer.D, columns(), Side::kRowsAreColumns};
  }
  Operand<S, kVectors> of_h(int64_t strand, int factor) const {
    const Weights& all = weights(strand);
    const void* w = !kInner ? all.w_hh : factor == 0 ? all.inner_ih : all.inner_hh;
    const int64_t depth = kInner ? layer.H : layer.P;
    return {static_cast<const S*>(w) + row0(strand) * depth, depth, depth, columns(), Side::kRowsAreColumns};
  }
  int64_t x_size() const { return panels() * layer.D * kWidthOfPanel; }
  int64_t h_size() const { return panels() * (kInner ? layer.H : layer.P) * kWidthOfPanel; }

  void carve(Arena& arena) {
    if (pack_first) {
      if (!kInner) packed_x = arena.take<T>(layer.strands * x_size());
      for (int f = 0; f < kFactors; ++f) packed_h[f] = arena.take<T>(layer.strands * h_size());
    }
    bias_x = arena.take<T>(layer.strands * panels() * kWidthOfPanel);
    bias_h = arena.take<T>(layer.strands * panels() * kWidthOfPanel);
  }

  void pack(int64_t strand, Range range) const {
    pack_bias(strand, range);
    if (!pack_first) return;
    if (!kInner) of_x(strand).pack_panels(range.begin, range.end, packed_x + strand * x_size());
    for (int f = 0; f < kFactors; ++f) {
      of_h(strand, f).pack_panels(range.begin, range.end, packed_h[f] + strand * h_size());
    }
  }

  // Both biases where the cell tells the products apart, else their sum beside the product with h.
  void pack_bias(int64_t strand, Range range) const {
    const Weights& w = weights(strand);
    const S* b_ih = static_cast<const S*>(kInner ? w.inner_b_ih : w.b_ih);
    const S* b_hh = static_cast<const S*>(kInner ? w.inner_b_hh : w.b_hh);
    for (int64_t p = range.begin; p < range.end; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t n = columns().template valid<T>(p, v), at = (strand * panels() + p) * kWidthOfPanel + v * kWidth;
        const int64_t first = row0(strand) + columns().template first<T>(p, v);
        V of_x = {}, of_h = {};
        if (b_ih != nullptr && n > 0) {
          of_x = load(b_ih + first, n);
          of_h = load(b_hh + first, n);
        }
        store(bias_x + at, of_x);
        store(bias_h + at, Cell::kSeparate ? of_h : of_x + of_h);
      }
    }
  }

  void product_x(int64_t strand, int64_t panel, int64_t rows, const T* x, T* scratch, T* to) const {
    const T* packed = pack_first ? packed_x + strand * x_size() : nullptr;
    panel_product(of_x(strand), packed, scratch, panel, rows, x, layer.D, to, kWidthOfPanel, Into::kReplace);
  }
  void product_h(int64_t strand, int factor, int64_t panel, int64_t rows, const T* h, int64_t ld, T* scratch, T* to,
                 Into into) const {
    const T* packed = pack_first ? packed_h[factor] + strand * h_size() : nullptr;
    panel_product(of_h(strand, factor), packed, scratch, panel, rows, h, ld, to, kWidthOfPanel, into);
  }

  // The two products with their biases, of the unit-th vector of units of a panel of one row. Null: zero.
  SEQKERNELS_INLINE void gates(int64_t strand, int64_t panel, int unit, const T* from_x, const T* from_h, V* x,
                               V* h) const {
    const int64_t bias = (strand * panels() + panel) * kWidthOfPanel;
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = (g * kUnits + unit) * kWidth;
      if (!kInner) {
        x[g] = load(from_x + at);
        if (Cell::kSeparate) x[g] += load(bias_x + bias + at);
      }
      h[g] = load(bias_h + bias + at);
      if (from_h != nullptr) h[g] += load(from_h + at);
    }
  }

  Range share_of(const Member& member) const {
    return share(panels(), layer.args.plan.unit_groups, member.first, member.last);
  }
  Range units_of(Range range) const {
    return {min(layer.H, range.begin * kPanelUnits), min(layer.H, range.end * kPanelUnits)};
  }
  int64_t member_panels() const { return ceil_div(panels(), layer.args.plan.unit_groups); }
};

template <class Cell, bool kTwo = Cell::kTwoStages>
struct SecondStage {
  static constexpr int64_t kWidthOfPanel = 0;
  SecondStage(const Layer<Cell>&, bool) {}
  void carve(Arena&) {}
};
template <class Cell>
struct SecondStage<Cell, true> : Stage<Cell, typename Cell::Second, Cell::kFactors, Cell::kSecondIsInner> {
  using Stage<Cell, typename Cell::Second, Cell::kFactors, Cell::kSecondIsInner>::Stage;
};

// What a member works with: its team's states and its own buffers.
template <class T>
struct Desk {
  int64_t strand;
  Rows rows;
  T *h = nullptr, *h_next = nullptr;      // [rows, PV]
  T *fed = nullptr, *fed_next = nullptr;  // what the products see: h, unless a mask is on it
  T *c = nullptr, *s = nullptr;           // [rows, HV]
  T* m = nullptr;                         // [rows, HV] before the projection
  T *q = nullptr, *carried = nullptr;     // between the stages: [rows, kFactors * HV], [rows, kCarried * HV]
  T *x_chunk = nullptr, *from_x = nullptr, *from_x2 = nullptr, *from_h = nullptr, *scratch = nullptr;
};

template <class Cell>
struct Forward : Layer<Cell> {
  using L = Layer<Cell>;
  using L::args, L::walk, L::D, L::H, L::P, L::all_H, L::projected, L::HV, L::PV, L::group_rows, L::kGates, L::kWidth;
  using L::kOptions, L::masks_h, L::strands;
  using typename L::S;
  using typename L::T;
  using typename L::V;
  using FirstStage = Stage<Cell, typename Cell::First, 1, false>;
  static constexpr int64_t kWide1 = FirstStage::kWidthOfPanel, kWide2 = SecondStage<Cell>::kWidthOfPanel;
  static constexpr int64_t kWidest12 = kWide1 > kWide2 ? kWide1 : kWide2;
  static constexpr int64_t kWidest = kWidest12 > kPanel<T> ? kWidest12 : kPanel<T>;
  static constexpr bool kHasC = Cell::kStates > 1, kHasS = Cell::kStates > 2;

  const ForwardArgs& out;
  Teams teams;
  const bool pack_first = walk.T > 1;
  const int64_t chunk_rows = group_rows > kChunkRows ? group_rows : min(kChunkRows, walk.N);
  FirstStage first;
  SecondStage<Cell> second;
  T *packed_hr, *states, *x_rows, *products;
  int64_t team_size, member_size;  // of states and products

  explicit Forward(const ForwardArgs& a)
      : L{a}, out(a), teams{a}, first(*this, walk.T > 1), second(*this, walk.T > 1) {}

  Operand<S> hr(int64_t strand) const {
    const S* w = static_cast<const S*>(args.weights[this->direction(strand)].w_hr);
    return {w, H, H, {P, kPlainVectors}, Side::kRowsAreColumns};
  }

  void carve(Arena& arena) {
    first.carve(arena);
    second.carve(arena);
    packed_hr = pack_first && projected ? arena.take<T>(strands * hr(0).packed_size()) : nullptr;
    Desk<T> desk{0, {walk, 1, 0}};
    Arena team, member;
    states_of(team, desk);
    products_of(member, desk);
    team_size = reinterpret_cast<int64_t>(team.at) / int64_t{sizeof(T)};
    member_size = reinterpret_cast<int64_t>(member.at) / int64_t{sizeof(T)};
    states = arena.take<T>(teams.count() * team_size);
    products = arena.take<T>(teams.members() * member_size);
    teams.barriers = arena.take<Barrier>(teams.count());
  }
  void states_of(Arena& arena, Desk<T>& desk) const {
    desk.h = arena.take<T>(group_rows * PV);
    desk.h_next = arena.take<T>(group_rows * PV);
    desk.fed = masks_h ? arena.take<T>(group_rows * PV) : desk.h;
    desk.fed_next = masks_h ? arena.take<T>(group_rows * PV) : desk.h_next;
    desk.c = kHasC ? arena.take<T>(group_rows * HV) : nullptr;
    desk.s = kHasS ? arena.take<T>(group_rows * HV) : nullptr;
    desk.m = projected ? arena.take<T>(group_rows * HV) : nullptr;
    if constexpr (Cell::kTwoStages) {
      desk.q = arena.take<T>(group_rows * Cell::kFactors * HV);
      desk.carried = arena.take<T>(group_rows * Cell::kCarried * HV);
    }
  }
  void products_of(Arena& arena, Desk<T>& desk) const {
    desk.x_chunk = arena.take<T>(chunk_rows * D);
    desk.from_x = arena.take<T>(first.member_panels() * chunk_rows * kWide1);
    if constexpr (Cell::kTwoStages) desk.from_x2 = arena.take<T>(second.member_panels() * chunk_rows * kWide2);
    desk.from_h = arena.take<T>(group_rows * kWidest);
    desk.scratch = arena.take<T>(kBlock * kWidest);
  }

  void play(int64_t begin, int64_t end) {
    pack(begin, end);
    teams.each(begin, end, [&](const Member& member) { walk_sequences(member, begin); });
  }

  void pack(int64_t begin, int64_t end) {
    for (int64_t strand = 0; strand < strands; ++strand) {
      // In members' order: with one row group, a member packs the very panels that it will read.
      const int64_t each = teams.members() / strands;
      const Range mine = within({begin, end}, strand * each, each);
      if (mine.size() <= 0) continue;
      first.pack(strand, share(first.panels(), each, mine.begin, mine.end));
      if constexpr (Cell::kTwoStages) second.pack(strand, share(second.panels(), each, mine.begin, mine.end));
      if (packed_hr == nullptr) continue;
      const Range outputs = share(hr(strand).panels(), each, mine.begin, mine.end);
      hr(strand).pack_panels(outputs.begin, outputs.end, packed_hr + strand * hr(strand).packed_size());
    }
    teams.everyone.arrive_and_wait(end - begin);
  }

  void walk_sequences(const Member& member, int64_t slot) {
    Desk<T> desk{member.strand, {walk, args.plan.row_groups, member.group}};
    Arena team{reinterpret_cast<char*>(states + teams.team(member) * team_size)};
    Arena own{reinterpret_cast<char*>(products + slot * member_size)};
    states_of(team, desk);
    products_of(own, desk);
    const Rows& rows = desk.rows;
    const int64_t strand = member.strand;
    const Range panels = first.share_of(member);
    // The units whose h, c and s this member keeps: those of its last panels.
    Range panels2 = panels, own_c = first.units_of(panels), outputs = {0, 0};
    if constexpr (Cell::kTwoStages) {
      panels2 = second.share_of(member);
      own_c = second.units_of(panels2);
    }
    if (projected) outputs = share(hr(strand).panels(), args.plan.unit_groups, member.first, member.last);
    const Range own_h = projected ? Range{min(P, outputs.begin * kPanel<T>), min(P, outputs.end * kPanel<T>)} : own_c;

    begin_walk(desk, own_h, own_c);
    member.meet();

    bool zero_h = args.h0 == nullptr;
    for (int64_t s = 0, next; s < walk.T; s = next) {
      const int64_t in_chunk = gather_chunk(desk, s, next);
      if (in_chunk == 0) continue;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        T* to = desk.from_x + (p - panels.begin) * chunk_rows * kWide1;
        first.product_x(strand, p, in_chunk, desk.x_chunk, desk.scratch, to);
      }
      if constexpr (Cell::kTwoStages && !Cell::kSecondIsInner) {
        for (int64_t p = panels2.begin; p < panels2.end; ++p) {
          T* to = desk.from_x2 + (p - panels2.begin) * chunk_rows * kWide2;
          second.product_x(strand, p, in_chunk, desk.x_chunk, desk.scratch, to);
        }
      }
      for (int64_t row = 0; s < next; ++s) {
        const int64_t t = this->step(s, strand), alive = rows.at(t);
        if (alive == 0) continue;
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          const T* from_x = desk.from_x + ((p - panels.begin) * chunk_rows + row) * kWide1;
          if (!zero_h) {
            first.product_h(strand, 0, p, alive, desk.fed, PV, desk.scratch, desk.from_h, Into::kReplace);
          }
          first_cells(desk, t, p, alive, from_x, zero_h ? nullptr : desk.from_h);
        }
        if constexpr (Cell::kTwoStages) {
          member.meet();
          for (int64_t p = panels2.begin; p < panels2.end; ++p) {
            const T* from_x = desk.from_x2 + ((p - panels2.begin) * chunk_rows + row) * kWide2;
            for (int f = 0; f < Cell::kFactors; ++f) {
              second.product_h(strand, f, p, alive, desk.q + f * HV, Cell::kFactors * HV, desk.scratch, desk.from_h,
                               f == 0 ? Into::kReplace : Into::kAdd);
            }
            second_cells(desk, t, p, alive, from_x);
          }
        }
        if (projected) {
          member.meet();
          for (int64_t p = outputs.begin; p < outputs.end; ++p) project(desk, t, p, alive);
        }
        end_of_step(desk, t, alive, own_h, own_c);
        swap(desk.h, desk.h_next);
        swap(desk.fed, desk.fed_next);
        zero_h = false;
        row += alive;
        member.meet();
      }
    }
  }

  void begin_walk(const Desk<T>& desk, Range own_h, Range own_c) const {
    for (int64_t i = 0; i < desk.rows.all(); ++i) start(desk, i, own_h, own_c);
    for (int64_t i = walk.T > 0 ? desk.rows.at(0) : 0; i < desk.rows.all(); ++i) {  // sequences of length zero
      finish(desk, i, desk.h, own_h, own_c);
    }
  }

  static void swap(T*& a, T*& b) {
    T* const kept = a;
    a = b;
    b = kept;
  }

  // Copies the rows of x of as many steps from s on as fit a chunk, in the order of the walk; next: the first that did
  // not.
  int64_t gather_chunk(const Desk<T>& desk, int64_t s, int64_t& next) const {
    int64_t count = 0;
    for (next = s; next < walk.T; ++next) {
      const int64_t t = this->step(next, desk.strand), alive = desk.rows.at(t);
      if (next > s && count + alive > chunk_rows) break;
      for (int64_t i = 0; i < alive; ++i, ++count) {
        const S* from = static_cast<const S*>(args.x) + walk.x_offsets[desk.rows.packed(t, i)];
        convert(desk.x_chunk + count * D, from, D);
      }
    }
    return count;
  }

  static void start_state(const void* from, int64_t at, Range own, T* to) {
    if (from == nullptr) {
      for (int64_t u = own.begin; u < own.end; ++u) to[u] = 0;
    } else {
      convert(to + own.begin, static_cast<const S*>(from) + at + own.begin, own.size());
    }
  }

  // The states that the i-th sequence starts from. Lanes beyond the last unit hold zeros.
  void start(const Desk<T>& desk, int64_t i, Range own_h, Range own_c) const {
    const int64_t b = desk.rows.sequence(i), strand = desk.strand;
    T *h = desk.h + i * PV, *h_next = desk.h_next + i * PV;
    start_state(args.h0, this->h_at(strand, b), own_h, h);
    for (int64_t u = own_h.end; u < round_up(own_h.end, kWidth); ++u) h[u] = h_next[u] = 0;
    if (kHasC) {
      start_state(args.c0, this->c_at(strand, b), own_c, desk.c + i * HV);
      for (int64_t u = own_c.end; u < round_up(own_c.end, kWidth); ++u) desk.c[i * HV + u] = 0;
    }
    if (kHasS) {
      start_state(args.s0, this->c_at(strand, b), own_c, desk.s + i * HV);
      for (int64_t u = own_c.end; u < round_up(own_c.end, kWidth); ++u) desk.s[i * HV + u] = 0;
    }
    const int64_t j = desk.rows.group + i * desk.rows.groups;
    const bool there = walk.T > 0 && i < desk.rows.at(0);
    if (there && this->direction(strand) == 0 && this->restarts(strand, 0, j)) restart(desk, i, own_h, own_c, desk.h);
    memcpy(h_next + own_h.begin, h + own_h.begin, own_h.size() * sizeof(T));
    if (masks_h) {
      feed(desk, i, own_h, h, desk.fed + i * PV);
      feed(desk, i, own_h, h, desk.fed_next + i * PV);
    }
  }

  void restart(const Desk<T>& desk, int64_t i, Range own_h, Range own_c, T* h) const {
    memset(h + i * PV + own_h.begin, 0, own_h.size() * sizeof(T));
    if (kHasC) memset(desk.c + i * HV + own_c.begin, 0, own_c.size() * sizeof(T));
    if (kHasS) memset(desk.s + i * HV + own_c.begin, 0, own_c.size() * sizeof(T));
  }

  // h times its mask. Ranges start at whole vectors.
  void feed(const Desk<T>& desk, int64_t i, Range own, const T* h, T* to) const {
    const S* mask = static_cast<const S*>(args.options.variational) + this->h_at(desk.strand, desk.rows.sequence(i));
    for (int64_t u = own.begin; u < own.end; u += kWidth) store(to + u, load(h + u) * load(mask + u, own.end - u));
  }

  void finish(const Desk<T>& desk, int64_t i, const T* h_rows, Range own_h, Range own_c) const {
    if (out.h_n == nullptr) return;
    const int64_t b = desk.rows.sequence(i), strand = desk.strand;
    const auto give = [](void* to, int64_t at, const T* from, Range own) {
      convert(static_cast<S*>(to) + at + own.begin, from + own.begin, own.size());
    };
    give(out.h_n, this->h_at(strand, b), h_rows + i * PV, own_h);
    if (kHasC) give(out.c_n, this->c_at(strand, b), desk.c + i * HV, own_c);
    if (kHasS) give(out.s_n, this->c_at(strand, b), desk.s + i * HV, own_c);
  }

  // Sequences end where the walk meets their last step; others may restart before the next.
  void end_of_step(const Desk<T>& desk, int64_t t, int64_t alive, Range own_h, Range own_c) const {
    const bool onward = this->direction(desk.strand) == 0;
    const int64_t next = onward ? t + 1 : t - 1;
    const int64_t staying = next < 0 || next == walk.T ? 0 : min(alive, desk.rows.at(next));
    for (int64_t i = staying; i < alive; ++i) finish(desk, i, desk.h_next, own_h, own_c);
    if (!kOptions || args.options.reset == nullptr) return;
    for (int64_t i = 0; i < staying; ++i) {
      if (!this->restarts(desk.strand, next, desk.rows.group + i * desk.rows.groups)) continue;
      restart(desk, i, own_h, own_c, desk.h_next);
      if (masks_h) memset(desk.fed_next + i * PV + own_h.begin, 0, own_h.size() * sizeof(T));
    }
  }

  // The cell (of two stages, its first) on one panel of units, from the two products (from_h null: zero).
  void first_cells(const Desk<T>& desk, int64_t t, int64_t panel, int64_t alive, const T* from_x,
                   const T* from_h) const {
    constexpr int kUnits = FirstStage::kUnits;
    for (int64_t i = 0; i < alive; ++i) {
      const int64_t n = desk.rows.packed(t, i);
      for (int unit = 0; unit < kUnits; ++unit) {
        const int64_t u = panel * FirstStage::kPanelUnits + unit * kWidth, valid = min(kWidth, H - u);
        if (kUnits > 1 && valid <= 0) break;
        V x[FirstStage::kGates], h[FirstStage::kGates], saved[Cell::kSaved + 1];
        first.gates(desk.strand, panel, unit, from_x + i * kWide1, from_h == nullptr ? nullptr : from_h + i * kWide1, x,
                    h);
        const auto e = this->extra(desk.strand, n, desk.rows.sequence(i), u, valid);
        V c = kHasC ? load(desk.c + i * HV + u) : V{};
        const bool direct = Cell::kDirect && !projected;
        const V h_prev = direct ? load(desk.h + i * PV + u) : V{};
        if constexpr (Cell::kTwoStages) {
          V q[Cell::kFactors], carried[Cell::kCarried];
          Cell::first(x, h, e, h_prev, c, saved, q, carried);
          for (int f = 0; f < Cell::kFactors; ++f) store(desk.q + (i * Cell::kFactors + f) * HV + u, q[f]);
          for (int k = 0; k < Cell::kCarried; ++k) store(desk.carried + (i * Cell::kCarried + k) * HV + u, carried[k]);
          keep(desk.strand, n, u, valid, saved, 0, Cell::kSavedFirst);
        } else {
          const V hidden = Cell::forward(x, h, e, h_prev, c, saved);
          if (kHasC) {
            store(desk.c + i * HV + u, c);
            if (out.cells != nullptr) store(static_cast<S*>(out.cells) + this->cell_at(n, desk.strand) + u, c, valid);
          }
          keep(desk.strand, n, u, valid, saved, 0, Cell::kSaved);
          if (projected) {
            store(desk.m + i * HV + u, hidden);
          } else {
            leave(desk, i, n, u, valid, e, h_prev, hidden);
          }
        }
      }
    }
  }

  void second_cells(const Desk<T>& desk, int64_t t, int64_t panel, int64_t alive, const T* from_x) const {
    if constexpr (Cell::kTwoStages) {
      using Second = SecondStage<Cell>;
      for (int64_t i = 0; i < alive; ++i) {
        const int64_t n = desk.rows.packed(t, i);
        for (int unit = 0; unit < Second::kUnits; ++unit) {
          const int64_t u = panel * Second::kPanelUnits + unit * kWidth, valid = min(kWidth, H - u);
          if (valid <= 0) break;
          V x[Second::kGates], h[Second::kGates], saved[Cell::kSaved], carried[Cell::kCarried];
          second.gates(desk.strand, panel, unit, from_x + i * kWide2, desk.from_h + i * kWide2, x, h);
          for (int k = 0; k < Cell::kCarried; ++k) carried[k] = load(desk.carried + (i * Cell::kCarried + k) * HV + u);
          const auto e = this->extra(desk.strand, n, desk.rows.sequence(i), u, valid);
          const V h_prev = load(desk.h + i * PV + u);
          V c = kHasC ? load(desk.c + i * HV + u) : V{}, s = kHasS ? load(desk.s + i * HV + u) : V{};
          const V hidden = Cell::second(x, h, e, h_prev, carried, c, s, saved);
          const int64_t at = this->cell_at(n, desk.strand) + u;
          if (kHasC) store(desk.c + i * HV + u, c);
          if (kHasS) store(desk.s + i * HV + u, s);
          if (kHasC && out.cells != nullptr) store(static_cast<S*>(out.cells) + at, c, valid);
          if (kHasS && out.inner != nullptr) store(static_cast<S*>(out.inner) + at, s, valid);
          keep(desk.strand, n, u, valid, saved, Cell::kSavedFirst, Cell::kSaved);
          leave(desk, i, n, u, valid, e, h_prev, hidden);
        }
      }
    }
  }

  // Vectors [from, to) of what is saved, the first of which is saved[0].
  SEQKERNELS_INLINE void keep(int64_t strand, int64_t n, int64_t u, int64_t valid, const V* saved, int from,
                              int to) const {
    if (from == to || out.saved == nullptr) return;
    S* at = static_cast<S*>(out.saved) + this->saved_at(n, strand) + u;
    for (int k = from; k < to; ++k) store(at + k * all_H, saved[k - from], valid);
  }

  // The new h of a vector of units, where there is no projection.
  SEQKERNELS_INLINE void leave(const Desk<T>& desk, int64_t i, int64_t n, int64_t u, int64_t valid,
                               const typename L::E& e, V h_prev, V hidden) const {
    if constexpr (kOptions) {
      hidden = zoned<S>(e.zoneout_h, h_prev, hidden);
    } else {
      hidden = rounded<S>(hidden);
    }
    if (out.y != nullptr) store(static_cast<S*>(out.y) + this->y_at(n, desk.strand) + u, hidden, valid);
    store(desk.h_next + i * PV + u, hidden);
    if constexpr (kOptions) {
      if (masks_h) store(desk.fed_next + i * PV + u, hidden * e.fed);
    }
  }

  // One panel of h = m W_hr^T.
  void project(const Desk<T>& desk, int64_t t, int64_t panel, int64_t alive) const {
    const auto operand = hr(desk.strand);
    const T* packed = packed_hr == nullptr ? nullptr : packed_hr + desk.strand * operand.packed_size();
    panel_product(operand, packed, desk.scratch, panel, alive, desk.m, HV, desk.from_h, kPanel<T>, Into::kReplace);
    for (int64_t i = 0; i < alive; ++i) {
      const int64_t n = desk.rows.packed(t, i);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, P - u);
        if (valid <= 0) break;
        const V value = rounded<S>(load(desk.from_h + i * kPanel<T> + v * kWidth));
        if (out.y != nullptr) store(static_cast<S*>(out.y) + this->y_at(n, desk.strand) + u, value, valid);
        store(desk.h_next + i * PV + u, value);
      }
      if (masks_h) {
        const Range own = {panel * kPanel<T>, min(P, (panel + 1) * kPanel<T>)};
        feed(desk, i, own, desk.h_next + i * PV, desk.fed_next + i * PV);
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
