// What the tiers that walk a layer in one launch share on the host: which layers such kernels are written for, and what
// runs around the walk. Included by their .cu files only.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "recurrent/layer_cuda.h"
#include "recurrent/persistent_cuda.cuh"

namespace seqkernels::cuda {

constexpr int64_t kLargestWorkspace = int64_t{2} << 30;  // pre-activations of all steps are made beforehand

template <class F>
void with_persistent_cell(CellKind kind, DType dtype, F&& f) {
  const auto of = [&](auto storage) {
    using S = decltype(storage);
    if constexpr (sizeof(S) <= 4) {  // float: as TF32
      switch (kind) {
        case CellKind::kLSTM:
          return f(LSTMCell<S>{});
        case CellKind::kGRU:
          return f(GRUCell<S>{});
        case CellKind::kRNNTanh:
          return f(RNNTanhCell<S>{});
        case CellKind::kRNNRelu:
          return f(RNNReluCell<S>{});
        default:
          break;
      }
    }
    throw std::logic_error("no persistent kernel for this cell");
  };
  dispatch(dtype, of);
}

struct PersistentShape {
  int64_t gates, directions, H, N, B, blocks, strips, pairs, element;
  bool separate;
  PersistentShape(CellKind kind, const RecurrentArgs& args)
      : gates(shape_of(kind).gates),
        directions(args.directions),
        H(args.H),
        N(args.walk.N),
        B(args.walk.B),
        strips((args.H + kUnits - 1) / kUnits),
        pairs((strips + 1) / 2),
        element(element_size(args.dtype)),
        separate(kind == CellKind::kGRU) {
    blocks = (H * element + 63) / 64;
  }
  int64_t weights_bytes() const { return directions * strips * gates * blocks * 512; }
  int64_t tiles(int64_t rows) const { return (B + rows - 1) / rows; }
  // f(an element of the size that products are made of)
  template <class F>
  void with_element(F&& f) const {
    if (element == 4) return f(float{});
    f(Half{});
  }
};

// Why no such kernel takes the layer, whatever its size.
inline std::vector<std::string> persistent_obstacles(CellKind kind, PassKind pass, const RecurrentArgs& args,
                                                     const CudaLayout& layout, bool recompute) {
  std::vector<std::string> reasons;
  const Options& o = args.options;
  const bool none = o.zoneout_h == nullptr && o.zoneout_c == nullptr && o.candidate == nullptr &&
                    o.variational == nullptr && o.zoneout_h_rate == 0 && o.zoneout_c_rate == 0 && o.cell_clip > 1e300 &&
                    o.gate_clip > 1e300 && args.weights[0].peephole == nullptr;
  if (kind != CellKind::kLSTM && kind != CellKind::kGRU && kind != CellKind::kRNNTanh && kind != CellKind::kRNNRelu) {
    reasons.push_back(std::string("the cell must be lstm, gru, rnn_tanh or rnn_relu, got ") + shape_of(kind).name);
  }
  if (args.dtype == DType::kFloat64 || (args.dtype == DType::kFloat32 && !layout.tf32)) {
    reasons.push_back("products must be of bfloat16, float16 or TF32");
  }
  if (!none) reasons.push_back("options other than resets must be absent");
  if (pass == PassKind::kBackward && recompute && args.saved_width > 0) {
    reasons.push_back("what backward needs was not saved");
  }
  if (args.walk.N == 0) reasons.push_back("there are no steps");
  if (args.walk.T == 1) reasons.push_back("there is but one step");
  return reasons;
}

struct PersistentForwardSpace {
  Link* links;
  void *weights, *from_x;
  PersistentForwardSpace(Space& space, const PersistentShape& s) {
    links = static_cast<Link*>(space.take(s.directions * (s.N + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    from_x = space.take(s.directions * s.N * s.gates * s.H * sizeof(float));
  }
};
struct PersistentBackwardSpace {
  Link* links;
  void *weights, *dgates_x, *dgates_h, *partial;
  PersistentBackwardSpace(Space& space, const PersistentShape& s, const RecurrentArgs& args) {
    const int64_t of_gates = s.directions * s.N * s.gates * s.H * s.element;
    links = static_cast<Link*>(space.take(s.directions * (s.N + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    dgates_x = space.take(of_gates);
    dgates_h = s.separate ? space.take(of_gates) : dgates_x;
    partial = space.take(partial_bytes(args, s.gates, false, s.gates));
  }
};
inline int64_t persistent_workspace(const PersistentShape& s, PassKind pass, const RecurrentArgs& args) {
  Space space(nullptr);
  if (pass == PassKind::kForward) {
    PersistentForwardSpace(space, s);
  } else {
    PersistentBackwardSpace(space, s, args);
  }
  return space.bytes();
}

// What the kernels of both walks are told.
template <class Args, class Places>
void set_common(PersistentArgs& of, CellKind kind, const Args& args, const CudaLayout& layout, int rows,
                const Places& at) {
  of.layer = layer_args(args, layout, shape_of(kind));
  of.layer.links = at.links;
  of.layer.y = const_cast<void*>(args.y);
  of.layer.cells = const_cast<void*>(args.cells);
  of.layer.saved = const_cast<void*>(args.saved);
  of.weights = at.weights;
  of.tiles = PersistentShape(kind, args).tiles(rows);
  of.rows = rows;
}

// All that comes before the walk; returns what the kernel is told.
inline PersistentForwardArgs start_forward(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, int rows,
                                           const PersistentForwardSpace& at, void* stream) {
  const PersistentShape s(kind, args);
  PersistentForwardArgs of{};
  set_common(of, kind, args, layout, rows, at);
  of.from_x = at.from_x;
  of.h_n = args.h_n;
  of.c_n = args.c_n;
  run_links(args, layout, at.links, stream);
  run_clear(args, layout, at.links,
            {{args.y, s.directions * s.H, s.H, s.H},
             {args.cells, s.directions * s.H, s.H, s.H},
             {args.saved, args.saved_width, s.N * args.saved_width, args.saved_width}},
            stream);
  run_empty(of.layer, args.dtype, args.h0, args.c0, args.h_n, args.c_n, stream);
  run_pack(args, of.layer.tf32, s.gates, false, at.weights, stream);
  for (int d = 0; d < s.directions; ++d) {
    void* to = static_cast<char*>(at.from_x) + d * s.N * s.gates * s.H * sizeof(float);
    run_from_x(args, layout, s.gates, s.separate, d, 0, s.N, to, stream);
  }
  return of;
}

inline PersistentBackwardArgs start_backward(CellKind kind, const BackwardArgs& args, const CudaLayout& layout,
                                             int rows, const PersistentBackwardSpace& at, void* stream) {
  const PersistentShape s(kind, args);
  PersistentBackwardArgs of{};
  set_common(of, kind, args, layout, rows, at);
  of.dy = args.dy;
  of.dcells = args.dcells;
  of.dh_n = args.dh_n;
  of.dc_n = args.dc_n;
  of.dgates_x = at.dgates_x;
  of.dgates_h = at.dgates_h;
  of.dh0 = args.dh0;
  of.dc0 = args.dc0;
  run_links(args, layout, at.links, stream);
  const int64_t width = s.gates * s.H;
  run_clear(args, layout, at.links,
            {{at.dgates_x, width, s.N * width, width}, {s.separate ? at.dgates_h : nullptr, width, s.N * width, width}},
            stream);
  run_pack(args, of.layer.tf32, s.gates, true, at.weights, stream);
  return of;
}

// All that comes behind it.
inline void finish_backward(CellKind kind, const BackwardArgs& args, const CudaLayout& layout,
                            const PersistentBackwardSpace& at, const LayerArgs& layer, void* stream) {
  run_gradients(kind, args, layout, layer,
                {at.dgates_x, at.dgates_h, nullptr, nullptr, nullptr, at.partial, shape_of(kind).gates}, stream);
}

}  // namespace seqkernels::cuda
