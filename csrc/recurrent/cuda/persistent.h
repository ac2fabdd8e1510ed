// Host code shared by the tiers that run all steps in one launch (persistent kernels).
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "recurrent/cuda/layer.h"
#include "recurrent/cuda/persistent.cuh"

namespace seqkernels::cuda {

constexpr int64_t kLargestWorkspace = int64_t{2} << 30;  // pre-activations of all steps are computed in advance

// Which kernels of a tier run a layer: those compiled with options, or those without, which support resets alone. Cells
// with kHasPlain = false have kernels with options only.
struct PersistentKind {
  CellKind cell;
  DType dtype;
  bool options;
  PersistentKind(CellKind kind, const RecurrentArgs& args) : cell(kind), dtype(args.dtype) {
    const LayerOptions& o = args.options;
    options = !shape_of(kind).plain || o.zoneout_h != nullptr || o.zoneout_c != nullptr || o.candidate != nullptr ||
              o.variational != nullptr || o.zoneout_h_rate != 0 || o.zoneout_c_rate != 0 || o.cell_clip < 1e300 ||
              o.gate_clip < 1e300 || args.weights[0].peephole != nullptr;
  }
  auto key() const { return std::tuple{cell, dtype, options}; }
};

// Calls f with the cell whose kernels run the layer: on a storage type of at most 4 bytes (float: as TF32).
template <class F>
void with_persistent_cell(const PersistentKind& of, F&& f) {
  dispatch(of.dtype, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (sizeof(S) <= 4) {
      with_cell(of.cell, [&](auto cell) {
        using C = decltype(cell);
        if constexpr (C::kCuda) {
          if constexpr (C::kHasPlain) {
            if (!of.options) return f(CellOn<C, S>{});
          }
          f(CellOn<C, S, With::kOptions>{});
        }
      });
    }
  });
}

struct PersistentShape {
  PersistentKind kind;
  int64_t gates, cells, peepholes, directions, H, N, B, blocks, strips, pairs, element;
  int64_t first;  // gates of the first product
  bool separate, stages;
  PersistentShape(CellKind of, const RecurrentArgs& args)
      : kind(of, args),
        gates(shape_of(of).gates),
        cells(shape_of(of).cells),
        peepholes(shape_of(of).peepholes),
        directions(args.directions),
        H(args.H),
        N(args.walk.N),
        B(args.walk.B),
        strips((args.H + kUnits - 1) / kUnits),
        pairs((strips + 1) / 2),
        element(element_size(args.dtype)),
        first(shape_of(of).first),
        separate(shape_of(of).separate),
        stages(shape_of(of).stages) {
    blocks = (H * element + 63) / 64;
  }
  int64_t dpeephole_bytes() const { return directions * N * peepholes * H * static_cast<int64_t>(sizeof(float)); }
  int64_t weights_bytes() const { return directions * strips * gates * blocks * 512; }
  int64_t tiles(int64_t rows) const { return (B + rows - 1) / rows; }
};

// Reasons why no persistent kernel supports the layer, regardless of its size.
inline std::vector<std::string> persistent_obstacles(const RecurrentArgs& args, const CudaLayout& layout) {
  std::vector<std::string> reasons;
  if (args.dtype == DType::kFloat64 || (args.dtype == DType::kFloat32 && !layout.tf32)) {
    reasons.push_back("products must be of bfloat16, float16 or TF32");
  }
  if (args.walk.N == 0) reasons.push_back("there are no steps");
  if (args.walk.T == 1) reasons.push_back("there is but one step");
  return reasons;
}

struct PersistentForwardSpace {
  Link* links;
  void *weights, *from_x;
  PersistentForwardSpace(WorkspaceArena& space, const PersistentShape& s) {
    links = static_cast<Link*>(space.take(s.directions * (s.N + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    from_x = space.take(s.directions * s.N * s.gates * s.H * sizeof(float));
  }
};
struct PersistentBackwardSpace {
  Link* links;
  void *weights, *dgates_x, *dgates_h, *q, *dpeephole, *fed, *partial;
  RecomputedSaved again;
  PersistentBackwardSpace(WorkspaceArena& space, const PersistentShape& s, const RecurrentArgs& args, bool recompute) {
    const int64_t of_gates = s.directions * s.N * s.gates * s.H * s.element;
    links = static_cast<Link*>(space.take(s.directions * (s.N + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    dgates_x = space.take(of_gates);
    dgates_h = s.separate ? space.take(of_gates) : dgates_x;
    q = s.stages ? space.take(s.directions * s.N * s.H * s.element) : nullptr;
    const bool peephole = args.weights[0].peephole != nullptr, variational = args.options.variational != nullptr;
    dpeephole = peephole ? space.take(s.dpeephole_bytes()) : nullptr;
    fed = variational ? space.take(s.directions * s.N * s.H * s.element) : nullptr;
    partial = space.take(partial_bytes(args, s.gates, s.stages, s.first));
    again.carve(space, s.gates, args, recompute);
  }
};
inline int64_t persistent_workspace(const PersistentShape& s, PassKind pass, const RecurrentArgs& args,
                                    bool recompute) {
  WorkspaceArena space(nullptr);
  if (pass == PassKind::kForward) {
    PersistentForwardSpace(space, s);
  } else {
    PersistentBackwardSpace(space, s, args, recompute);
  }
  return space.bytes();
}

// Arguments shared by the forward and the backward kernel.
template <class Args, class Places>
void set_common(PersistentArgs& of, const PersistentShape& s, const Args& args, const CudaLayout& layout, int rows,
                const Places& at) {
  of.layer = layer_args(args, layout, shape_of(s.kind.cell));
  of.layer.links = at.links;
  of.layer.y = const_cast<void*>(args.y);
  for (int64_t k = 0; k < kMaxCells; ++k) of.layer.cells[k] = const_cast<void*>(args.cells[k]);
  of.layer.saved = const_cast<void*>(args.saved);
  of.weights = at.weights;
  of.tiles = s.tiles(rows);
  of.rows = rows;
}

// Everything before the time loop; returns the arguments of its kernel.
inline PersistentForwardArgs start_forward(const PersistentShape& s, const ForwardArgs& args, const CudaLayout& layout,
                                           int rows, const PersistentForwardSpace& at, void* stream) {
  PersistentForwardArgs of{};
  set_common(of, s, args, layout, rows, at);
  of.from_x = at.from_x;
  of.h_n = args.h_n;
  std::copy(std::begin(args.c_n), std::end(args.c_n), of.c_n);
  run_links(args, layout, at.links, stream);
  run_clear(args, layout, at.links, outputs_to_clear(args), stream);
  run_empty(of.layer, args, stream);
  run_pack(args, of.layer.tf32, s.gates, false, at.weights, stream);
  for (int d = 0; d < s.directions; ++d) {
    void* to = static_cast<char*>(at.from_x) + d * s.N * s.gates * s.H * sizeof(float);
    run_from_x(args, layout, s.gates, s.separate, d, 0, s.N, to, stream);
  }
  return of;
}

inline PersistentBackwardArgs start_backward(const PersistentShape& s, const BackwardArgs& args,
                                             const CudaLayout& layout, int rows, const PersistentBackwardSpace& at,
                                             void* stream) {
  PersistentBackwardArgs of{};
  set_common(of, s, args, layout, rows, at);
  of.dy = args.dy;
  std::copy(std::begin(args.dcells), std::end(args.dcells), of.dcells);
  of.dh_n = args.dh_n;
  std::copy(std::begin(args.dc_n), std::end(args.dc_n), of.dc_n);
  of.dgates_x = at.dgates_x;
  of.dgates_h = at.dgates_h;
  of.q = at.q;
  of.dpeephole = at.dpeephole;
  of.dh0 = args.dh0;
  std::copy(std::begin(args.dc0), std::end(args.dc0), of.dc0);
  if (at.dpeephole != nullptr && layout.lengths != nullptr) fill_bytes(at.dpeephole, 0, s.dpeephole_bytes(), stream);
  run_links(args, layout, at.links, stream);
  recompute_saved(s.kind.cell, args, layout, at.again, of.layer, at.fed, s.stages ? at.dgates_x : nullptr, stream);
  const int64_t width = s.gates * s.H;
  run_clear(args, layout, at.links,
            {{at.dgates_x, width, s.N * width, width},
             {s.separate ? at.dgates_h : nullptr, width, s.N * width, width},
             {at.q, s.H, s.N * s.H, s.H}},
            stream);
  run_pack(args, of.layer.tf32, s.gates, true, at.weights, stream);
  return of;
}

// Everything after the time loop.
inline void finish_backward(const PersistentShape& s, const BackwardArgs& args, const CudaLayout& layout,
                            const PersistentBackwardSpace& at, const LayerArgs& layer, void* stream) {
  run_gradients(s.kind.cell, args, layout, layer,
                {at.dgates_x, at.dgates_h, at.q, at.fed, at.dpeephole, at.partial, s.first}, stream);
}

}  // namespace seqkernels::cuda
