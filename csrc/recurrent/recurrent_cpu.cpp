// Recurrent layers on a CPU, forward and backward. Compiled once per instruction set.
//
// Forward: a thread walks the whole sequence. Time is taken in chunks of rows: the input's share of the gates is one
// product for a chunk (it stays in the second-level cache), then each step adds h W_hh^T panel by panel and runs the
// cell on the panel while it is hot. Backward: the same walk the other way leaves the gradients of the pre-activations
// in one [N, 4H] buffer, and everything else (dx and all weight gradients) is a product over that buffer after the
// loop.
//
// Threads form teams (one per direction and row group, see Plan); the members of a team own disjoint hidden units and
// meet at a barrier once a step. All threads fork once for the whole layer. Who owns what never enters into a sum.

#include "common/gemm.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "recurrent/cells.h"
#include "recurrent/recurrent.h"

namespace seqkernels::SEQKERNELS_ISA {
namespace {

// Rows per chunk of the forward loop and of dx: large enough to read the weights seldom, small enough that a chunk
// of pre-activations stays in a second-level cache of 1 MiB.
constexpr int64_t kChunkRows = 96;

// Weight gradients sum over all tokens: chains near the square root of their number round least.
constexpr int64_t kOuterChain = 32;

struct Arena {
  char* at = nullptr;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += round_up(n * int64_t{sizeof(T)}, 64);
    return p;
  }
};

// A share [begin, end) of something.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range share(int64_t total, int64_t parts, int64_t first, int64_t last) {
  return {part(total, parts, first), part(total, parts, last)};
}

// What one thread plays of one team: members [first, last) of its unit_groups, in one direction and row group.
struct Member {
  int64_t direction, group, first, last;
  Barrier* barrier;
  void meet() const { barrier->arrive_and_wait(last - first); }
};

struct Teams {
  const RecurrentArgs& args;
  Barrier* barriers;  // one per team
  Barrier everyone;

  int64_t count() const { return args.directions * args.plan.row_groups; }
  int64_t members() const { return count() * args.plan.unit_groups; }

  // Calls f for each team that members [begin, end) of all take part in.
  template <class F>
  void each(int64_t begin, int64_t end, F&& f) const {
    const int64_t units = args.plan.unit_groups;
    for (int64_t team = begin / units; team * units < end; ++team) {
      const int64_t first = team * units < begin ? begin - team * units : 0;
      const int64_t last = min(units, end - team * units);
      f(Member{team / args.plan.row_groups, team % args.plan.row_groups, first, last, barriers + team});
    }
  }
};

// Every row_groups-th of the sequences, longest first: the row groups get nearly the same number of tokens.
struct Rows {
  const Walk& walk;
  int64_t groups, group;

  int64_t upto(int64_t count) const { return (count - group + groups - 1) / groups; }  // of the first count sequences
  int64_t at(int64_t t) const { return upto(walk.batch_sizes[t]); }                    // alive at step t
  int64_t all() const { return upto(walk.B); }
  int64_t sequence(int64_t i) const { return walk.sequence[group + i * groups]; }
  int64_t packed(int64_t t, int64_t i) const { return walk.offsets[t] + group + i * groups; }
};

template <class Cell>
struct Layer {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr int kGates = Cell::kGates;

  const RecurrentArgs& args;
  const Walk& walk = args.walk;
  const int64_t D = args.D, H = args.H, P = args.P;
  const bool projected = args.weights[0].w_hr != nullptr;
  const int64_t HV = round_up(H, kWidth), PV = round_up(P, kWidth);  // row lengths of padded buffers
  const int64_t group_rows = ceil_div(walk.B, args.plan.row_groups);

  const S* state(const void* p, int64_t direction, int64_t sequence, int64_t width) const {
    return static_cast<const S*>(p) + (direction * walk.B + sequence) * width;
  }
  S* state(void* p, int64_t direction, int64_t sequence, int64_t width) const {
    return static_cast<S*>(p) + (direction * walk.B + sequence) * width;
  }
  int64_t y_offset(int64_t n, int64_t direction) const { return (walk.rows[n] * args.directions + direction) * P; }
  int64_t step(int64_t s, int64_t direction) const { return direction == 0 ? s : walk.T - 1 - s; }
};

// ---- forward
// -----------------------------------------------------------------------------------------------------------

template <class Cell>
struct Forward : Layer<Cell> {
  using L = Layer<Cell>;
  using L::args, L::walk, L::D, L::H, L::P, L::projected, L::HV, L::PV, L::group_rows, L::kGates, L::kWidth;
  using typename L::S;
  using typename L::T;
  using typename L::V;
  static constexpr int kVectors = Cell::kUnits * kGates;
  static constexpr int64_t kGatePanel = kPanel<T, kVectors>, kPanelUnits = Cell::kUnits * kWidth;
  static constexpr int64_t kWidest = kGatePanel > kPanel<T> ? kGatePanel : kPanel<T>;

  const ForwardArgs& out;
  Teams teams;
  Operand<S, kVectors> ih[kMaxDirections], hh[kMaxDirections];
  Operand<S> hr[kMaxDirections];
  // Weights used for one step only are packed chunk by chunk as they are used, not beforehand.
  const bool pack_first = walk.T > 1;
  const int64_t chunk_rows = group_rows > kChunkRows ? group_rows : min(kChunkRows, walk.N);
  T *packed_ih[kMaxDirections], *packed_hh[kMaxDirections], *packed_hr[kMaxDirections];
  T *bias_ih[kMaxDirections], *bias_hh[kMaxDirections];  // in the order of the panels
  T *h[2], *c, *m;                              // [teams, group_rows, PV or HV]; m is o * tanh(c) before the projection
  T *x_rows, *x_products, *h_products, *block;  // per member

  explicit Forward(const ForwardArgs& a) : L{a}, out(a), teams{a, nullptr, {}} {
    for (int64_t d = 0; d < args.directions; ++d) {
      const Weights& w = args.weights[d];
      ih[d] = {static_cast<const S*>(w.w_ih), D, D, {H, Cell::kUnits}, Side::kRowsAreColumns};
      hh[d] = {static_cast<const S*>(w.w_hh), P, P, {H, Cell::kUnits}, Side::kRowsAreColumns};
      hr[d] = {static_cast<const S*>(w.w_hr), H, H, {P, kPlainVectors}, Side::kRowsAreColumns};
    }
  }

  int64_t gate_panels() const { return ih[0].panels(); }
  int64_t member_panels() const { return ceil_div(gate_panels(), args.plan.unit_groups); }

  void carve(Arena& arena) {
    for (int64_t d = 0; d < args.directions; ++d) {
      packed_ih[d] = pack_first ? arena.take<T>(ih[d].packed_size()) : nullptr;
      packed_hh[d] = pack_first ? arena.take<T>(hh[d].packed_size()) : nullptr;
      packed_hr[d] = pack_first && projected ? arena.take<T>(hr[d].packed_size()) : nullptr;
      bias_ih[d] = arena.take<T>(gate_panels() * kGatePanel);
      bias_hh[d] = arena.take<T>(gate_panels() * kGatePanel);
    }
    const int64_t states = teams.count() * group_rows;
    h[0] = arena.take<T>(states * PV);
    h[1] = arena.take<T>(states * PV);
    c = Cell::kHasC ? arena.take<T>(states * HV) : nullptr;
    m = projected ? arena.take<T>(states * HV) : nullptr;
    x_rows = arena.take<T>(teams.members() * chunk_rows * D);
    x_products = arena.take<T>(teams.members() * member_panels() * chunk_rows * kGatePanel);
    h_products = arena.take<T>(teams.members() * group_rows * kWidest);
    block = arena.take<T>(teams.members() * kBlock * kWidest);
  }

  void run() {
    Arena arena;
    carve(arena);
    const Memory memory(reinterpret_cast<int64_t>(arena.at));
    arena.at = memory.get();
    carve(arena);
    Barrier barriers[kMaxTeams];
    for (int64_t i = 0; i < teams.count(); ++i) barriers[i].reset(args.plan.unit_groups);
    teams.barriers = barriers;
    teams.everyone.reset(teams.members());
    auto body = [this](int64_t begin, int64_t end) { play(begin, end); };
    if (args.plan.threads == 1) return body(0, teams.members());
    parallel_pieces(teams.members(), body);
  }

  void play(int64_t begin, int64_t end) {
    for (int64_t d = 0; d < args.directions; ++d) {
      // In members' order: with one row group, a member packs the very panels that it will read.
      const int64_t each = teams.members() / args.directions;
      const Range mine = {begin - d * each < 0 ? 0 : begin - d * each, min(each, end - d * each)};
      if (mine.size() <= 0) continue;
      const Range gates = share(gate_panels(), each, mine.begin, mine.end);
      pack_bias(d, gates);
      if (!pack_first) continue;
      ih[d].pack_panels(gates.begin, gates.end, packed_ih[d]);
      hh[d].pack_panels(gates.begin, gates.end, packed_hh[d]);
      if (!projected) continue;
      const Range outputs = share(hr[d].panels(), each, mine.begin, mine.end);
      hr[d].pack_panels(outputs.begin, outputs.end, packed_hr[d]);
    }
    teams.everyone.arrive_and_wait(end - begin);
    teams.each(begin, end, [&](const Member& member) { walk_sequences(member, begin); });
  }

  // Both biases where the cell tells the products apart, else their sum beside the product with h.
  void pack_bias(int64_t d, Range panels) const {
    const Weights& w = args.weights[d];
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t first = ih[d].columns.template first<T>(p, v), n = ih[d].columns.template valid<T>(p, v);
        const int64_t at = p * kGatePanel + v * kWidth;
        V of_x = {}, of_h = {};
        if (w.b_ih != nullptr && n > 0) {
          of_x = load(static_cast<const S*>(w.b_ih) + first, n);
          of_h = load(static_cast<const S*>(w.b_hh) + first, n);
        }
        store(bias_ih[d] + at, of_x);
        store(bias_hh[d] + at, Cell::kSeparate ? of_h : of_x + of_h);
      }
    }
  }

  void walk_sequences(const Member& member, int64_t slot) {
    const int64_t d = member.direction;
    const Rows rows{walk, args.plan.row_groups, member.group};
    const int64_t units = args.plan.unit_groups;
    const Range panels = share(gate_panels(), units, member.first, member.last);
    const Range own = {min(H, panels.begin * kPanelUnits), min(H, panels.end * kPanelUnits)};
    const Range outputs = projected ? share(hr[d].panels(), units, member.first, member.last) : Range{0, 0};
    const Range own_h = projected ? Range{min(P, outputs.begin * kPanel<T>), min(P, outputs.end * kPanel<T>)} : own;

    const int64_t team = d * args.plan.row_groups + member.group;
    T* h_now = h[0] + team * group_rows * PV;
    T* h_next = h[1] + team * group_rows * PV;
    T* c_now = Cell::kHasC ? c + team * group_rows * HV : nullptr;
    T* m_now = projected ? m + team * group_rows * HV : nullptr;
    T* x_chunk = x_rows + slot * chunk_rows * D;
    T* from_x = x_products + slot * member_panels() * chunk_rows * kGatePanel;
    T* from_h = h_products + slot * group_rows * kWidest;
    T* scratch = block + slot * kBlock * kWidest;

    for (int64_t i = 0; i < rows.all(); ++i) {
      const int64_t b = rows.sequence(i);
      start_state(args.h0, d, b, P, own_h, h_now + i * PV);
      memcpy(h_next + i * PV + own_h.begin, h_now + i * PV + own_h.begin, own_h.size() * sizeof(T));
      if constexpr (Cell::kHasC) {
        start_state(args.c0, d, b, H, own, c_now + i * HV);
        for (int64_t u = own.end; u < round_up(own.end, kWidth); ++u) c_now[i * HV + u] = 0;
      }
    }
    for (int64_t i = walk.T > 0 ? rows.at(0) : 0; i < rows.all(); ++i) {  // sequences of length zero
      finish(d, rows.sequence(i), h_now + i * PV, own_h, c_now + i * HV, own);
    }
    member.meet();

    bool zero_h = args.h0 == nullptr;
    for (int64_t s = 0, next; s < walk.T; s = next) {
      const int64_t in_chunk = gather_chunk(rows, d, s, next, x_chunk);
      if (in_chunk == 0) continue;
      for (int64_t p = panels.begin; p < panels.end; ++p) {
        panel_product(ih[d], packed_ih[d], scratch, p, in_chunk, x_chunk, D,
                      from_x + (p - panels.begin) * chunk_rows * kGatePanel, kGatePanel, Into::kReplace);
      }
      for (int64_t row = 0; s < next; ++s) {
        const int64_t t = this->step(s, d), alive = rows.at(t);
        if (alive == 0) continue;
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          if (!zero_h) {
            panel_product(hh[d], packed_hh[d], scratch, p, alive, h_now, PV, from_h, kGatePanel, Into::kReplace);
          }
          cells(rows, d, t, p, alive, from_x + ((p - panels.begin) * chunk_rows + row) * kGatePanel,
                zero_h ? nullptr : from_h, h_now, c_now, projected ? m_now : h_next);
        }
        if (projected) {
          member.meet();
          for (int64_t p = outputs.begin; p < outputs.end; ++p) {
            project(rows, d, t, p, alive, m_now, h_next, scratch, from_h);
          }
        }
        // Sequences end where the walk meets their last step.
        const int64_t staying = d == 1 ? (t > 0 ? alive : 0) : (t + 1 < walk.T ? rows.at(t + 1) : 0);
        for (int64_t i = staying; i < alive; ++i) {
          finish(d, rows.sequence(i), h_next + i * PV, own_h, c_now + i * HV, own);
        }
        T* const swap = h_now;
        h_now = h_next;
        h_next = swap;
        zero_h = false;
        row += alive;
        member.meet();
      }
    }
  }

  // Copies the rows of x of as many steps from s on as fit a chunk, in the order of the walk; next: the first that did
  // not.
  int64_t gather_chunk(const Rows& rows, int64_t d, int64_t s, int64_t& next, T* to) const {
    int64_t count = 0;
    for (next = s; next < walk.T; ++next) {
      const int64_t t = this->step(next, d), alive = rows.at(t);
      if (next > s && count + alive > chunk_rows) break;
      for (int64_t i = 0; i < alive; ++i, ++count) {
        convert(to + count * D, static_cast<const S*>(args.x) + walk.x_offsets[rows.packed(t, i)], D);
      }
    }
    return count;
  }

  void start_state(const void* from, int64_t d, int64_t b, int64_t width, Range own, T* to) const {
    if (from == nullptr) {
      for (int64_t u = own.begin; u < own.end; ++u) to[u] = 0;
    } else {
      convert(to + own.begin, this->state(from, d, b, width) + own.begin, own.size());
    }
  }

  void finish(int64_t d, int64_t b, const T* h_row, Range own_h, const T* c_row, Range own) const {
    convert(this->state(out.h_n, d, b, P) + own_h.begin, h_row + own_h.begin, own_h.size());
    if (Cell::kHasC) convert(this->state(out.c_n, d, b, H) + own.begin, c_row + own.begin, own.size());
  }

  // The cell on one panel of units, from the two products (from_h null: zero). h_to: the next h, or what is projected.
  void cells(const Rows& rows, int64_t d, int64_t t, int64_t panel, int64_t alive, const T* from_x, const T* from_h,
             const T* h_rows, T* c_rows, T* h_to) const {
    const int64_t ld = projected ? HV : PV;
    const T *b_ih = bias_ih[d] + panel * kGatePanel, *b_hh = bias_hh[d] + panel * kGatePanel;
    for (int64_t i = 0; i < alive; ++i) {
      const int64_t n = rows.packed(t, i);
      for (int unit = 0; unit < Cell::kUnits; ++unit) {
        const int64_t u = panel * kPanelUnits + unit * kWidth, valid = min(kWidth, H - u);
        if (Cell::kUnits > 1 && valid <= 0) break;
        V x[kGates], h[kGates], saved[Cell::kSaved + 1];
        for (int g = 0; g < kGates; ++g) {
          const int64_t at = (g * Cell::kUnits + unit) * kWidth;
          x[g] = load(from_x + i * kGatePanel + at);
          if (Cell::kSeparate) x[g] += load(b_ih + at);
          h[g] = load(b_hh + at);
          if (from_h != nullptr) h[g] += load(from_h + i * kGatePanel + at);
        }
        V cell = Cell::kHasC ? load(c_rows + i * HV + u) : V{};
        V hidden = Cell::forward(x, h, Cell::kDirect ? load(h_rows + i * PV + u) : V{}, cell, saved);
        if (!projected) {
          hidden = rounded<S>(hidden);
          store(static_cast<S*>(out.y) + this->y_offset(n, d) + u, hidden, valid);
        }
        store(h_to + i * ld + u, hidden);
        if (Cell::kHasC) store(c_rows + i * HV + u, cell);
        if (Cell::kHasC && out.cells != nullptr) {
          store(static_cast<S*>(out.cells) + (d * args.saved_rows + n) * H + u, cell, valid);
        }
        if (Cell::kSaved > 0 && out.saved != nullptr) {
          S* to = static_cast<S*>(out.saved) + (d * args.saved_rows + n) * Cell::kSaved * H + u;
          for (int k = 0; k < Cell::kSaved; ++k) store(to + k * H, saved[k], valid);
        }
      }
    }
  }

  // One panel of h = m W_hr^T.
  void project(const Rows& rows, int64_t d, int64_t t, int64_t panel, int64_t alive, const T* m_rows, T* h_to,
               T* scratch, T* tile) const {
    panel_product(hr[d], packed_hr[d], scratch, panel, alive, m_rows, HV, tile, kPanel<T>, Into::kReplace);
    for (int64_t i = 0; i < alive; ++i) {
      S* to = static_cast<S*>(out.y) + this->y_offset(rows.packed(t, i), d);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, P - u);
        if (valid <= 0) break;
        const V value = rounded<S>(load(tile + i * kPanel<T> + v * kWidth));
        store(to + u, value, valid);
        store(h_to + i * PV + u, value);
      }
    }
  }
};

// ---- backward
// ----------------------------------------------------------------------------------------------------------

// Columns [m.begin, m.end) of A, transposed, times B: out[m, n] = sum over rows of A[row, m] * B[row, n], the rows in
// order. B's rows are wherever row(r) says (null: zeros).
template <class T>
struct OuterProduct {
  T *left, *right, *sums, *column_sums;
  int64_t cap;  // of columns of A

  static void measure(Arena& arena, int64_t members, int64_t cap, int64_t panels, OuterProduct& p) {
    cap = round_up(cap, kLanes<T>);
    p.cap = cap;
    p.left = arena.take<T>(members * cap * kBlock);
    p.right = arena.take<T>(members * kBlock * kPanel<T>);
    p.sums = arena.take<T>(members * panels * cap * kPanel<T>);
    p.column_sums = arena.take<T>(members * cap);
  }
  OuterProduct of(int64_t member, int64_t panels) const {
    return {left + member * cap * kBlock, right + member * kBlock * kPanel<T>, sums + member * panels * cap * kPanel<T>,
            column_sums + member * cap, cap};
  }

  // Rows [r0, r0 + k) of A into left [m][k]; their sums into column_sums.
  void take_left(const T* a, int64_t lda, Range m, int64_t r0, int64_t k, bool first) const {
    constexpr int kWidth = kLanes<T>;
    for (int64_t j = 0; j < m.size(); j += kWidth) {
      const int64_t valid = min(kWidth, m.size() - j);
      Native<T> sum = first ? Native<T>{} : load(column_sums + j);
      for (int64_t i = 0; i < k; i += kWidth) {
        const int64_t n = min(kWidth, k - i);
        const T* from = a + (r0 + i) * lda + m.begin + j;
        Native<T> block[kWidth];
        for (int r = 0; r < kWidth; ++r) block[r] = r < n ? load(from + r * lda, valid) : Native<T>{};
        Native<T> partial = block[0];
        for (int r = 1; r < kWidth; ++r) partial += block[r];
        sum += partial;
        transpose(block);
        for (int r = 0; r < kWidth; ++r) store(left + (j + r) * kBlock + i, block[r]);
      }
      store(column_sums + j, sum);
    }
  }

  // `at`: which panel of sums B starts at.
  template <class R, class RowOf>
  void add(int64_t columns, RowOf row, int64_t m, int64_t r0, int64_t k, bool first, int64_t at) const {
    for (int64_t p = 0; p < ceil_div(columns, kPanel<T>); ++p) {
      const int64_t n = min(kPanel<T>, columns - p * kPanel<T>);
      for (int64_t i = 0; i < k; ++i) {
        const R* from = row(r0 + i);
        for (int v = 0; v < kPlainVectors; ++v) {
          const int64_t c = v * kLanes<T>, valid = min(kLanes<T>, n - c);
          store(right + i * kPanel<T> + c,
                from != nullptr && valid > 0 ? load(from + p * kPanel<T> + c, valid) : Native<T>{});
        }
      }
      tile_rows<kPlainVectors>(m, k, kOuterChain, left, kBlock, right, sums + (at + p) * cap * kPanel<T>, kPanel<T>,
                               first ? Into::kReplace : Into::kAdd);
    }
  }

  template <class R, class RowOf>
  void accumulate(const T* a, int64_t lda, Range m, int64_t rows, int64_t columns, RowOf row, int64_t at) const {
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t k = min(kBlock, rows - r);
      take_left(a, lda, m, r, k, r == 0);
      add<R>(columns, row, m.size(), r, k, r == 0, at);
    }
  }

  template <class S>
  void write_sums(S* to, Range m, bool empty) const {
    if (to == nullptr) return;
    if (empty) {
      memset(static_cast<void*>(to + m.begin), 0, m.size() * sizeof(S));
    } else {
      convert(to + m.begin, column_sums, m.size());
    }
  }

  template <class S>
  void write(S* to, int64_t columns, Range m, int64_t at, bool empty) const {
    for (int64_t j = 0; j < m.size(); ++j) {
      for (int64_t c = 0; c < columns; c += kPanel<T>) {
        S* row = to + (m.begin + j) * columns + c;
        const int64_t n = min(kPanel<T>, columns - c);
        if (empty) {
          memset(static_cast<void*>(row), 0, n * sizeof(S));
        } else {
          convert(row, sums + ((at + c / kPanel<T>)*cap + j) * kPanel<T>, n);
        }
      }
    }
  }
};

template <class Cell>
struct Backward : Layer<Cell> {
  using L = Layer<Cell>;
  using L::args, L::walk, L::D, L::H, L::P, L::projected, L::HV, L::PV, L::group_rows, L::kGates, L::kWidth;
  using typename L::S;
  using typename L::T;
  using typename L::V;

  const BackwardArgs& grad;
  Teams teams;
  const int64_t G = kGates * H;
  Operand<S> ih[kMaxDirections], hh[kMaxDirections], hr[kMaxDirections];
  const int64_t tile_height = group_rows > kChunkRows ? group_rows : kChunkRows;
  T *packed_ih[kMaxDirections], *packed_hh[kMaxDirections], *packed_hr[kMaxDirections];
  T *dgates_x, *dgates_h;  // [directions, N, G] gradients of the two products; one buffer where they are the same
  T *dh_rows, *m_rows;     // projected: [directions, N, P] gradient of h, [directions, N, H] o * tanh(c)
  T *dc, *direct;          // [teams, group_rows, HV]
  T* tiles;                // [members, tile_height, kPanel]
  const S** h_prev;        // [directions, N] where the h that a row started from is; null for zeros
  OuterProduct<T> outer;

  explicit Backward(const BackwardArgs& a) : L{a}, grad(a), teams{a, nullptr, {}} {
    for (int64_t d = 0; d < args.directions; ++d) {
      const Weights& w = args.weights[d];
      ih[d] = {static_cast<const S*>(w.w_ih), G, D, {D, kPlainVectors}, Side::kAsIs};
      hh[d] = {static_cast<const S*>(w.w_hh), G, P, {P, kPlainVectors}, Side::kAsIs};
      hr[d] = {static_cast<const S*>(w.w_hr), P, H, {H, kPlainVectors}, Side::kAsIs};
    }
  }

  int64_t columns_to_panels(int64_t columns) const { return ceil_div(columns, kPanel<T>); }
  int64_t outer_panels() const {
    const int64_t gates = columns_to_panels(D) + columns_to_panels(P), projection = columns_to_panels(H);
    return projected && projection > gates ? projection : gates;
  }
  int64_t outer_columns() const {
    const int64_t total = args.directions * (projected && P > G ? P : G);
    return ceil_div(total, teams.members());
  }

  void carve(Arena& arena) {
    for (int64_t d = 0; d < args.directions; ++d) {
      packed_ih[d] = grad.dx != nullptr ? arena.take<T>(ih[d].packed_size()) : nullptr;
      packed_hh[d] = arena.take<T>(hh[d].packed_size());
      packed_hr[d] = projected ? arena.take<T>(hr[d].packed_size()) : nullptr;
    }
    dgates_x = arena.take<T>(args.directions * walk.N * G);
    dgates_h = Cell::kSeparate ? arena.take<T>(args.directions * walk.N * G) : dgates_x;
    dh_rows = projected ? arena.take<T>(args.directions * walk.N * P) : nullptr;
    m_rows = projected ? arena.take<T>(args.directions * walk.N * H) : nullptr;
    dc = Cell::kHasC ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    direct = Cell::kDirect ? arena.take<T>(teams.count() * group_rows * HV) : nullptr;
    tiles = arena.take<T>(teams.members() * tile_height * kPanel<T>);
    h_prev = arena.take<const S*>(args.directions * walk.N);
    if (grad.weights_wanted) OuterProduct<T>::measure(arena, teams.members(), outer_columns(), outer_panels(), outer);
  }

  void run() {
    Arena arena;
    carve(arena);
    const Memory memory(reinterpret_cast<int64_t>(arena.at));
    arena.at = memory.get();
    carve(arena);
    Barrier barriers[kMaxTeams];
    for (int64_t i = 0; i < teams.count(); ++i) barriers[i].reset(args.plan.unit_groups);
    teams.barriers = barriers;
    teams.everyone.reset(teams.members());
    auto body = [this](int64_t begin, int64_t end) { play(begin, end); };
    if (args.plan.threads == 1) return body(0, teams.members());
    parallel_pieces(teams.members(), body);
  }

  void play(int64_t begin, int64_t end) {
    const int64_t all = teams.members();
    for (int64_t d = 0; d < args.directions; ++d) {
      const auto pack = [&](const Operand<S>& operand, T* packed) {
        const Range mine = share(operand.panels(), all, begin, end);
        operand.pack_panels(mine.begin, mine.end, packed);
      };
      pack(hh[d], packed_hh[d]);
      if (grad.dx != nullptr) pack(ih[d], packed_ih[d]);
      if (projected) pack(hr[d], packed_hr[d]);
      find_previous(d, share(walk.T, all, begin, end));
    }
    teams.everyone.arrive_and_wait(end - begin);
    teams.each(begin, end, [&](const Member& member) { walk_sequences(member, begin); });
    teams.everyone.arrive_and_wait(end - begin);
    if (grad.dx != nullptr) input_gradient(share(walk.N, all, begin, end), tiles + begin * tile_height * kPanel<T>);
    if (grad.weights_wanted) weight_gradients(begin, end);
  }

  // Whether step t of the j-th sequence has one before it in the direction of the walk; n: its packed row.
  bool previous(int64_t d, int64_t t, int64_t j, int64_t& n) const {
    const int64_t before = d == 0 ? t - 1 : t + 1;
    if (before < 0 || before >= walk.T || j >= walk.batch_sizes[before]) return false;
    n = walk.offsets[before] + j;
    return true;
  }

  void find_previous(int64_t d, Range steps) {
    for (int64_t t = steps.begin; t < steps.end; ++t) {
      for (int64_t j = 0; j < walk.batch_sizes[t]; ++j) {
        int64_t n;
        const S* row = args.h0 != nullptr ? this->state(args.h0, d, walk.sequence[j], P) : nullptr;
        if (previous(d, t, j, n)) row = static_cast<const S*>(grad.y) + this->y_offset(n, d);
        h_prev[d * walk.N + walk.offsets[t] + j] = row;
      }
    }
  }

  void walk_sequences(const Member& member, int64_t slot) {
    const int64_t d = member.direction, units = args.plan.unit_groups;
    const Rows rows{walk, args.plan.row_groups, member.group};
    const int64_t unit_panels = columns_to_panels(H);
    const Range panels = share(unit_panels, units, member.first, member.last);
    const Range own = {min(H, panels.begin * kPanel<T>), min(H, panels.end * kPanel<T>)};
    const Range fed_back = share(hh[d].panels(), units, member.first, member.last);
    T* tile = tiles + slot * tile_height * kPanel<T>;
    const int64_t team_rows = (d * args.plan.row_groups + member.group) * group_rows;
    T* dc_now = Cell::kHasC ? dc + team_rows * HV : nullptr;
    T* direct_now = Cell::kDirect ? direct + team_rows * HV : nullptr;

    for (int64_t i = 0; Cell::kHasC && i < rows.all(); ++i) {
      for (int64_t u = own.begin; u < own.end; u += kWidth) {
        const int64_t valid = min(kWidth, own.end - u);
        store(dc_now + i * HV + u,
              grad.dc_n == nullptr ? V{} : load(this->state(grad.dc_n, d, rows.sequence(i), H) + u, valid));
      }
    }

    int64_t before = 0, before_t = 0;  // rows and step of the walk's last step
    for (int64_t s = walk.T - 1; s >= 0; --s) {
      const int64_t t = this->step(s, d), alive = rows.at(t);
      if (alive == 0 && before == 0) continue;
      for (int64_t p = fed_back.begin; p < fed_back.end; ++p) {
        returning(rows, d, before_t, before, p, direct_now, tile);
        if (projected) {
          output_gradient(rows, d, t, alive, before, p, tile);
        } else {
          cells(rows, d, t, alive, before, p, tile, dc_now, direct_now);
        }
        leave(rows, d, alive, before, p, tile);
      }
      if (projected) {
        member.meet();
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          const T* dh = dh_rows + (d * walk.N + rows.packed(t, 0)) * P;
          panel_product(hr[d], packed_hr[d], nullptr, p, alive, dh, rows.groups * P, tile, kPanel<T>, Into::kReplace);
          cells(rows, d, t, alive, alive, p, tile, dc_now, direct_now);
        }
      }
      before = alive;
      before_t = t;
      member.meet();
    }
    for (int64_t p = fed_back.begin; p < fed_back.end; ++p) {
      if (grad.dh0 == nullptr) break;
      returning(rows, d, before_t, before, p, direct_now, tile);
      leave(rows, d, 0, before, p, tile);
    }
    for (int64_t i = 0; i < rows.all(); ++i) {
      const int64_t b = rows.sequence(i);
      if (Cell::kHasC && grad.dc0 != nullptr) {
        convert(this->state(grad.dc0, d, b, H) + own.begin, dc_now + i * HV + own.begin, own.size());
      }
      if (grad.dh0 == nullptr || (walk.T > 0 && i < rows.at(0))) continue;
      for (int64_t u = min(P, fed_back.begin * kPanel<T>); u < min(P, fed_back.end * kPanel<T>); ++u) {  // length zero
        const S zero{};
        this->state(grad.dh0, d, b, P)[u] = grad.dh_n != nullptr ? this->state(grad.dh_n, d, b, P)[u] : zero;
      }
    }
  }

  // One panel of what the step before sends back to the h it started from: dgates W_hh, and what h passed on directly.
  void returning(const Rows& rows, int64_t d, int64_t before_t, int64_t before, int64_t panel, const T* direct_rows,
                 T* tile) const {
    if (before == 0) return;
    const T* from = dgates_h + (d * walk.N + rows.packed(before_t, 0)) * G;
    panel_product(hh[d], packed_hh[d], nullptr, panel, before, from, rows.groups * G, tile, kPanel<T>, Into::kReplace);
    if constexpr (Cell::kDirect) {
      for (int64_t i = 0; i < before; ++i) {
        for (int64_t c = 0; c < kPanel<T> && panel * kPanel<T> + c < HV; c += kWidth) {
          T* at = tile + i * kPanel<T> + c;
          store(at, load(at) + load(direct_rows + i * HV + panel * kPanel<T> + c));
        }
      }
    }
  }

  // The gradient of h at (t, i) in a vector of units: what came back from the next step (or from h_n) plus dy.
  V incoming(const Rows& rows, int64_t d, int64_t n, int64_t i, int64_t before, int64_t u, int64_t valid,
             const T* from) const {
    V dh = {};
    if (i < before) {
      dh = load(from);
    } else if (grad.dh_n != nullptr) {
      dh = load(this->state(grad.dh_n, d, rows.sequence(i), P) + u, valid);
    }
    if (grad.dy != nullptr) dh += load(static_cast<const S*>(grad.dy) + this->y_offset(n, d) + u, valid);
    return dh;
  }

  void output_gradient(const Rows& rows, int64_t d, int64_t t, int64_t alive, int64_t before, int64_t panel,
                       const T* tile) const {
    for (int64_t i = 0; i < alive; ++i) {
      const int64_t n = rows.packed(t, i);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, P - u);
        if (valid <= 0) break;
        const V dh = incoming(rows, d, n, i, before, u, valid, tile + i * kPanel<T> + v * kWidth);
        store(dh_rows + (d * walk.N + n) * P + u, dh, valid);
      }
    }
  }

  // The cell's backward on one panel of units. tile: gradient of the cell's h [alive, kPanel].
  void cells(const Rows& rows, int64_t d, int64_t t, int64_t alive, int64_t before, int64_t panel, const T* tile,
             T* dc_rows, T* direct_rows) const {
    for (int64_t i = 0; i < alive; ++i) {
      const int64_t n = rows.packed(t, i), j = rows.group + i * rows.groups, saved_row = d * args.saved_rows + n;
      const S* kept = static_cast<const S*>(grad.saved) + saved_row * Cell::kSaved * H;
      const S* c_row = Cell::kHasC ? static_cast<const S*>(grad.cells) + saved_row * H : nullptr;
      const S* c_prev_row = Cell::kHasC ? c_before(d, t, j) : nullptr;
      const S* h_prev_row = h_prev[d * walk.N + n];
      const S* y_row = static_cast<const S*>(grad.y) + this->y_offset(n, d);
      for (int v = 0; v < kPlainVectors; ++v) {
        const int64_t u = panel * kPanel<T> + v * kWidth, valid = min(kWidth, H - u);
        if (valid <= 0) break;
        const T* from = tile + i * kPanel<T> + v * kWidth;
        const V dh = projected ? load(from) : incoming(rows, d, n, i, before, u, valid, from);
        V saved[Cell::kSaved + 1], c = {}, c_prev = {}, dc_vector = {}, h = {}, h_before = {};
        for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(kept + k * H + u, valid);
        if constexpr (Cell::kHasC) {
          c = load(c_row + u, valid);
          if (c_prev_row != nullptr) c_prev = load(c_prev_row + u, valid);
          dc_vector = load(dc_rows + i * HV + u);
          // What was projected: o * tanh(c) is the only output of a cell that can be.
          if (projected) store(m_rows + (d * walk.N + n) * H + u, saved[3] * tanh<T>(c), valid);
        }
        if (Cell::kSaved == 0) h = load(y_row + u, valid);
        if (Cell::kDirect && h_prev_row != nullptr) h_before = load(h_prev_row + u, valid);
        StepGradient<V> step;
        Cell::backward(saved, h, h_before, c, c_prev, dh, dc_vector, step);
        if constexpr (Cell::kHasC) store(dc_rows + i * HV + u, dc_vector);
        if constexpr (Cell::kDirect) store(direct_rows + i * HV + u, step.direct);
        const int64_t at = (d * walk.N + n) * G + u;
        for (int g = 0; g < kGates; ++g) {
          store(dgates_x + at + g * H, step.x[g], valid);
          if constexpr (Cell::kSeparate) store(dgates_h + at + g * H, step.h[g], valid);
        }
      }
    }
  }

  // The c that step t of the j-th sequence started from; null for zeros.
  const S* c_before(int64_t d, int64_t t, int64_t j) const {
    int64_t n;
    if (previous(d, t, j, n)) return static_cast<const S*>(grad.cells) + (d * args.saved_rows + n) * H;
    return args.c0 != nullptr ? this->state(args.c0, d, walk.sequence[j], H) : nullptr;
  }

  // Sequences that the walk has left behind: what came back is the gradient of h0.
  void leave(const Rows& rows, int64_t d, int64_t alive, int64_t before, int64_t panel, const T* tile) const {
    if (grad.dh0 == nullptr) return;
    const int64_t u = panel * kPanel<T>;
    for (int64_t i = alive; i < before; ++i) {
      convert(this->state(grad.dh0, d, rows.sequence(i), P) + u, tile + i * kPanel<T>, min(kPanel<T>, P - u));
    }
  }

  // dx = sum over directions of dgates W_ih, for packed rows of a range.
  void input_gradient(Range rows, T* tile) const {
    for (int64_t n = rows.begin; n < rows.end; n += kChunkRows) {
      const int64_t count = min(kChunkRows, rows.end - n);
      for (int64_t p = 0; p < ih[0].panels(); ++p) {
        for (int64_t d = 0; d < args.directions; ++d) {
          panel_product(ih[d], packed_ih[d], nullptr, p, count, dgates_x + (d * walk.N + n) * G, G, tile, kPanel<T>,
                        d == 0 ? Into::kReplace : Into::kAdd);
        }
        for (int64_t i = 0; i < count; ++i) {
          convert(static_cast<S*>(grad.dx) + walk.rows[n + i] * D + p * kPanel<T>, tile + i * kPanel<T>,
                  min(kPanel<T>, D - p * kPanel<T>));
        }
      }
    }
  }

  void weight_gradients(int64_t begin, int64_t end) const {
    const int64_t all = teams.members();
    for (int64_t member = begin; member < end; ++member) {
      const OuterProduct<T> product = outer.of(member, outer_panels());
      const Range mine = share(args.directions * G, all, member, member + 1);
      const Range mine_hr = share(args.directions * P, all, member, member + 1);
      for (int64_t d = 0; d < args.directions; ++d) {
        const WeightGradients& dw = grad.dw[d];
        const Range m = within(mine, d * G, G);
        if (m.size() > 0) {
          const int64_t x_panels = columns_to_panels(D);
          const bool bias = dw.b_ih != nullptr;
          const auto of_x = [&](int64_t n) { return static_cast<const S*>(args.x) + walk.x_offsets[n]; };
          const auto of_h = [&](int64_t n) { return h_prev[d * walk.N + n]; };
          if constexpr (Cell::kSeparate) {
            product.template accumulate<S>(dgates_x + d * walk.N * G, G, m, walk.N, D, of_x, 0);
            product.write_sums(bias ? static_cast<S*>(dw.b_ih) : nullptr, m, walk.N == 0);
            product.template accumulate<S>(dgates_h + d * walk.N * G, G, m, walk.N, P, of_h, x_panels);
          } else {
            for (int64_t r = 0; r < walk.N; r += kBlock) {
              const int64_t k = min(kBlock, walk.N - r);
              product.take_left(dgates_x + d * walk.N * G, G, m, r, k, r == 0);
              product.template add<S>(D, of_x, m.size(), r, k, r == 0, 0);
              product.template add<S>(P, of_h, m.size(), r, k, r == 0, x_panels);
            }
            product.write_sums(bias ? static_cast<S*>(dw.b_ih) : nullptr, m, walk.N == 0);
          }
          product.write_sums(bias ? static_cast<S*>(dw.b_hh) : nullptr, m, walk.N == 0);
          product.write(static_cast<S*>(dw.w_ih), D, m, 0, walk.N == 0);
          product.write(static_cast<S*>(dw.w_hh), P, m, x_panels, walk.N == 0);
        }
        const Range m_hr = projected ? within(mine_hr, d * P, P) : Range{0, 0};
        if (m_hr.size() > 0) {
          const auto of_m = [&](int64_t n) -> const T* { return m_rows + (d * walk.N + n) * H; };
          product.template accumulate<T>(dh_rows + d * walk.N * P, P, m_hr, walk.N, H, of_m, 0);
          product.write(static_cast<S*>(dw.w_hr), H, m_hr, 0, walk.N == 0);
        }
      }
    }
  }

  // The part of a range that lies in [start, start + size), counted from start.
  static Range within(Range range, int64_t start, int64_t size) {
    const int64_t begin = range.begin > start ? range.begin - start : 0;
    return {begin, min(size, range.end - start)};
  }
};

template <template <class> class Pass, template <class> class Cell, class Args>
void launch(const Args& args) {
  dispatch(args.dtype, [&](auto storage) { Pass<Cell<decltype(storage)>>(args).run(); });
}

template <template <class> class Cell>
RecurrentKernels kernels_of() {
  return {launch<Forward, Cell, ForwardArgs>, launch<Backward, Cell, BackwardArgs>};
}

}  // namespace

RecurrentKernels recurrent_kernels(CellKind cell) {
  switch (cell) {
    case CellKind::kLSTM:
      return kernels_of<LSTMCell>();
    case CellKind::kGRU:
      return kernels_of<GRUCell>();
    case CellKind::kRNNTanh:
      return kernels_of<RNNTanhCell>();
    case CellKind::kRNNRelu:
      return kernels_of<RNNReluCell>();
  }
  return {};
}

}  // namespace seqkernels::SEQKERNELS_ISA
