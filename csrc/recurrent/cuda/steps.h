// Host code shared by the tiers of one launch per step and of a single step.
#pragma once

#include <algorithm>
#include <iterator>

#include "recurrent/cuda/layer.h"

namespace seqkernels::cuda {

constexpr int64_t kFromXBytes = 32 << 20;  // pre-activations computed at a time: they stay in the L2 cache

// Rows of a chunk of pre-activations: whole steps.
inline int64_t rows_of_chunk(int64_t bytes_of_row, int64_t rows, int64_t B) {
  return std::min(rows, std::max(kFromXBytes / std::max<int64_t>(bytes_of_row, 1), B));
}

// Sizes derived from the arguments.
struct StepShape {
  int64_t gates, first, cells, peepholes, directions, B, H, rows, blocks, tiles, element, wide;
  int row_tiles;
  bool stages, separate, passes_h;
  StepShape(CellKind kind, const RecurrentArgs& args) {
    const CellShape shape = shape_of(kind);
    gates = shape.gates;
    first = shape.first;
    cells = shape.cells;
    peepholes = shape.peepholes;
    stages = shape.stages;
    separate = shape.separate;
    passes_h = shape.passes_h;
    directions = args.directions;
    B = args.walk.B;
    H = args.H;
    rows = args.walk.N;
    element = element_size(args.dtype);
    wide = args.dtype == DType::kFloat64 ? 8 : 4;
    blocks = ceil_div(H * element, 64);
    tiles = ceil_div(B, kTileRows);
    row_tiles = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(tiles, args.dtype == DType::kFloat64 ? 2 : kStepTiles)));
  }
  int64_t weights_bytes() const { return directions * ceil_div(H, kUnits) * gates * blocks * 512; }
  int64_t slot_bytes(int64_t slot_gates) const { return directions * tiles * slot_gates * blocks * 1024; }
  int64_t states_bytes() const { return directions * B * H * wide; }
  int64_t chunk_rows() const { return rows_of_chunk(directions * gates * H * wide, rows, B); }
  LaunchConfig config(int64_t count, int strips_of_product, void* stream) const {
    LaunchConfig config;
    config.grid = {ceil_div(H, kUnits), ceil_div(count, row_tiles * kTileRows), directions};
    config.block = kStepThreads;
    config.shared_bytes = kStepWarps * row_tiles * kTileRows * strips_of_product * kUnits * wide;
    config.stream = stream;
    return config;
  }
};

inline LayerArgs backward_layer_args(CellKind kind, const BackwardArgs& args, const CudaLayout& layout) {
  LayerArgs layer = layer_args(args, layout, shape_of(kind));
  layer.y = const_cast<void*>(args.y);
  for (int64_t k = 0; k < kMaxCells; ++k) layer.cells[k] = const_cast<void*>(args.cells[k]);
  layer.saved = const_cast<void*>(args.saved);
  return layer;
}
// Arguments shared by the backward kernels of one step. Places: the workspace of either tier.
template <class Places>
BackwardStepArgs backward_step(const BackwardArgs& args, const LayerArgs& layer, const Places& at) {
  BackwardStepArgs step{};
  step.layer = layer;
  step.dy = args.dy;
  std::copy(std::begin(args.dcells), std::end(args.dcells), step.dcells);
  step.dh_n = args.dh_n;
  std::copy(std::begin(args.dc_n), std::end(args.dc_n), step.dc_n);
  step.dgates_x = at.dgates_x;
  step.dgates_h = at.dgates_h;
  step.q = at.q;
  step.direct = at.direct;
  step.partial_gates = at.partial_gates;
  step.dpeephole = at.dpeephole;
  std::copy(std::begin(args.dc0), std::end(args.dc0), step.dc0);
  return step;
}

CudaPlan plan_steps(CellKind kind, PassKind pass, const RecurrentArgs& args, bool recompute);
void forward_by_steps(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, void* workspace, void* stream);
void backward_by_steps(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, void* workspace,
                       void* stream);

// The tier of a single step (single_step.cu). Appends to reasons if it does not support the layer.
CudaPlan plan_single_step(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                          bool recompute);
void forward_by_single_step(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, void* workspace,
                            void* stream);
void backward_by_single_step(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, void* workspace,
                             void* stream);

}  // namespace seqkernels::cuda
