// Forward pass of a recurrent layer.
//
// Steps are grouped into chunks of rows: the product of the input with W_ih is
// computed per chunk and stays in the L2 cache; each step then adds h W_hh^T
// panel by panel and runs the cell on the panel while it is in the L1 cache. In
// a cell of two stages the second stage is a phase of its own, which starts when
// all units have finished the first; a projection likewise.
//
// A prepared layer (packed_weights.h) runs the same passes: its products read packed weights, and int8 weights are
// multiplied with int8 forms of x and of the state, one scale per row and step.
#pragma once

#include <type_traits>

#include "recurrent/cpu/layer.h"

namespace seqkernels::SEQKERNELS_ISA {

// The packed weights of one stage of a cell, for all streams: gates [Of::kGate,
// Of::kGate + Of::kGates) of W_ih and of the kFactors matrices of the recurrent
// product. kInner: the inner weights, without a product with the input.
template <class Cell, class Of, int kFactors, bool kInner>
struct Stage {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kGates = Of::kGates, kUnits = Of::kUnits, kVectors = kUnits * kGates;
  static constexpr int64_t kWidth = kLanes<T>, kWidthOfPanel = kPanel<T, kVectors>, kPanelUnits = kUnits * kWidth;
  static constexpr int kSecondGates = kInner ? 0 : Cell::kGates - Cell::kFirst;

  const Layer<Cell>& layer;
  const bool pack_first;  // for a single step, panels are packed as they are used
  T *packed_x = nullptr, *packed_h[kFactors] = {}, *bias_x = nullptr, *bias_h = nullptr;

  Stage(const Layer<Cell>& of, bool pack) : layer(of), pack_first(pack) {}

  const PreparedLayer* prepared() const { return layer.args.prepared; }

  Columns columns() const { return {layer.H, kUnits, layer.all_H}; }
  int64_t panels() const { return columns().template panels<T>(); }
  int64_t row0(int64_t stream) const { return Of::kGate * layer.all_H + layer.unit0(stream); }
  const Weights& weights(int64_t stream) const { return layer.args.weights[layer.direction(stream)]; }

  Operand<S, kVectors> of_x(int64_t stream) const {
    const S* w = static_cast<const S*>(weights(stream).w_ih);
    return {w + row0(stream) * layer.D, layer.D, layer.D, columns(), Side::kRowsAreColumns};
  }
  Operand<S, kVectors> of_h(int64_t stream, int factor) const {
    const Weights& all = weights(stream);
    const void* w = !kInner ? all.w_hh : factor == 0 ? all.inner_ih : all.inner_hh;
    const int64_t depth = kInner ? layer.H : layer.P;
    return {static_cast<const S*>(w) + row0(stream) * depth, depth, depth, columns(), Side::kRowsAreColumns};
  }
  int64_t x_size() const { return panels() * layer.D * kWidthOfPanel; }
  int64_t h_size() const { return panels() * (kInner ? layer.H : layer.P) * kWidthOfPanel; }

  void carve(Arena& arena) {
    if (pack_first) {
      if (!kInner) packed_x = arena.take<T>(layer.streams * x_size());
      for (int f = 0; f < kFactors; ++f) packed_h[f] = arena.take<T>(layer.streams * h_size());
    }
    bias_x = arena.take<T>(layer.streams * panels() * kWidthOfPanel);
    bias_h = arena.take<T>(layer.streams * panels() * kWidthOfPanel);
  }

  void pack(int64_t stream, Range range) const {
    pack_bias(stream, range);
    if (!pack_first) return;
    if (!kInner) of_x(stream).pack_panels(range.begin, range.end, packed_x + stream * x_size());
    for (int f = 0; f < kFactors; ++f) {
      of_h(stream, f).pack_panels(range.begin, range.end, packed_h[f] + stream * h_size());
    }
  }

  // Both biases if the products have separate gradients, else their sum, added
  // to the product with h.
  void pack_bias(int64_t stream, Range range) const {
    const Weights& w = weights(stream);
    const S* b_ih = static_cast<const S*>(kInner ? w.inner_b_ih : w.b_ih);
    const S* b_hh = static_cast<const S*>(kInner ? w.inner_b_hh : w.b_hh);
    for (int64_t p = range.begin; p < range.end; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t n = columns().template valid<T>(p, v), at = (stream * panels() + p) * kWidthOfPanel + v * kWidth;
        const int64_t first = row0(stream) + columns().template first<T>(p, v);
        const V of_x = b_ih != nullptr && n > 0 ? load(b_ih + first, n) : V{};
        const V of_h = b_hh != nullptr && n > 0 ? load(b_hh + first, n) : V{};
        store(bias_x + at, of_x);
        store(bias_h + at, Cell::kSeparate ? of_h : of_x + of_h);
      }
    }
  }

  void product_x(int64_t stream, int64_t panel, int64_t rows, const Activations& x, T* scratch, T* to) const {
    if (prepared() != nullptr) {
      const PackedMatrix& w = prepared()->weights[layer.direction(stream)].w_ih;
      return packed_product(w, layer.D, stream, panel, rows, x, to, Into::kReplace);
    }
    const T* packed = pack_first ? packed_x + stream * x_size() : nullptr;
    panel_product(of_x(stream), packed, scratch, panel, rows, static_cast<const T*>(x.values), x.stride, to,
                  kWidthOfPanel, Into::kReplace);
  }
  void product_h(int64_t stream, int factor, int64_t panel, int64_t rows, const Activations& h, T* scratch, T* to,
                 Into into) const {
    if (prepared() != nullptr) {
      const PackedWeights& all = prepared()->weights[layer.direction(stream)];
      const PackedMatrix& w = !kInner ? all.w_hh : factor == 0 ? all.inner_ih : all.inner_hh;
      return packed_product(w, kInner ? layer.H : layer.P, stream, panel, rows, h, to, into);
    }
    const T* packed = pack_first ? packed_h[factor] + stream * h_size() : nullptr;
    panel_product(of_h(stream, factor), packed, scratch, panel, rows, static_cast<const T*>(h.values), h.stride, to,
                  kWidthOfPanel, into);
  }

  void packed_product(const PackedMatrix& w, int64_t depth, int64_t stream, int64_t panel, int64_t rows,
                      const Activations& a, T* to, Into into) const {
    if constexpr (std::is_same_v<S, float>) {
      const auto of = [&](int64_t gates) { return PanelLayout{prepared()->precision, gates, layer.H, depth}; };
      const int64_t before = Of::kGate > 0 ? of(Of::kGate).bytes() : 0;
      const int64_t of_head =
          kInner ? of(kGates).bytes() : of(Cell::kFirst).bytes() + (kSecondGates > 0 ? of(kSecondGates).bytes() : 0);
      prepared()->kernels.product({of(kGates), w.values + stream % layer.args.heads * of_head + before,
                                   w.scales == nullptr ? nullptr : w.scales + row0(stream), layer.all_H,
                                   panel * kPanelUnits, rows, a, to, kWidthOfPanel, into == Into::kAdd});
    }
  }

  // Pre-activations of the unit-th vector of units of a panel, for one row:
  // both products plus biases. Null: zero.
  SEQKERNELS_INLINE void gates(int64_t stream, int64_t panel, int unit, const T* from_x, const T* from_h, V* x,
                               V* h) const {
    const int64_t bias = (stream * panels() + panel) * kWidthOfPanel;
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

  // The panels of a share of the units.
  Range panels_of(int64_t part) const { return share(panels(), layer.args.plan.unit_groups, part, part + 1); }
  Range units_of(Range range) const {
    return {min(layer.H, range.begin * kPanelUnits), min(layer.H, range.end * kPanelUnits)};
  }
  int64_t share_panels() const { return ceil_div(panels(), layer.args.plan.unit_groups); }
};

template <class Cell, bool kTwo = Cell::kTwoStages>
struct SecondStage {
  static constexpr int64_t kWidthOfPanel = 0;
  SecondStage(const Layer<Cell>&, bool) {}
  void carve(Arena&) {}
};
template <class Cell>
struct SecondStage<Cell, true> : Stage<Cell, typename Cell::Second, Cell::kFactors, Cell::kInner> {
  using Stage<Cell, typename Cell::Second, Cell::kFactors, Cell::kInner>::Stage;
};

// Workspace of a thread in a team: the states of the team and its own buffers.
template <class T>
struct Workspace {
  int64_t stream;
  Rows rows;
  T *h = nullptr, *h_next = nullptr;  // [rows, PV]
  T *recurrent = nullptr,
    *recurrent_next = nullptr;         // h as the recurrent products read it: masked
                                       // under variational dropout
  T* c[kMaxCells] = {};                // [rows, HV] each
  T* m = nullptr;                      // [rows, HV] before the projection
  T *q = nullptr, *carried = nullptr;  // between the stages: [rows, kFactors *
                                       // HV], [rows, kCarried * HV]
  T *x_chunk = nullptr, *from_h = nullptr, *scratch = nullptr;
  int8_t *x_bytes = nullptr, *h_bytes = nullptr;  // int8 forms of x_chunk and of up to two operands of a step
  float *x_scales = nullptr, *h_scales = nullptr;
  int64_t gathered = -1;  // the first step of the chunk in x_chunk
};

// A chunk of steps [begin, end), in the order of processing, and its rows.
struct Chunk {
  int64_t begin, end, rows;
};

// A share of a team: the panels of its products, and the units whose states it updates.
template <class T>
struct Share {
  Range panels, panels2, outputs, own_h, own_c;
  T *from_x, *from_x2;  // products with the rows of a chunk
};

// A step: its time, the number of sequences that have it, its first row in the chunk.
struct Step {
  int64_t t, active, row;
};

template <class Cell>
struct Forward : Layer<Cell> {
  using L = Layer<Cell>;
  using L::args, L::walk, L::D, L::H, L::P, L::all_H, L::projected, L::HV, L::PV, L::group_rows, L::kGates, L::kWidth;
  using L::kCells, L::kOptions, L::masks_h, L::streams;
  using typename L::S;
  using typename L::T;
  using typename L::V;
  using FirstStage = Stage<Cell, typename Cell::First, 1, false>;
  static constexpr int64_t kWide1 = FirstStage::kWidthOfPanel, kWide2 = SecondStage<Cell>::kWidthOfPanel;
  static constexpr int64_t kWidest12 = kWide1 > kWide2 ? kWide1 : kWide2;
  static constexpr int64_t kWidest = kWidest12 > kPanel<T> ? kWidest12 : kPanel<T>;

  const ForwardArgs& out;
  Teams teams;
  const bool pack_first = walk.T > 1 && args.prepared == nullptr;
  const bool int8 = args.prepared != nullptr && args.prepared->precision == Precision::kInt8;
  static constexpr int kOperands = Cell::kFactors > 1 ? Cell::kFactors : 1;
  const int64_t x_stride = round_up(D, 64), h_stride = round_up(P > H ? P : H, 64);  // of int8 rows
  const int64_t chunk_rows = group_rows > kChunkRows ? group_rows : min(kChunkRows, walk.N);
  FirstStage first;
  SecondStage<Cell> second;
  T *packed_hr, *states, *buffers;
  T *all_from_x, *all_from_x2 = nullptr;  // [shares, panels, chunk_rows, kWide1 or kWide2]
  Share<T>* all_shares;                   // [threads, unit_groups]
  int64_t team_size, thread_size;         // elements of states, of buffers

  explicit Forward(const ForwardArgs& a)
      : L{a}, out(a), teams{a, Cell::kJointNorm ? a.heads : 1}, first(*this, pack_first), second(*this, pack_first) {}

  Operand<S> hr(int64_t stream) const {
    const S* w = static_cast<const S*>(args.weights[this->direction(stream)].w_hr);
    return {w, H, H, {P, kPlainVectors}, Side::kRowsAreColumns};
  }

  void carve(Arena& arena) {
    first.carve(arena);
    second.carve(arena);
    packed_hr = pack_first && projected ? arena.take<T>(streams * hr(0).packed_size()) : nullptr;
    Workspace<T> work{0, {walk, 1, 0}};
    Arena of_team, of_thread;
    states_of(of_team, work);
    buffers_of(of_thread, work);
    team_size = reinterpret_cast<int64_t>(of_team.at) / int64_t{sizeof(T)};
    thread_size = reinterpret_cast<int64_t>(of_thread.at) / int64_t{sizeof(T)};
    states = arena.take<T>(teams.count() * team_size);
    buffers = arena.take<T>(teams.threads * thread_size);
    all_from_x = arena.take<T>(teams.shares() * first.share_panels() * chunk_rows * kWide1);
    if constexpr (Cell::kTwoStages) {
      all_from_x2 = arena.take<T>(teams.shares() * second.share_panels() * chunk_rows * kWide2);
    }
    all_shares = arena.take<Share<T>>(teams.threads * args.plan.unit_groups);
    teams.carve(arena);
  }
  void states_of(Arena& arena, Workspace<T>& work) const {
    work.h = arena.take<T>(group_rows * PV);
    work.h_next = arena.take<T>(group_rows * PV);
    work.recurrent = masks_h ? arena.take<T>(group_rows * PV) : work.h;
    work.recurrent_next = masks_h ? arena.take<T>(group_rows * PV) : work.h_next;
    for (int k = 0; k < kCells; ++k) work.c[k] = arena.take<T>(group_rows * HV);
    work.m = projected ? arena.take<T>(group_rows * HV) : nullptr;
    if constexpr (Cell::kTwoStages) {
      work.q = arena.take<T>(group_rows * Cell::kFactors * HV);
      work.carried = arena.take<T>(group_rows * Cell::kCarried * HV);
    }
  }
  void buffers_of(Arena& arena, Workspace<T>& work) const {
    work.x_chunk = arena.take<T>(chunk_rows * D);
    work.from_h = arena.take<T>(group_rows * kWidest);
    work.scratch = arena.take<T>(kBlock * kWidest);
    if (!int8) return;
    work.x_bytes = arena.take<int8_t>(chunk_rows * x_stride);
    work.x_scales = arena.take<float>(chunk_rows);
    work.h_bytes = arena.take<int8_t>(kOperands * group_rows * h_stride);
    work.h_scales = arena.take<float>(kOperands * group_rows);
  }

  // The rows of x of the chunk.
  Activations input_of(const Workspace<T>& work) const {
    return {work.x_chunk, D, work.x_bytes, x_stride, work.x_scales};
  }
  // Rows of a state, or what a stage made of one, as the i-th operand of a product. range: see PreparedLayer.
  Activations operand_of(const Workspace<T>& work, const T* values, int64_t stride, int64_t rows, int64_t depth,
                         float range = 0, int i = 0) const {
    const Activations a{values, stride, work.h_bytes + i * group_rows * h_stride, h_stride,
                        work.h_scales + i * group_rows};
    if (int8) args.prepared->kernels.quantize(a, rows, depth, range);
    return a;
  }
  Activations state_of(const Workspace<T>& work, int64_t rows) const {
    return operand_of(work, work.recurrent, PV, rows, P,
                      int8 ? args.prepared->h_range[this->direction(work.stream)] : 0);
  }

  void run(int64_t thread) {
    teams.run_all(0, thread, [&](int64_t share) { pack(share); });
    teams.each(thread, [&](Team& team) { run_sequences(team, thread); });
  }

  // Packs the weights that belong to a share of all: with one row group, the panels that it reads.
  __attribute__((noinline)) void pack(int64_t share_of_all) const {
    const int64_t each = teams.shares() / streams, stream = share_of_all / each, part = share_of_all % each;
    first.pack(stream, share(first.panels(), each, part, part + 1));
    if constexpr (Cell::kTwoStages) second.pack(stream, share(second.panels(), each, part, part + 1));
    if (packed_hr == nullptr) return;
    const Range outputs = share(hr(stream).panels(), each, part, part + 1);
    hr(stream).pack_panels(outputs.begin, outputs.end, packed_hr + stream * hr(stream).packed_size());
  }

  Workspace<T> workspace_of(int64_t stream, int64_t group, int64_t thread) const {
    Workspace<T> work{stream, {walk, args.plan.row_groups, group}};
    Arena of_team{reinterpret_cast<char*>(states + (stream * args.plan.row_groups + group) * team_size)};
    Arena of_thread{reinterpret_cast<char*>(buffers + thread * thread_size)};
    states_of(of_team, work);
    buffers_of(of_thread, work);
    return work;
  }

  Share<T> share_of(const Workspace<T>& work, int64_t part) const {
    const int64_t number =
        (work.stream * args.plan.row_groups + work.rows.group) * args.plan.unit_groups + part;  // of all shares
    Share<T> its{first.panels_of(part), {0, 0}, {0, 0}, {0, 0}, {0, 0}, nullptr, nullptr};
    its.own_c = first.units_of(its.panels);
    its.from_x = all_from_x + number * first.share_panels() * chunk_rows * kWide1;
    if constexpr (Cell::kTwoStages) {
      its.panels2 = second.panels_of(part);
      its.own_c = second.units_of(its.panels2);
      its.from_x2 = all_from_x2 + number * second.share_panels() * chunk_rows * kWide2;
    }
    its.own_h = its.own_c;
    if (projected) {
      its.outputs = share(hr(work.stream).panels(), args.plan.unit_groups, part, part + 1);
      its.own_h = {min(P, its.outputs.begin * kPanel<T>), min(P, its.outputs.end * kPanel<T>)};
    }
    return its;
  }

  void run_sequences(Team& team, int64_t thread) {
    Workspace<T> work = workspace_of(team.stream, team.group, thread);
    Share<T>* const shares = all_shares + thread * args.plan.unit_groups;
    for (int64_t part = 0; part < args.plan.unit_groups; ++part) shares[part] = share_of(work, part);
    team.run([&](int64_t part) { begin_sequences(work, shares[part].own_h, shares[part].own_c); });
    bool zero_h = args.h0 == nullptr;
    for (int64_t s = 0; s < walk.T;) {
      const Chunk chunk = chunk_from(work, s);
      Step step{0, 0, 0};
      for (; s < chunk.end; ++s) {
        step.t = this->step(s, work.stream);
        step.active = work.rows.at(step.t);
        if (step.active == 0) continue;
        team.run([&](int64_t part) { first_stage(work, shares[part], chunk, step, zero_h); });
        if constexpr (Cell::kTwoStages) {
          team.run([&](int64_t part) { second_stage(work, shares[part], step); });
        }
        if (projected) team.run([&](int64_t part) { projection(work, shares[part], step); });
        swap(work.h, work.h_next);
        swap(work.recurrent, work.recurrent_next);
        zero_h = false;
        step.row += step.active;
      }
    }
  }

  // The phases of a step, for one share. Not inlined: among the loops of run_sequences, GCC keeps the sums of some
  // products in memory.

  __attribute__((noinline)) void first_stage(Workspace<T>& work, const Share<T>& its, const Chunk& chunk,
                                             const Step& step, bool zero_h) const {
    if (step.row == 0) input_products(work, its, chunk);
    const Activations h = zero_h ? Activations{} : state_of(work, step.active);
    for (int64_t p = its.panels.begin; p < its.panels.end; ++p) {
      const T* from_x = its.from_x + ((p - its.panels.begin) * chunk_rows + step.row) * kWide1;
      if (!zero_h) first.product_h(work.stream, 0, p, step.active, h, work.scratch, work.from_h, Into::kReplace);
      first_cells(work, step.t, p, step.active, from_x, zero_h ? nullptr : work.from_h);
    }
    if (!Cell::kTwoStages && !projected) end_of_step(work, step.t, step.active, its.own_h, its.own_c);
  }

  __attribute__((noinline)) void second_stage(const Workspace<T>& work, const Share<T>& its, const Step& step) const {
    if constexpr (Cell::kTwoStages) {
      Activations q[Cell::kFactors];
      for (int f = 0; f < Cell::kFactors; ++f) {
        q[f] = operand_of(work, work.q + f * HV, Cell::kFactors * HV, step.active, H, 0, f);
      }
      for (int64_t p = its.panels2.begin; p < its.panels2.end; ++p) {
        const T* from_x = its.from_x2 + ((p - its.panels2.begin) * chunk_rows + step.row) * kWide2;
        for (int f = 0; f < Cell::kFactors; ++f) {
          second.product_h(work.stream, f, p, step.active, q[f], work.scratch, work.from_h,
                           f == 0 ? Into::kReplace : Into::kAdd);
        }
        second_cells(work, step.t, p, step.active, from_x);
      }
      if (!projected) end_of_step(work, step.t, step.active, its.own_h, its.own_c);
    }
  }

  __attribute__((noinline)) void projection(const Workspace<T>& work, const Share<T>& its, const Step& step) const {
    const Activations m = operand_of(work, work.m, HV, step.active, H);
    for (int64_t p = its.outputs.begin; p < its.outputs.end; ++p) project(work, step.t, p, step.active, m);
    end_of_step(work, step.t, step.active, its.own_h, its.own_c);
  }

  // The products with the rows of x of a chunk.
  __attribute__((noinline)) void input_products(Workspace<T>& work, const Share<T>& its, const Chunk& chunk) const {
    gather(work, chunk);
    for (int64_t p = its.panels.begin; p < its.panels.end; ++p) {
      T* to = its.from_x + (p - its.panels.begin) * chunk_rows * kWide1;
      first.product_x(work.stream, p, chunk.rows, input_of(work), work.scratch, to);
    }
    if constexpr (Cell::kTwoStages && !Cell::kInner) {
      for (int64_t p = its.panels2.begin; p < its.panels2.end; ++p) {
        T* to = its.from_x2 + (p - its.panels2.begin) * chunk_rows * kWide2;
        second.product_x(work.stream, p, chunk.rows, input_of(work), work.scratch, to);
      }
    }
  }

  void begin_sequences(const Workspace<T>& work, Range own_h, Range own_c) const {
    for (int64_t i = 0; i < work.rows.all(); ++i) start(work, i, own_h, own_c);
    for (int64_t i = walk.T > 0 ? work.rows.at(0) : 0; i < work.rows.all(); ++i) {  // sequences of length zero
      finish(work, i, work.h, own_h, own_c);
    }
  }

  static void swap(T*& a, T*& b) {
    T* const kept = a;
    a = b;
    b = kept;
  }

  // As many steps from s on as fit into a chunk.
  Chunk chunk_from(const Workspace<T>& work, int64_t s) const {
    Chunk chunk{s, s, 0};
    for (; chunk.end < walk.T; ++chunk.end) {
      const int64_t active = work.rows.at(this->step(chunk.end, work.stream));
      if (chunk.end > s && chunk.rows + active > chunk_rows) break;
      chunk.rows += active;
    }
    return chunk;
  }

  // Copies the rows of x of a chunk, once per thread.
  void gather(Workspace<T>& work, const Chunk& chunk) const {
    if (work.gathered == chunk.begin) return;
    work.gathered = chunk.begin;
    T* to = work.x_chunk;
    for (int64_t s = chunk.begin; s < chunk.end; ++s) {
      const int64_t t = this->step(s, work.stream), active = work.rows.at(t);
      for (int64_t i = 0; i < active; ++i, to += D) {
        convert(to, static_cast<const S*>(args.x) + walk.x_offsets[work.rows.packed(t, i)], D);
      }
    }
    if (int8) args.prepared->kernels.quantize(input_of(work), chunk.rows, D, args.prepared->x_range);
  }

  static void start_state(const void* from, int64_t at, Range own, T* to) {
    if (from == nullptr) {
      for (int64_t u = own.begin; u < own.end; ++u) to[u] = 0;
    } else {
      convert(to + own.begin, static_cast<const S*>(from) + at + own.begin, own.size());
    }
  }

  // Initial states of the i-th sequence. Lanes beyond the last unit are zero.
  void start(const Workspace<T>& work, int64_t i, Range own_h, Range own_c) const {
    const int64_t b = work.rows.sequence(i), stream = work.stream;
    T *h = work.h + i * PV, *h_next = work.h_next + i * PV;
    start_state(args.h0, this->h_at(stream, b), own_h, h);
    for (int64_t u = own_h.end; u < round_up(own_h.end, kWidth); ++u) h[u] = h_next[u] = 0;
    for (int k = 0; k < kCells; ++k) {
      start_state(args.c0[k], this->c_at(stream, b), own_c, work.c[k] + i * HV);
      for (int64_t u = own_c.end; u < round_up(own_c.end, kWidth); ++u) work.c[k][i * HV + u] = 0;
    }
    const int64_t j = work.rows.group + i * work.rows.groups;
    const bool there = walk.T > 0 && i < work.rows.at(0);
    if (there && this->direction(stream) == 0 && this->restarts(stream, 0, j)) restart(work, i, own_h, own_c, work.h);
    memcpy(h_next + own_h.begin, h + own_h.begin, own_h.size() * sizeof(T));
    if (masks_h) {
      mask_h(work, i, own_h, h, work.recurrent + i * PV);
      mask_h(work, i, own_h, h, work.recurrent_next + i * PV);
    }
  }

  void restart(const Workspace<T>& work, int64_t i, Range own_h, Range own_c, T* h) const {
    memset(h + i * PV + own_h.begin, 0, own_h.size() * sizeof(T));
    for (int k = 0; k < kCells; ++k) memset(work.c[k] + i * HV + own_c.begin, 0, own_c.size() * sizeof(T));
  }

  // Multiplies h by its mask. Ranges start at vector boundaries.
  void mask_h(const Workspace<T>& work, int64_t i, Range own, const T* h, T* to) const {
    const S* mask = static_cast<const S*>(args.options.variational) + this->h_at(work.stream, work.rows.sequence(i));
    for (int64_t u = own.begin; u < own.end; u += kWidth) store(to + u, load(h + u) * load(mask + u, own.end - u));
  }

  void finish(const Workspace<T>& work, int64_t i, const T* h_rows, Range own_h, Range own_c) const {
    if (out.h_n == nullptr) return;
    const int64_t b = work.rows.sequence(i), stream = work.stream;
    const auto write = [](void* to, int64_t at, const T* from, Range own) {
      convert(static_cast<S*>(to) + at + own.begin, from + own.begin, own.size());
    };
    write(out.h_n, this->h_at(stream, b), h_rows + i * PV, own_h);
    for (int k = 0; k < kCells; ++k) write(out.c_n[k], this->c_at(stream, b), work.c[k] + i * HV, own_c);
  }

  // Writes the last states of sequences that end at step t, and resets those
  // that restart before the next step.
  void end_of_step(const Workspace<T>& work, int64_t t, int64_t active, Range own_h, Range own_c) const {
    const bool onward = this->direction(work.stream) == 0;
    const int64_t next = onward ? t + 1 : t - 1;
    const int64_t staying = next < 0 || next == walk.T ? 0 : min(active, work.rows.at(next));
    for (int64_t i = staying; i < active; ++i) finish(work, i, work.h_next, own_h, own_c);
    if (!kOptions || args.options.reset == nullptr) return;
    for (int64_t i = 0; i < staying; ++i) {
      if (!this->restarts(work.stream, next, work.rows.group + i * work.rows.groups)) continue;
      restart(work, i, own_h, own_c, work.h_next);
      if (masks_h) memset(work.recurrent_next + i * PV + own_h.begin, 0, own_h.size() * sizeof(T));
    }
  }

  // Runs the cell, or the first of its two stages, on one panel of units.
  // from_h null: the recurrent product is zero.
  void first_cells(const Workspace<T>& work, int64_t t, int64_t panel, int64_t active, const T* from_x,
                   const T* from_h) const {
    constexpr int kUnits = FirstStage::kUnits;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      for (int unit = 0; unit < kUnits; ++unit) {
        const int64_t u = panel * FirstStage::kPanelUnits + unit * kWidth, valid = min(kWidth, H - u);
        if (kUnits > 1 && valid <= 0) break;
        V x[FirstStage::kGates], h[FirstStage::kGates], saved[Cell::kSaved + 1];
        first.gates(work.stream, panel, unit, from_x + i * kWide1, from_h == nullptr ? nullptr : from_h + i * kWide1, x,
                    h);
        const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
        V c[Cell::kCellArray] = {};
        for (int k = 0; k < kCells; ++k) c[k] = load(work.c[k] + i * HV + u);
        const bool direct = Cell::kDirect && !projected;
        const V h_prev = direct ? load(work.h + i * PV + u) : V{};
        if constexpr (Cell::kTwoStages) {
          V q[Cell::kFactors], carried[Cell::kCarried];
          Cell::forward_first(x, h, e, h_prev, c, saved, q, carried);
          for (int f = 0; f < Cell::kFactors; ++f) store(work.q + (i * Cell::kFactors + f) * HV + u, q[f]);
          for (int k = 0; k < Cell::kCarried; ++k) store(work.carried + (i * Cell::kCarried + k) * HV + u, carried[k]);
          save(work.stream, n, u, valid, saved, 0, Cell::kSavedFirst);
        } else {
          const V hidden = Cell::forward(x, h, e, h_prev, c, saved);
          store_cells(work, i, n, u, valid, c);
          save(work.stream, n, u, valid, saved, 0, Cell::kStored ? Cell::kSaved : 0);
          if (projected) {
            store(work.m + i * HV + u, hidden);
          } else {
            store_h(work, i, n, u, valid, e, h_prev, hidden);
          }
        }
      }
    }
  }

  void second_cells(const Workspace<T>& work, int64_t t, int64_t panel, int64_t active, const T* from_x) const {
    if constexpr (Cell::kTwoStages) {
      using Second = SecondStage<Cell>;
      for (int64_t i = 0; i < active; ++i) {
        const int64_t n = work.rows.packed(t, i);
        for (int unit = 0; unit < Second::kUnits; ++unit) {
          const int64_t u = panel * Second::kPanelUnits + unit * kWidth, valid = min(kWidth, H - u);
          if (valid <= 0) break;
          V x[Second::kGates], h[Second::kGates], saved[Cell::kSaved], carried[Cell::kCarried];
          second.gates(work.stream, panel, unit, from_x + i * kWide2, work.from_h + i * kWide2, x, h);
          for (int k = 0; k < Cell::kCarried; ++k) carried[k] = load(work.carried + (i * Cell::kCarried + k) * HV + u);
          const auto e = this->options_at(work.stream, n, work.rows.sequence(i), u, valid);
          const V h_prev = load(work.h + i * PV + u);
          V c[Cell::kCellArray] = {};
          for (int k = 0; k < kCells; ++k) c[k] = load(work.c[k] + i * HV + u);
          const V hidden = Cell::forward_second(x, h, e, h_prev, carried, c, saved);
          store_cells(work, i, n, u, valid, c);
          save(work.stream, n, u, valid, saved, Cell::kSavedFirst, Cell::kSaved);
          store_h(work, i, n, u, valid, e, h_prev, hidden);
        }
      }
    }
  }

  // Stores the new cells of a vector of units.
  SEQKERNELS_INLINE void store_cells(const Workspace<T>& work, int64_t i, int64_t n, int64_t u, int64_t valid,
                                     const V* c) const {
    for (int k = 0; k < kCells; ++k) {
      store(work.c[k] + i * HV + u, c[k]);
      if (out.cells[k] != nullptr) {
        store(static_cast<S*>(out.cells[k]) + this->cell_at(n, work.stream) + u, c[k], valid);
      }
    }
  }

  // Stores saved vectors [from, to); saved[0] is vector `from`.
  SEQKERNELS_INLINE void save(int64_t stream, int64_t n, int64_t u, int64_t valid, const V* saved, int from,
                              int to) const {
    if (from == to || out.saved == nullptr) return;
    S* at = static_cast<S*>(out.saved) + this->saved_at(n, stream) + u;
    for (int k = from; k < to; ++k) store(at + k * all_H, saved[k - from], valid);
  }

  // Stores the new h of a vector of units; layers without projection.
  SEQKERNELS_INLINE void store_h(const Workspace<T>& work, int64_t i, int64_t n, int64_t u, int64_t valid,
                                 const typename L::O& e, V h_prev, V hidden) const {
    hidden = zoneout_h(e, h_prev, hidden);
    if (out.y != nullptr) store(static_cast<S*>(out.y) + this->y_at(n, work.stream) + u, hidden, valid);
    store(work.h_next + i * PV + u, hidden);
    if constexpr (kOptions) {
      if (masks_h) store(work.recurrent_next + i * PV + u, recurrent_input(e, hidden));
    }
  }

  // One panel of h = m W_hr^T.
  void project(const Workspace<T>& work, int64_t t, int64_t panel, int64_t active, const Activations& m) const {
    if (args.prepared == nullptr) {
      const auto operand = hr(work.stream);
      const T* packed = packed_hr == nullptr ? nullptr : packed_hr + work.stream * operand.packed_size();
      panel_product(operand, packed, work.scratch, panel, active, work.m, HV, work.from_h, kPanel<T>, Into::kReplace);
    } else if constexpr (std::is_same_v<S, float>) {
      const PreparedLayer& prepared = *args.prepared;
      const PackedMatrix& w = prepared.weights[this->direction(work.stream)].w_hr;
      prepared.kernels.product({{prepared.precision, 1, P, H},
                                w.values,
                                w.scales,
                                P,
                                panel * kPanel<T>,
                                active,
                                m,
                                work.from_h,
                                kPanel<T>,
                                false});
    }
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = work.rows.packed(t, i);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, P - u);
        if (valid <= 0) break;
        const V value = rounded<S>(load(work.from_h + i * kPanel<T> + v * kWidth));
        if (out.y != nullptr) store(static_cast<S*>(out.y) + this->y_at(n, work.stream) + u, value, valid);
        store(work.h_next + i * PV + u, value);
      }
      if (masks_h) {
        const Range own = {panel * kPanel<T>, min(P, (panel + 1) * kPanel<T>)};
        mask_h(work, i, own, work.h_next + i * PV, work.recurrent_next + i * PV);
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
