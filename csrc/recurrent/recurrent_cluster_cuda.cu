// Launchers of the cluster tier: when it takes a layer, and how many blocks a cluster has.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "recurrent/cluster_cuda.cuh"
#include "recurrent/layer_cuda.h"

namespace seqkernels::cuda {
namespace {

// Tiles that a cluster's place sees one after the other, above which a launch a step reads the weights for more rows at
// once.
constexpr int64_t kWavesOfClusters = 16;
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
  int64_t gates, directions, H, N, B, blocks, strips, element, groups;
  int cluster;
  bool separate;
  ClusterShape(CellKind kind, const RecurrentArgs& args)
      : gates(shape_of(kind).gates),
        directions(args.directions),
        H(args.H),
        N(args.walk.N),
        B(args.walk.B),
        strips((args.H + kUnits - 1) / kUnits),
        element(element_size(args.dtype)),
        cluster(1),
        separate(kind == CellKind::kGRU) {
    blocks = (H * element + 63) / 64;
    // Two groups of 16 units keep the four schedulers of a multiprocessor busy; more blocks would have less to do.
    const int64_t pairs = (strips + 1) / 2;
    while (cluster < kClusterBlocks && pairs > kFewGroups * cluster) cluster *= 2;
    groups = (pairs + cluster - 1) / cluster;
  }
  int64_t weights_bytes() const { return directions * strips * gates * blocks * 512; }
  int kernel_groups() const { return groups > kFewGroups ? kManyGroups : kFewGroups; }
  int64_t tiles(int64_t rows) const { return (B + rows - 1) / rows; }
  LaunchConfig config(PassKind pass, int64_t rows, void* stream) const {
    LaunchConfig config;
    config.grid = {directions * tiles(rows) * cluster};
    config.block = static_cast<int>(groups * kGroupThreads);
    config.cluster = cluster;
    config.stream = stream;
    dispatch_element([&](auto storage) {
      using S = decltype(storage);
      const bool forward = pass == PassKind::kForward;
      const int64_t summed = forward ? gates : 1, pushed = forward ? 1 : gates, of_k = pushed * blocks;
      const int64_t rest = blocks_of_warp(of_k) - kept_blocks<S>(kernel_groups(), static_cast<int>(summed));
      SharedBytes bytes;
      const auto lay_out = [&](auto of_kernel) {
        const ClusterMemory<S, decltype(of_kernel)::value, SharedBytes> memory(bytes, rows, of_k, rest, summed, pushed,
                                                                               forward ? gates : 0);
        static_cast<void>(memory);
      };
      if (kernel_groups() == kFewGroups) {
        lay_out(std::integral_constant<int, kFewGroups>{});
      } else {
        lay_out(std::integral_constant<int, kManyGroups>{});
      }
      config.shared_bytes = bytes.bytes();
    });
    return config;
  }

 private:
  template <class F>
  void dispatch_element(F&& f) const {
    if (element == 4) return f(float{});
    f(Half{});
  }
};

struct ClusterForwardSpace {
  Link* links;
  void *weights, *from_x;
  ClusterForwardSpace(Space& space, const ClusterShape& s) {
    links = static_cast<Link*>(space.take(s.directions * (s.N + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    from_x = space.take(s.directions * s.N * s.gates * s.H * sizeof(float));
  }
};
struct ClusterBackwardSpace {
  Link* links;
  void *weights, *dgates_x, *dgates_h, *partial;
  ClusterBackwardSpace(Space& space, const ClusterShape& s, const RecurrentArgs& args) {
    const int64_t of_gates = s.directions * s.N * s.gates * s.H * s.element;
    links = static_cast<Link*>(space.take(s.directions * (s.N + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    dgates_x = space.take(of_gates);
    dgates_h = s.separate ? space.take(of_gates) : dgates_x;
    partial = space.take(partial_bytes(args, s.gates, false, s.gates));
  }
};

template <PassKind kPass, class F>
void with_cluster_kernel(CellKind kind, DType dtype, int64_t groups, F&& f) {
  with_cluster_cell(kind, dtype, [&](auto cell) {
    using Cell = decltype(cell);
    if constexpr (kPass == PassKind::kForward) {
      f(groups > kFewGroups ? cluster_forward_kernel<Cell, kManyGroups> : cluster_forward_kernel<Cell, kFewGroups>);
    } else {
      f(groups > kFewGroups ? cluster_backward_kernel<Cell, kManyGroups> : cluster_backward_kernel<Cell, kFewGroups>);
    }
  });
}

// Clusters that the device holds at once. The driver takes its time to say so, and a layer asks at every call.
int64_t resident(CellKind kind, DType dtype, PassKind pass, const ClusterShape& s, int64_t rows,
                 const CudaDevice& device) {
  static thread_local std::map<std::tuple<CellKind, DType, PassKind, int64_t, int64_t, int>, int64_t> known;
  const std::tuple key{kind, dtype, pass, s.H, rows, device.multiprocessors};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int64_t count = 0;
  const auto ask = [&](auto kernel) { count = resident_clusters(kernel, s.config(pass, rows, nullptr)); };
  if (pass == PassKind::kForward) {
    with_cluster_kernel<PassKind::kForward>(kind, dtype, s.groups, ask);
  } else {
    with_cluster_kernel<PassKind::kBackward>(kind, dtype, s.groups, ask);
  }
  known.emplace(key, count);
  return count;
}

}  // namespace

CudaPlan::Pass plan_cluster(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                            bool recompute, const CudaDevice& device) {
  CudaPlan::Pass plan{CudaTier::kNone, 1, 0, 0, 0, {}};
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
  if (s.groups > kManyGroups) {
    why_not("H must be at most " + std::to_string(kClusterBlocks * kManyGroups * kGroupUnits) + ", got " +
            std::to_string(args.H));
    return plan;
  }
  // As few rows as keep every place for a cluster busy; more only if there are more sequences.
  int64_t rows = 1, clusters = 0, at_once = 0, needed = 0;
  for (int64_t more = 1; more <= kClusterRows; more *= 2) {
    needed = s.config(pass, more, nullptr).shared_bytes;
    if (needed > device.shared_bytes) break;
    rows = more;
    clusters = s.tiles(rows) * s.directions;
    at_once = resident(kind, args.dtype, pass, s, rows, device);
    if (clusters <= at_once) break;
  }
  if (at_once < 1) {
    why_not("the weights of H = " + std::to_string(args.H) + " do not fit: a block would need " +
            std::to_string(needed) + " bytes of shared memory, of " + std::to_string(device.shared_bytes));
    return plan;
  }
  plan.cluster = s.cluster;
  plan.rows = static_cast<int>(rows);
  plan.block = static_cast<int>(s.groups * kGroupThreads);
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
  } else if (plan.workspace > kLargestWorkspace) {
    why_not("a workspace of " + std::to_string(plan.workspace) + " bytes");
  } else {
    plan.tier = CudaTier::kCluster;
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
  of.tiles = s.tiles(plan.rows);
  of.rows = plan.rows;
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
  with_cluster_kernel<PassKind::kForward>(kind, args.dtype, s.groups, [&](auto kernel) {
    launch(kernel, s.config(PassKind::kForward, plan.rows, stream), of);
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
  of.tiles = s.tiles(plan.rows);
  of.rows = plan.rows;
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
  with_cluster_kernel<PassKind::kBackward>(kind, args.dtype, s.groups, [&](auto kernel) {
    launch(kernel, s.config(PassKind::kBackward, plan.rows, stream), of);
  });
  run_gradients(kind, args, layout, of.layer,
                {at.dgates_x, at.dgates_h, nullptr, nullptr, nullptr, at.partial, s.gates}, stream);
}

}  // namespace seqkernels::cuda
