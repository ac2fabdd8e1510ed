// The tier of one launch per step, or two for cells with two stages.
#include "recurrent/cuda/steps.h"

namespace seqkernels::cuda {
namespace {

// Initial states: h as the products read it, in both slots, and the cells.
struct StartArgs {
  LayerArgs layer;
  void* slots[2];  // [directions, tiles, blocks, 2, 32] pieces
  int64_t tiles, blocks;
  int cells;
  void* c[kMaxCells];  // [directions, B, H] each, of the compute type
};
template <class S>
SK_KERNEL(kPlainThreads)
start_kernel(const SK_GRID_CONSTANT StartArgs args) {
  constexpr int kP = kPiece<S>;
  const LayerArgs& layer = args.layer;
  const int64_t pieces = layer.directions * args.tiles * args.blocks * 64, states = layer.states();
  const Global<const S> h0 = global<const S>(layer.h0, layer.h0 == nullptr ? 0 : states);
  const Global<const S> mask = global<const S>(layer.variational, layer.variational == nullptr ? 0 : states);
  for (int64_t i = grid_thread_index(); i < pieces; i += grid_threads()) {
    const int64_t lane = i % 32, half = i / 32 % 2, block = i / 64 % args.blocks,
                  tile = i / 64 / args.blocks % args.tiles;
    const int64_t d = i / 64 / args.blocks / args.tiles, b = tile * kTileRows + half * 8 + lane / 4;
    const int64_t unit = block * kBlockK<S> + lane % 4 * kP;
    Piece<S> piece{};
    SK_UNROLL
    for (int e = 0; e < kP; ++e) {
      if (!h0 || b >= layer.B || unit + e >= layer.H) continue;
      const int64_t at = (d * layer.B + b) * layer.H + unit + e;
      S value = h0[at];
      if (mask) {
        const S factor = mask[at];
        value = narrow<S>(widen(value) * widen(factor));
      }
      piece[e] = operand(value, layer.tf32);
    }
    store_vec(global<S>(args.slots[0], pieces * kP), i * kP, piece);
    store_vec(global<S>(args.slots[1], pieces * kP), i * kP, piece);
  }
  for (int k = 0; k < args.cells; ++k) {
    const Global<const S> c0 = global<const S>(layer.c0[k], layer.c0[k] == nullptr ? 0 : states);
    const Global<Compute<S>> c = global<Compute<S>>(args.c[k], states);
    for (int64_t i = grid_thread_index(); i < states; i += grid_threads()) {
      c[i] = Compute<S>(0);
      if (c0) {
        const S value = c0[i];
        c[i] = widen(value);
      }
    }
  }
}

// First row and number of rows of step t.
void visit_step(const Walk& walk, bool packed, const std::vector<int64_t>& offsets, int64_t t, int64_t& first,
                int64_t& count) {
  first = packed ? offsets[t] : t * walk.B;
  count = packed ? walk.batch_sizes[t] : walk.B;
}
std::vector<int64_t> offsets_of(const Walk& walk, bool packed) {
  std::vector<int64_t> offsets(walk.T + 1, 0);
  for (int64_t t = 0; t < walk.T; ++t) offsets[t + 1] = offsets[t] + (packed ? walk.batch_sizes[t] : walk.B);
  return offsets;
}

struct ForwardSpace {
  Link* links;
  void *weights, *slots[2], *q_slots, *c[kMaxCells], *carried, *from_x;
  void carve(WorkspaceArena& space, const StepShape& s) {
    links = static_cast<Link*>(space.take(s.directions * (s.rows + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    for (void*& slot : slots) slot = space.take(s.slot_bytes(1));
    q_slots = s.stages ? space.take(s.slot_bytes(1)) : nullptr;
    for (int64_t k = 0; k < kMaxCells; ++k) c[k] = k < s.cells ? space.take(s.states_bytes()) : nullptr;
    carried = s.stages ? space.take(s.states_bytes()) : nullptr;
    from_x = space.take(s.directions * s.chunk_rows() * s.gates * s.H * s.wide);
  }
};

struct BackwardSpace {
  Link* links;
  void *weights, *slots[2], *dgates_x, *dgates_h, *dc[kMaxCells], *direct, *partial_gates, *q, *dpeephole, *fed,
      *partial;
  RecomputedSaved again;
  void carve(WorkspaceArena& space, const StepShape& s, const RecurrentArgs& args, bool recompute) {
    const LayerOptions& o = args.options;
    const int64_t rows_of_gates = s.directions * s.rows * s.gates * s.H;
    links = static_cast<Link*>(space.take(s.directions * (s.rows + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    for (void*& slot : slots) slot = space.take(s.slot_bytes(s.gates));
    dgates_x = space.take(rows_of_gates * s.element);
    dgates_h = s.separate ? space.take(rows_of_gates * s.element) : dgates_x;
    for (int64_t k = 0; k < kMaxCells; ++k) dc[k] = k < s.cells ? space.take(s.states_bytes()) : nullptr;
    const bool passes = s.passes_h || o.zoneout_h != nullptr || o.zoneout_h_rate > 0;
    direct = passes ? space.take(s.states_bytes()) : nullptr;
    partial_gates = s.stages ? space.take(s.states_bytes() * s.first) : nullptr;
    q = s.stages ? space.take(s.directions * s.rows * s.H * s.element) : nullptr;
    const bool peephole = args.weights[0].peephole != nullptr;
    dpeephole = peephole ? space.take(s.directions * s.rows * s.peepholes * s.H * s.wide) : nullptr;
    fed = o.variational != nullptr ? space.take(s.directions * s.rows * s.H * s.element) : nullptr;
    partial = space.take(partial_bytes(args, s.gates, s.stages, s.first));
    again.carve(space, s.gates, args, recompute);
  }
};

}  // namespace

void forward_by_steps(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, void* workspace, void* stream) {
  const StepShape s(kind, args);
  const Walk& walk = args.walk;
  WorkspaceArena space(workspace);
  ForwardSpace at{};
  at.carve(space, s);
  LayerArgs layer = layer_args(args, layout, shape_of(kind));
  layer.links = at.links;
  layer.y = args.y;
  std::copy(std::begin(args.cells), std::end(args.cells), layer.cells);
  layer.saved = args.saved;
  if (s.B == 0) return;
  run_links(args, layout, at.links, stream);
  run_clear(args, layout, at.links, outputs_to_clear(args), stream);
  run_empty(layer, args, stream);
  if (s.rows == 0) return;
  run_pack(args, layer.tf32, s.gates, false, at.weights, stream);
  StartArgs start{layer, {at.slots[0], at.slots[1]}, s.tiles, s.blocks, static_cast<int>(s.cells), {}};
  std::copy(std::begin(at.c), std::end(at.c), start.c);
  if (s.stages) fill_bytes(at.q_slots, 0, s.slot_bytes(1), stream);

  ForwardStepArgs step{};
  step.layer = layer;
  step.from_x = at.from_x;
  step.from_x_rows = s.chunk_rows();
  std::copy(std::begin(at.c), std::end(at.c), step.c);
  step.carried = at.carried;
  step.h_n = args.h_n;
  std::copy(std::begin(args.c_n), std::end(args.c_n), step.c_n);
  step.leaves_states = true;
  StepOperands& of = step.product;
  of.weights = at.weights;
  of.tiles = s.tiles;
  of.slot_blocks = of.blocks = of.strip = s.blocks;
  of.weight_blocks = s.gates * s.blocks;

  const std::vector<int64_t> offsets = offsets_of(walk, layout.packed);
  const auto time = [&](int64_t i, int d) { return d == 0 ? i : walk.T - 1 - i; };
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    launch(start_kernel<S>, plain_config(std::max(s.slot_bytes(1) / 16, layer.states()), stream), start);
    with_cell_on<S>(kind, [&](auto cell) {
      using Cell = decltype(cell);
      for (int64_t i = 0, chunk_end = 0; i < walk.T; ++i) {
        if (i == chunk_end) {  // the next chunk of pre-activations
          const auto fits = [&](int64_t end) {
            return offsets[end] - offsets[i] <= step.from_x_rows &&
                   offsets[walk.T - i] - offsets[walk.T - end] <= step.from_x_rows;
          };
          for (chunk_end = i + 1; chunk_end < walk.T && fits(chunk_end + 1);) ++chunk_end;
          for (int d = 0; d < s.directions; ++d) {
            const int64_t first = d == 0 ? offsets[i] : offsets[walk.T - chunk_end];
            const int64_t end = d == 0 ? offsets[chunk_end] : offsets[walk.T - i];
            step.from_x_first[d] = first;
            void* to = static_cast<char*>(at.from_x) + d * step.from_x_rows * s.gates * s.H * s.wide;
            run_from_x(args, layout, s.gates, s.separate, d, first, end - first, to, stream);
          }
        }
        int64_t most = 0;
        for (int d = 0; d < s.directions; ++d) {
          visit_step(walk, layout.packed, offsets, time(i, d), step.visit.first[d], step.visit.count[d]);
          most = std::max(most, step.visit.count[d]);
        }
        of.slots = at.slots[i % 2];
        of.weight_first = 0;
        constexpr bool kStages = Cell::kFirst < Cell::kGates;
        step.slots_out = kStages ? at.q_slots : at.slots[(i + 1) % 2];
        launch(forward_step_kernel<Cell, false>, s.config(most, Cell::kFirst, stream), step, s.row_tiles);
        if constexpr (kStages) {
          of.slots = at.q_slots;
          of.weight_first = Cell::kFirst * s.blocks;
          step.slots_out = at.slots[(i + 1) % 2];
          launch(forward_step_kernel<Cell, true>, s.config(most, Cell::kGates - Cell::kFirst, stream), step,
                 s.row_tiles);
        }
      }
    });
  });
}

void backward_by_steps(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, void* workspace,
                       void* stream) {
  const StepShape s(kind, args);
  const Walk& walk = args.walk;
  WorkspaceArena space(workspace);
  BackwardSpace at{};
  at.carve(space, s, args, args.saved == nullptr);
  LayerArgs layer = backward_layer_args(kind, args, layout);
  layer.links = at.links;
  run_links(args, layout, at.links, stream);
  if (s.rows > 0 && s.B > 0) {
    // dgates_x is unused so far and large enough for q
    recompute_saved(kind, args, layout, at.again, layer, at.fed, s.stages ? at.dgates_x : nullptr, stream);
    const int64_t width = s.gates * s.H;
    run_clear(args, layout, at.links,
              {{at.dgates_x, width, s.rows * width, width},
               {s.separate ? at.dgates_h : nullptr, width, s.rows * width, width},
               {at.q, s.H, s.rows * s.H, s.H}},
              stream);
    if (at.dpeephole != nullptr && layout.lengths != nullptr) {
      fill_bytes(at.dpeephole, 0, s.directions * s.rows * s.peepholes * s.H * s.wide, stream);
    }
    for (void* slot : at.slots) fill_bytes(slot, 0, s.slot_bytes(s.gates), stream);
    run_pack(args, layer.tf32, s.gates, true, at.weights, stream);
  }

  BackwardStepArgs step = backward_step(args, layer, at);
  std::copy(std::begin(at.dc), std::end(at.dc), step.dc);
  step.dh0 = args.dh0;
  step.last_step = walk.T - 1;
  StepOperands& of = step.product;
  of.weights = at.weights;
  of.tiles = s.tiles;
  of.slot_blocks = of.weight_blocks = s.gates * s.blocks;
  of.strip = 0;

  const std::vector<int64_t> offsets = offsets_of(walk, layout.packed);
  const auto time = [&](int64_t i, int d) { return d == 0 ? walk.T - 1 - i : i; };
  if (s.B > 0) {
    dispatch(args.dtype, [&](auto storage) {
      using S = decltype(storage);
      with_cell_on<S>(kind, [&](auto cell) {
        using Cell = decltype(cell);
        const auto product = [&](int64_t gate, int64_t gates) {
          of.slot_first = of.weight_first = gate * s.blocks;
          of.blocks = gates * s.blocks;
        };
        for (int64_t i = 0; i < walk.T; ++i) {
          int64_t most = 0;
          for (int d = 0; d < s.directions; ++d) {
            visit_step(walk, layout.packed, offsets, time(i, d), step.visit.first[d], step.visit.count[d]);
            most = std::max(most, step.visit.count[d]);
          }
          of.slots = at.slots[(i + 1) % 2];
          step.slots_out = at.slots[i % 2];
          product(0, Cell::kFirst);
          launch(backward_step_kernel<Cell, false>, s.config(most, 1, stream), step, s.row_tiles);
          if constexpr (Cell::kFirst < Cell::kGates) {
            of.slots = at.slots[i % 2];
            product(Cell::kFirst, Cell::kGates - Cell::kFirst);
            launch(backward_step_kernel<Cell, true>, s.config(most, 1, stream), step, s.row_tiles);
          }
        }
        const bool wanted =
            std::any_of(std::begin(args.dc0), std::end(args.dc0), [](void* dc0) { return dc0 != nullptr; });
        if (args.dh0 == nullptr && !wanted) return;
        product(0, Cell::kFirst);
        for (int parity = 0; parity < (s.rows > 0 ? 2 : 1); ++parity) {
          for (int d = 0; d < s.directions; ++d) {
            step.visit.first[d] = s.rows;
            step.visit.count[d] = s.B;
          }
          of.slots = at.slots[parity];
          step.slots_out = nullptr;
          step.parity = parity;
          launch(backward_step_kernel<Cell, false>, s.config(s.B, 1, stream), step, s.row_tiles);
        }
      });
    });
  }
  run_gradients(kind, args, layout, layer, {at.dgates_x, at.dgates_h, at.q, at.fed, at.dpeephole, at.partial, s.first},
                stream);
}

CudaPlan plan_steps(CellKind kind, PassKind pass, const RecurrentArgs& args, bool recompute) {
  const StepShape s(kind, args);
  CudaPlan plan{};
  WorkspaceArena space(nullptr);
  if (pass == PassKind::kForward) {
    ForwardSpace{}.carve(space, s);
  } else {
    BackwardSpace{}.carve(space, s, args, recompute);
  }
  plan.tier = CudaTier::kSteps;
  plan.cluster = 1;
  plan.rows = s.row_tiles * kTileRows;
  plan.workspace = space.bytes();
  set_launch(plan, s.config(s.B, static_cast<int>(pass == PassKind::kForward ? s.first : 1), nullptr));
  return plan;
}

}  // namespace seqkernels::cuda
