// The cell on products in memory: the tier of a single step, and the recomputation of saved values for backward.
#include "recurrent/cuda/steps.h"

namespace seqkernels::cuda {
namespace {

// Computes the products of `count` rows from `first` into from_x and from_h, [directions, step.from_x_rows, G * H] of
// the compute type, then runs the cell on them. fed: as in recurrent_matrix.
void forward_rows(CellKind kind, const RecurrentArgs& args, const CudaLayout& layout, ForwardStepArgs step,
                  void* from_x, void* from_h, const void* fed, int64_t first, int64_t count, void* stream) {
  const StepShape s(kind, args);
  const bool no_h = step.layer.links == nullptr && args.h0 == nullptr;
  step.from_x = from_x;
  step.from_h = no_h ? nullptr : from_h;
  step.from_h_rows = step.from_x_rows;
  const auto product_h = [&](int d, int64_t gate, int64_t gates, const Matrix& left) {
    ProductArgs of{};
    of.M = count;
    of.N = gates * s.H;
    of.K = s.H;
    of.parts = 1;
    of.a[0] = left;
    const void* const w_hh = static_cast<const char*>(args.weights[d].w_hh) + gate * s.H * s.H * s.element;
    of.b[0] = plain_matrix(w_hh, of.N, s.H, s.H, true);
    of.c = static_cast<char*>(from_h) + d * step.from_h_rows * of.N * s.wide;
    of.ldc = of.N;
    of.splits = 1;
    of.chunk = s.H;
    run_product(args.dtype, layout.tf32, of, stream);
  };
  for (int d = 0; d < s.directions; ++d) {
    step.visit.first[d] = step.from_x_first[d] = first;
    step.visit.count[d] = count;
    void* to = static_cast<char*>(from_x) + d * step.from_x_rows * s.gates * s.H * s.wide;
    run_from_x(args, layout, s.gates, s.separate, d, first, count, to, stream);
    if (!no_h) product_h(d, 0, s.first, recurrent_matrix(args, step.layer, fed, d, first, count, true));
  }
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_cell_on<S>(kind, [&](auto cell) {
      using Cell = decltype(cell);
      LaunchConfig config = plain_config(count * s.H, stream);
      config.grid.y = s.directions;
      launch(forward_rows_kernel<Cell, false>, config, step);
      if constexpr (Cell::kFirst < Cell::kGates) {
        for (int d = 0; d < s.directions && !no_h; ++d) {
          const void* const q = static_cast<const char*>(step.q) + d * step.from_h_rows * s.H * s.element;
          product_h(d, Cell::kFirst, Cell::kGates - Cell::kFirst, plain_matrix(q, count, s.H, s.H, true));
        }
        launch(forward_rows_kernel<Cell, true>, config, step);
      }
    });
  });
}

struct CellForwardSpace {
  void *from_x, *from_h, *fed, *carried, *q;
  void carve(WorkspaceArena& space, const StepShape& s, const RecurrentArgs& args) {
    const int64_t states = s.directions * s.B * s.H;
    from_x = space.take(s.gates * states * s.wide);
    from_h = space.take(s.gates * states * s.wide);
    fed = args.options.variational != nullptr ? space.take(states * s.element) : nullptr;
    carried = s.stages ? space.take(states * s.wide) : nullptr;
    q = s.stages ? space.take(states * s.element) : nullptr;
  }
};

enum class Width { kWide, kNarrow };  // compute type, storage type

struct CellBackwardSpace {
  void *dgates_x, *dgates_h, *to_h, *direct, *partial_gates, *q, *dpeephole, *fed, *partial;
  void carve(WorkspaceArena& space, const StepShape& s, const RecurrentArgs& args) {
    const LayerOptions& o = args.options;
    const int64_t states = s.directions * s.B * s.H;
    dgates_x = space.take(s.gates * states * s.element);
    dgates_h = s.separate ? space.take(s.gates * states * s.element) : dgates_x;
    const bool passes = s.passes_h || o.zoneout_h != nullptr || o.zoneout_h_rate > 0;
    direct = passes ? space.take(states * s.wide) : nullptr;
    // Otherwise the product of the gates' gradients with W_hh is dh0.
    to_h = passes || o.variational != nullptr ? space.take(states * s.wide) : nullptr;
    partial_gates = s.stages ? space.take(s.first * states * s.wide) : nullptr;
    q = s.stages ? space.take(states * s.element) : nullptr;
    const bool peephole = args.weights[0].peephole != nullptr;
    dpeephole = peephole ? space.take(s.peepholes * states * s.wide) : nullptr;
    fed = o.variational != nullptr ? space.take(states * s.element) : nullptr;
    partial = space.take(partial_bytes(args, s.gates, s.stages, s.first));
  }
};

}  // namespace

void RecomputedSaved::carve(WorkspaceArena& space, int64_t gates, const RecurrentArgs& args, bool wanted) {
  wanted = wanted && args.saved_width > 0;
  const int64_t wide = args.dtype == DType::kFloat64 ? 8 : 4, row = args.directions * gates * args.H * wide;
  rows = rows_of_chunk(row, args.walk.N, args.walk.B);
  const int64_t saved_bytes = args.directions * args.walk.N * args.saved_width * element_size(args.dtype);
  saved = wanted ? space.take(saved_bytes) : nullptr;
  from_x = wanted ? space.take(rows * row) : nullptr;
  from_h = wanted ? space.take(rows * row) : nullptr;
}

void recompute_saved(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const RecomputedSaved& at,
                     LayerArgs& layer, void* fed, void* q, void* stream) {
  if (at.saved == nullptr) return;
  layer.saved = at.saved;
  if (layer.variational != nullptr) run_recurrent_input(layer, args.dtype, fed, stream);
  ForwardStepArgs step{};
  step.layer = layer;
  step.from_x_rows = at.rows;
  step.q = q;
  const int64_t step_rows = layout.packed ? at.rows : at.rows / layer.B * layer.B;
  for (int64_t first = 0; first < layer.rows; first += step_rows) {
    const int64_t count = std::min(step_rows, layer.rows - first);
    forward_rows(kind, args, layout, step, at.from_x, at.from_h, fed, first, count, stream);
  }
}

CudaPlan plan_single_step(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                          bool recompute) {
  CudaPlan plan{};
  const auto unless = [&](bool fits, const char* why) {
    if (!fits) plan.reasons.push_back(std::string("cell: ") + why);
  };
  unless(allows_tier(CudaTier::kCell), "switched off");
  unless(layout.lengths == nullptr, "lengths must be absent");
  unless(args.options.reset == nullptr, "reset must be absent");
  unless(pass == PassKind::kForward || !recompute || args.saved_width == 0, "what backward needs must have been saved");
  if (!plan.reasons.empty()) return plan;
  WorkspaceArena space(nullptr);
  if (pass == PassKind::kForward) {
    CellForwardSpace{}.carve(space, StepShape(kind, args), args);
  } else {
    CellBackwardSpace{}.carve(space, StepShape(kind, args), args);
  }
  plan.tier = CudaTier::kCell;
  plan.cluster = 1;
  plan.block = kStepThreads;
  plan.workspace = space.bytes();
  return plan;
}

void forward_by_single_step(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, void* workspace,
                            void* stream) {
  const StepShape s(kind, args);
  WorkspaceArena space(workspace);
  CellForwardSpace at{};
  at.carve(space, s, args);
  ForwardStepArgs step{};
  step.layer = layer_args(args, layout, shape_of(kind));
  step.layer.y = args.y;
  std::copy(std::begin(args.cells), std::end(args.cells), step.layer.cells);
  step.layer.saved = args.saved;
  step.from_x_rows = s.B;
  step.carried = at.carried;
  step.q = at.q;
  step.h_n = args.h_n;
  std::copy(std::begin(args.c_n), std::end(args.c_n), step.c_n);
  step.leaves_states = true;
  if (at.fed != nullptr && args.h0 != nullptr) run_recurrent_input(step.layer, args.dtype, at.fed, stream);
  forward_rows(kind, args, layout, step, at.from_x, at.from_h, at.fed, 0, s.B, stream);
}

void backward_by_single_step(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, void* workspace,
                             void* stream) {
  const StepShape s(kind, args);
  WorkspaceArena space(workspace);
  CellBackwardSpace at{};
  at.carve(space, s, args);
  const LayerArgs layer = backward_layer_args(kind, args, layout);
  BackwardStepArgs step = backward_step(args, layer, at);
  // Gradients of gates times their rows of W_hh: [B, H].
  const auto product = [&](int64_t gate, int64_t gates, void* to, Width width) {
    const int64_t G = s.gates * s.H, skip = gate * s.H;
    for (int d = 0; d < s.directions; ++d) {
      ProductArgs of{};
      of.M = s.B;
      of.N = s.H;
      of.K = gates * s.H;
      of.parts = 1;
      const char* const left = static_cast<const char*>(at.dgates_h) + (d * s.B * G + skip) * s.element;
      const char* const w_hh = static_cast<const char*>(args.weights[d].w_hh) + skip * s.H * s.element;
      of.a[0] = plain_matrix(left, s.B, of.K, G, true);
      of.b[0] = plain_matrix(w_hh, of.K, s.H, s.H, false);
      of.c = static_cast<char*>(to) + d * s.B * s.H * (width == Width::kNarrow ? s.element : s.wide);
      of.ldc = s.H;
      of.narrow = width == Width::kNarrow;
      of.splits = 1;
      of.chunk = of.K;
      run_product(args.dtype, layout.tf32, of, stream);
    }
  };
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_cell_on<S>(kind, [&](auto cell) {
      using Cell = decltype(cell);
      LaunchConfig config = plain_config(s.B * s.H, stream);
      config.grid.y = s.directions;
      const auto visit = [&](int64_t first) {
        for (int d = 0; d < s.directions; ++d) {
          step.visit.first[d] = first;
          step.visit.count[d] = s.B;
        }
      };
      visit(0);
      launch(backward_rows_kernel<Cell, false>, config, step);
      if constexpr (Cell::kFirst < Cell::kGates) {
        product(Cell::kFirst, Cell::kGates - Cell::kFirst, at.to_h, Width::kWide);
        step.to_h = at.to_h;
        launch(backward_rows_kernel<Cell, true>, config, step);
      }
      if (args.dh0 == nullptr) return;
      if (at.to_h == nullptr) return product(0, Cell::kFirst, args.dh0, Width::kNarrow);
      product(0, Cell::kFirst, at.to_h, Width::kWide);
      visit(s.B);
      step.to_h = at.to_h;
      step.dh0 = args.dh0;
      for (void*& dc0 : step.dc0) dc0 = nullptr;  // written by the first launch
      launch(backward_rows_kernel<Cell, false>, config, step);
    });
  });
  run_gradients(kind, args, layout, layer, {at.dgates_x, at.dgates_h, at.q, at.fed, at.dpeephole, at.partial, s.first},
                stream);
}

}  // namespace seqkernels::cuda
