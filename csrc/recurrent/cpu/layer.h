// Shared by the passes over a recurrent layer: workspace, division among
// threads, memory layout.
//
// The work consists of teams, one per stream and row group (see Plan). A team of
// one share is run by one thread. A team of several shares, which own disjoint
// hidden units, proceeds in phases, one or more per step (see Phases): a thread
// that arrives late skips the phases that are complete and takes over shares
// from then on. One parallel region covers the whole layer. The order of every
// sum is independent of the division and of the threads.
#pragma once

#include <new>

#include "common/gemm.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "recurrent/cpu/arithmetic.h"
#include "recurrent/recurrent.h"

namespace seqkernels::SEQKERNELS_ISA {

// Rows per chunk of products with the input: large enough to amortise reading
// the weights, small enough that a chunk of pre-activations stays in an L2
// cache of 1 MiB.
constexpr int64_t kChunkRows = 96;

struct Arena {
  char* at = nullptr;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += round_up(n * int64_t{sizeof(T)}, 64);
    return p;
  }
};

// A half-open range [begin, end).
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range share(int64_t total, int64_t parts, int64_t first, int64_t last) {
  return {part(total, parts, first), part(total, parts, last)};
}
// The part of a range that lies in [start, start + size), counted from start.
inline Range within(Range range, int64_t start, int64_t size) {
  const int64_t begin = range.begin > start ? range.begin - start : 0;
  return {begin, min(size, range.end - start)};
}

// A team as one thread sees it. Where teams are joined, `stream` is the direction.
struct Team {
  int64_t stream, group;
  int64_t number;  // among all teams
  int64_t first;   // the share that the thread claims first
  Phases* phases;
  int64_t phase = 0;  // the next one

  // Runs the shares of the next phase.
  template <class F>
  SEQKERNELS_INLINE void run(F&& f) {
    phases->run(phase++, first, f);
  }
};

// joined: the number of teams that proceed in common phases, those of the heads of one direction where a normalisation
// covers all heads; else 1.
struct Teams {
  const RecurrentArgs& args;
  const int64_t joined = 1;
  int64_t threads = 1;              // that run the pass
  Phases* phases = nullptr;         // [count() / joined]
  Phases::Claim* claims = nullptr;  // [2, shares()]
  Phases all = {};                  // phases that cover every team, with all shares

  int64_t streams() const { return args.directions * args.heads; }
  int64_t count() const { return streams() * args.plan.row_groups; }
  int64_t shares() const { return count() * args.plan.unit_groups; }
  int64_t shares_of_team() const { return joined * args.plan.unit_groups; }

  void carve(Arena& arena) {
    phases = arena.take<Phases>(count());
    claims = arena.take<Phases::Claim>(2 * shares());
  }
  void start(Region& region) {
    const int64_t each = shares_of_team();
    for (int64_t i = 0; i < 2 * shares(); ++i) new (claims + i) Phases::Claim;
    for (int64_t i = 0; i * each < shares(); ++i) {
      (new (phases + i) Phases)->start(region, threads == 1 || each == 1 ? nullptr : claims + i * each, each);
    }
    all.start(region, threads == 1 ? nullptr : claims + shares(), shares());
  }

  // Runs a phase with all shares: f(share).
  template <class F>
  SEQKERNELS_INLINE void run_all(int64_t phase, int64_t thread, F&& f) {
    all.run(phase, thread % shares(), f);
  }

  int64_t phase_after_teams() const { return shares_of_team() == 1 ? 2 : 1; }

  // Calls f(team) for the teams that a thread runs or helps with. Returns when all teams are complete. Phase 1 of all
  // shares, if a team is one share.
  template <class F>
  void each(int64_t thread, F&& f) {
    const int64_t each = shares_of_team(), teams = shares() / each, groups = args.plan.row_groups;
    const auto team = [&](int64_t i, int64_t first) {
      Team of{i / groups, i % groups, i, first, phases + i};
      f(of);
    };
    if (each == 1) return run_all(1, thread, [&](int64_t i) { team(i, 0); });
    // Each thread starts with its own team, and then helps with others.
    const int64_t home = thread * teams / threads, first = thread - ceil_div(home * threads, teams);
    for (int64_t i = 0; i < teams; ++i) team((home + i) % teams, first % each);
  }
};

// Allocates the workspace of a pass and runs it. forwards: its expected duration, in units of forward's.
template <class Pass>
void run_pass(Pass& pass, double forwards) {
  Teams& teams = pass.teams;
  Region region(pass.args.plan.threads == 1 ? 1 : min(pass.args.plan.threads, teams.shares()),
                forwards * pass.args.plan.nanoseconds);
  teams.threads = region.threads();
  Arena arena;
  pass.carve(arena);
  const Memory memory(reinterpret_cast<int64_t>(arena.at));
  arena.at = memory.get();
  pass.carve(arena);
  teams.start(region);
  auto body = [&pass](int64_t thread) { pass.run(thread); };
  region.run(body);
}

// The sequences of a row group: every row_groups-th in order of length, so that
// groups have nearly equal numbers of tokens.
struct Rows {
  const Walk& walk;
  int64_t groups, group;

  int64_t upto(int64_t count) const {
    return (count - group + groups - 1) / groups;
  }  // among the first `count` sequences
  int64_t at(int64_t t) const { return upto(walk.batch_sizes[t]); }  // active at step t
  int64_t all() const { return upto(walk.B); }
  int64_t sequence(int64_t i) const { return walk.sequence[group + i * groups]; }
  int64_t packed(int64_t t, int64_t i) const { return walk.offsets[t] + group + i * groups; }
};

template <class Cell>
struct Layer {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  using V = Native<T>;
  using O = typename Cell::Options;
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr int kGates = Cell::kGates;
  static constexpr bool kOptions = Cell::kOptions;
  static constexpr int kCells = Cell::kCells;

  const RecurrentArgs& args;
  const Walk& walk = args.walk;
  const int64_t D = args.D, all_H = args.H, all_P = args.P;
  const int64_t H = all_H / args.heads, P = all_P / args.heads;      // of a stream
  const int64_t HV = round_up(H, kWidth), PV = round_up(P, kWidth);  // row lengths of padded buffers
  const bool projected = Cell::kProjects && args.weights[0].w_hr != nullptr;
  const bool masks_h = kOptions && args.options.variational != nullptr;  // the recurrent products read h times a mask
  const int64_t streams = args.directions * args.heads;
  const int64_t group_rows = ceil_div(walk.B, args.plan.row_groups);
  O constants = {};  // options that are equal for all units

  explicit Layer(const RecurrentArgs& a) : args(a) {
    if constexpr (kOptions) {
      const LayerOptions& o = args.options;
      constants.zoneout_h = broadcast(T(o.zoneout_h_rate));
      constants.zoneout_c = broadcast(T(o.zoneout_c_rate));
      constants.candidate = constants.recurrent = broadcast(T(1));
      constants.cell_clip = broadcast(T(o.cell_clip));
      constants.gate_clip = broadcast(T(o.gate_clip));
      constants.sigmoid_low = sigmoid<T>(-constants.gate_clip);
      constants.sigmoid_high = sigmoid<T>(constants.gate_clip);
      constants.tanh_high = tanh<T>(constants.gate_clip);
    }
  }

  int64_t direction(int64_t stream) const { return stream / args.heads; }
  int64_t unit0(int64_t stream) const { return stream % args.heads * H; }  // the stream's first unit
  int64_t step(int64_t s, int64_t stream) const { return direction(stream) == 0 ? s : walk.T - 1 - s; }

  // Offsets of a stream's part of a row.
  int64_t h_at(int64_t stream, int64_t b) const {  // in h0, h_n
    return (direction(stream) * walk.B + b) * all_P + stream % args.heads * P;
  }
  int64_t c_at(int64_t stream, int64_t b) const {  // in c0, c_n and the like
    return (direction(stream) * walk.B + b) * all_H + unit0(stream);
  }
  int64_t y_at(int64_t n, int64_t stream) const {
    return (walk.rows[n] * args.directions + direction(stream)) * all_P + stream % args.heads * P;
  }
  int64_t cell_at(int64_t n,
                  int64_t stream) const {  // in the cells at every step and the masks
    return (walk.rows[n] * args.directions + direction(stream)) * all_H + unit0(stream);
  }
  int64_t saved_at(int64_t n,
                   int64_t stream) const {  // vector k: plus k * all_H
    return (direction(stream) * args.saved_rows + n) * args.saved_width + unit0(stream);
  }
  int64_t gates_at(int64_t n,
                   int64_t stream) const {  // in [directions, N, kGates * all_H]
    return (direction(stream) * walk.N + n) * kGates * all_H + unit0(stream);
  }

  // The options at units [u, u + valid) of packed row n, of sequence b. Members are copied one by one: GCC copies a
  // whole struct of this size with a slow string instruction.
  O options_at(int64_t stream, int64_t n, int64_t b, int64_t u, int64_t valid) const {
    O e;
    if constexpr (kOptions) {
      const LayerOptions& o = args.options;
      const int64_t at = cell_at(n, stream) + u;
      e.zoneout_h = o.zoneout_h == nullptr ? constants.zoneout_h : mask(o.zoneout_h + at, valid);
      e.zoneout_c = o.zoneout_c == nullptr ? constants.zoneout_c : mask(o.zoneout_c + at, valid);
      e.candidate = o.candidate == nullptr ? constants.candidate : mask(o.candidate + at, valid) * T(o.candidate_scale);
      e.recurrent = o.variational == nullptr || projected
                        ? constants.recurrent
                        : load(static_cast<const S*>(o.variational) + h_at(stream, b) + u, valid);
      e.cell_clip = constants.cell_clip;
      e.gate_clip = constants.gate_clip;
      e.sigmoid_low = constants.sigmoid_low;
      e.sigmoid_high = constants.sigmoid_high;
      e.tanh_high = constants.tanh_high;
      const S* peephole = static_cast<const S*>(args.weights[direction(stream)].peephole);
      for (int k = 0; k < 3; ++k) {
        e.peephole[k] = k >= Cell::kPeepholes || peephole == nullptr
                            ? constants.peephole[k]
                            : load(peephole + k * all_H + unit0(stream) + u, valid);
      }
    }
    return e;
  }

  static V mask(const uint8_t* p, int64_t valid) {
    typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
    Bytes bytes = {};
    memcpy(&bytes, p, min(valid, kWidth));
    return __builtin_convertvector(bytes, V);
  }

  // Whether the states before step t are zero because of a reset.
  bool restarts(int64_t stream, int64_t t, int64_t j) const {
    if (!kOptions || args.options.reset == nullptr) return false;
    int64_t row;
    return previous_row(args, direction(stream), t, j, row) == Previous::kReset;
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
