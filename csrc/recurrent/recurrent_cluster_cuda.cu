// Launchers of the cluster tier: when it takes a layer, and how many blocks a cluster has.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "recurrent/cluster_cuda.cuh"
#include "recurrent/layer_cuda.h"

namespace seqkernels::cuda {
namespace {

// Estimates, not measured on a GPU yet. A cluster takes 16 sequences, so with many of them the device is full anyway
// and a launch a step reads the weights for more rows at once.
constexpr int64_t kWavesOfClusters = 2;
constexpr int64_t kLargestWorkspace = int64_t{2} << 30;  // pre-activations of all steps are made beforehand

template <class F>
void with_cluster_cell(CellKind kind, DType dtype, F&& f) {
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
    throw std::logic_error("no cluster kernel for this cell");
  };
  dispatch(dtype, of);
}

struct ClusterShape {
  int64_t gates, directions, H, rows, B, tiles, blocks, strips, element;
  bool separate, has_c;
  ClusterShape(CellKind kind, const RecurrentArgs& args)
      : gates(shape_of(kind).gates),
        directions(args.directions),
        H(args.H),
        rows(args.walk.N),
        B(args.walk.B),
        tiles((args.walk.B + kTileRows - 1) / kTileRows),
        strips((args.H + kUnits - 1) / kUnits),
        element(element_size(args.dtype)),
        separate(kind == CellKind::kGRU),
        has_c(shape_of(kind).states > 1) {
    blocks = (H * element + 63) / 64;
  }
  int64_t weights_bytes() const { return directions * strips * gates * blocks * 512; }
  LaunchConfig config(PassKind pass, int cluster, void* stream) const {
    LaunchConfig config;
    const int64_t warps = (strips + cluster - 1) / cluster;
    config.grid = {directions * tiles * cluster};
    config.block = static_cast<int>(warps * kWarp);
    config.cluster = cluster;
    config.stream = stream;
    SharedBytes bytes;
    const int64_t of_gates = pass == PassKind::kForward ? gates : 1, held = (element == 4    ? 28
                                                                             : of_gates == 1 ? 30
                                                                                             : 32) /
                                                                            of_gates * of_gates;
    const int64_t slots = pass == PassKind::kForward ? blocks : gates * blocks;
    bytes.array<char>(2 * slots * 1024, 128);
    bytes.array<char>(warps * std::max<int64_t>(gates * blocks - held, 0) * 512, 128);
    bytes.array<float>(kRing * (pass == PassKind::kForward ? gates : 0) * 2 * warps * kWarp * 2);
    bytes.array<MBarrier>(2, 8);
    config.shared_bytes = bytes.bytes();
    return config;
  }
};

struct ClusterForwardSpace {
  Link* links;
  void *weights, *from_x;
  ClusterForwardSpace(Space& space, const ClusterShape& s) {
    links = static_cast<Link*>(space.take(s.directions * (s.rows + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    from_x = space.take(s.directions * s.rows * s.gates * s.H * sizeof(float));
  }
};
struct ClusterBackwardSpace {
  Link* links;
  void *weights, *dgates_x, *dgates_h, *partial;
  ClusterBackwardSpace(Space& space, const ClusterShape& s, const RecurrentArgs& args) {
    const int64_t of_gates = s.directions * s.rows * s.gates * s.H * s.element;
    links = static_cast<Link*>(space.take(s.directions * (s.rows + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    dgates_x = space.take(of_gates);
    dgates_h = s.separate ? space.take(of_gates) : dgates_x;
    partial = space.take(partial_bytes(args, s.gates, false, s.gates));
  }
};

int64_t resident(CellKind kind, DType dtype, PassKind pass, const LaunchConfig& config) {
  int64_t count = 0;
  with_cluster_cell(kind, dtype, [&](auto cell) {
    using Cell = decltype(cell);
    count = pass == PassKind::kForward ? resident_clusters(cluster_forward_kernel<Cell>, config)
                                       : resident_clusters(cluster_backward_kernel<Cell>, config);
  });
  return count;
}

}  // namespace

CudaPlan::Pass plan_cluster(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                            bool recompute, const CudaDevice& device) {
  CudaPlan::Pass plan{CudaTier::kNone, 1, 0, 0, {}};
  const auto why_not = [&](const std::string& why) { plan.reasons.push_back("cluster: " + why); };
  const Options& o = args.options;
  const bool none = o.zoneout_h == nullptr && o.zoneout_c == nullptr && o.candidate == nullptr &&
                    o.variational == nullptr && o.zoneout_h_rate == 0 && o.zoneout_c_rate == 0 && o.cell_clip > 1e300 &&
                    o.gate_clip > 1e300 && args.weights[0].peephole == nullptr;
  if (device.major < 9) {
    why_not("compute capability must be 9.0 or more, got " + std::to_string(device.major) + "." +
            std::to_string(device.minor));
  }
  if (kind != CellKind::kLSTM && kind != CellKind::kGRU && kind != CellKind::kRNNTanh && kind != CellKind::kRNNRelu) {
    why_not(std::string("the cell must be lstm, gru, rnn_tanh or rnn_relu, got ") + shape_of(kind).name);
  }
  if (args.dtype == DType::kFloat64 || (args.dtype == DType::kFloat32 && !layout.tf32)) {
    why_not("products must be of bfloat16, float16 or TF32");
  }
  if (!none) why_not("options other than resets must be absent");
  if (args.H % kUnits != 0) why_not("H must be a multiple of 8, got " + std::to_string(args.H));
  if (pass == PassKind::kBackward && recompute && args.saved_width > 0) why_not("what backward needs was not saved");
  if (args.walk.N == 0) why_not("there are no steps");
  if (args.walk.T == 1) why_not("there is but one step");
  if (!plan.reasons.empty()) return plan;

  const ClusterShape s(kind, args);
  const int64_t clusters = s.tiles * s.directions;
  int64_t smallest = 0;  // shared memory that some cluster would need
  for (int cluster = 1; cluster <= kClusterBlocks; cluster *= 2) {
    const LaunchConfig config = s.config(pass, cluster, nullptr);
    if (cluster > s.strips) break;
    smallest = smallest == 0 ? config.shared_bytes : std::min(smallest, config.shared_bytes);
    if (config.block > kClusterThreads || config.shared_bytes > device.shared_bytes) continue;
    const bool fits = plan.tier == CudaTier::kNone || clusters * cluster <= device.multiprocessors;
    if (!fits) continue;
    if (cluster > 8 && resident(kind, args.dtype, pass, config) < 1) continue;
    plan.tier = CudaTier::kCluster;
    plan.cluster = cluster;
    plan.block = config.block;
  }
  if (plan.tier == CudaTier::kNone) {
    why_not("the weights of H = " + std::to_string(args.H) + " do not fit: a block would need " +
            std::to_string(smallest) + " bytes of shared memory, of " + std::to_string(device.shared_bytes));
    return plan;
  }
  const int64_t at_once = std::max<int64_t>(device.multiprocessors / plan.cluster, 1);
  Space space(nullptr);
  if (pass == PassKind::kForward) {
    ClusterForwardSpace(space, s);
  } else {
    ClusterBackwardSpace(space, s, args);
  }
  plan.workspace = space.bytes();
  if (clusters > kWavesOfClusters * at_once) {
    why_not(std::to_string(clusters) + " clusters of " + std::to_string(plan.cluster) + " blocks, of which " +
            std::to_string(at_once) + " run at once");
    plan.tier = CudaTier::kNone;
  } else if (plan.workspace > kLargestWorkspace) {
    why_not("a workspace of " + std::to_string(plan.workspace) + " bytes");
    plan.tier = CudaTier::kNone;
  }
  return plan;
}

void forward_by_clusters(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, const CudaPlan::Pass& plan,
                         void* workspace, void* stream) {
  const ClusterShape s(kind, args);
  Space space(workspace);
  const ClusterForwardSpace at(space, s);
  ClusterForwardArgs of{};
  of.layer = layer_args(args, layout, shape_of(kind));
  of.layer.links = at.links;
  of.layer.y = args.y;
  of.layer.cells = args.cells;
  of.layer.saved = args.saved;
  of.weights = at.weights;
  of.tiles = s.tiles;
  of.from_x = at.from_x;
  of.h_n = args.h_n;
  of.c_n = args.c_n;
  run_links(args, layout, at.links, stream);
  run_clear(args, layout, at.links,
            {{args.y, s.directions * s.H, s.H, s.H},
             {args.cells, s.directions * s.H, s.H, s.H},
             {args.saved, args.saved_width, s.rows * args.saved_width, args.saved_width}},
            stream);
  run_empty(of.layer, args.dtype, args.h0, args.c0, args.h_n, args.c_n, stream);
  run_pack(args, of.layer.tf32, s.gates, false, at.weights, stream);
  for (int d = 0; d < s.directions; ++d) {
    void* to = static_cast<char*>(at.from_x) + d * s.rows * s.gates * s.H * sizeof(float);
    run_from_x(args, layout, s.gates, s.separate, d, 0, s.rows, to, stream);
  }
  with_cluster_cell(kind, args.dtype, [&](auto cell) {
    launch(cluster_forward_kernel<decltype(cell)>, s.config(PassKind::kForward, plan.cluster, stream), of);
  });
}

void backward_by_clusters(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const CudaPlan::Pass& plan,
                          void* workspace, void* stream) {
  const ClusterShape s(kind, args);
  Space space(workspace);
  const ClusterBackwardSpace at(space, s, args);
  ClusterBackwardArgs of{};
  of.layer = layer_args(args, layout, shape_of(kind));
  of.layer.links = at.links;
  of.layer.y = const_cast<void*>(args.y);
  of.layer.cells = const_cast<void*>(args.cells);
  of.layer.saved = const_cast<void*>(args.saved);
  of.weights = at.weights;
  of.tiles = s.tiles;
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
  run_clear(
      args, layout, at.links,
      {{at.dgates_x, width, s.rows * width, width}, {s.separate ? at.dgates_h : nullptr, width, s.rows * width, width}},
      stream);
  run_pack(args, of.layer.tf32, s.gates, true, at.weights, stream);
  with_cluster_cell(kind, args.dtype, [&](auto cell) {
    launch(cluster_backward_kernel<decltype(cell)>, s.config(PassKind::kBackward, plan.cluster, stream), of);
  });
  run_gradients(kind, args, layout, of.layer,
                {at.dgates_x, at.dgates_h, nullptr, nullptr, nullptr, at.partial, s.gates}, stream);
}

}  // namespace seqkernels::cuda
