// Launchers of the cluster tier: which layers it supports, and the number of blocks per cluster.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "recurrent/cuda/cluster.cuh"
#include "recurrent/cuda/persistent.h"

namespace seqkernels::cuda {
namespace {

// Waves of clusters above which one launch per step is faster, since it reads the weights once for more rows.
constexpr int64_t kWavesOfClusters = 16;

struct ClusterShape : PersistentShape {
  int64_t groups;
  int cluster = 1;
  ClusterShape(CellKind of, const RecurrentArgs& args, int most_blocks) : PersistentShape(of, args) {
    // Two groups of 16 units keep the four schedulers of a multiprocessor busy; more blocks would be underused.
    while (cluster < most_blocks && pairs > kFewGroups * cluster) cluster *= 2;
    groups = (pairs + cluster - 1) / cluster;
  }
  int most_groups() const { return kind.options ? kFewGroups : kManyGroups; }
  int kernel_groups() const { return groups > kFewGroups ? kManyGroups : kFewGroups; }
};

// Calls f(kernel, config), where config(rows, stream) is the launch configuration.
template <PassKind kPass, class F>
void with_cluster_kernel(const ClusterShape& s, F&& f) {
  with_persistent_cell(s.kind, [&](auto cell) {
    using Cell = decltype(cell);
    const auto with_groups = [&](auto groups) {
      constexpr int kGroups = decltype(groups)::value;
      const auto config = [&](const ClusterSizes& sizes, int64_t rows, void* stream) {
        SharedBytes bytes;
        const ClusterMemory<typename Cell::Storage, kGroups, SharedBytes> memory(bytes, rows, sizes);
        static_cast<void>(memory);
        LaunchConfig config;
        config.grid = {s.directions * s.tiles(rows) * s.cluster};
        config.block = static_cast<int>(s.groups * kGroupThreads);
        config.cluster = s.cluster;
        config.shared_bytes = bytes.bytes();
        config.stream = stream;
        return config;
      };
      if constexpr (kPass == PassKind::kForward) {
        f(cluster_forward_kernel<Cell, kGroups>,
          [&](int64_t rows, void* stream) { return config(ClusterForward<Cell, kGroups>::sizes(s.H), rows, stream); });
      } else {
        f(cluster_backward_kernel<Cell, kGroups>,
          [&](int64_t rows, void* stream) { return config(ClusterBackward<Cell, kGroups>::sizes(s.H), rows, stream); });
      }
    };
    if constexpr (!Cell::kOptions) {
      if (s.kernel_groups() == kManyGroups) return with_groups(std::integral_constant<int, kManyGroups>{});
    }
    with_groups(std::integral_constant<int, kFewGroups>{});
  });
}
template <class F>
void with_cluster_kernel(PassKind pass, const ClusterShape& s, F&& f) {
  if (pass == PassKind::kForward) return with_cluster_kernel<PassKind::kForward>(s, f);
  with_cluster_kernel<PassKind::kBackward>(s, f);
}

LaunchConfig config_of(PassKind pass, const ClusterShape& s, int64_t rows) {
  LaunchConfig found;
  with_cluster_kernel(pass, s, [&](auto, auto config) { found = config(rows, nullptr); });
  return found;
}

// Clusters resident at once. Cached, since the driver query is slow and every call needs it.
int64_t resident(PassKind pass, const ClusterShape& s, int64_t rows, const CudaDevice& device) {
  if (device.described) return device.multiprocessors / s.cluster;
  using Key = std::tuple<decltype(s.kind.key()), PassKind, int64_t, int64_t, int, int, int>;
  static thread_local std::map<Key, int64_t> known;
  const Key key{s.kind.key(), pass, s.H, rows, s.cluster, device.multiprocessors, 10 * device.major + device.minor};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int64_t count = 0;
  with_cluster_kernel(pass, s,
                      [&](auto kernel, auto config) { count = resident_clusters(kernel, config(rows, nullptr)); });
  known.emplace(key, count);
  return count;
}

// The shape with the largest cluster that the device runs. Clusters of more than 8 blocks are not portable: a device,
// or a part of one, may run none of them.
std::shared_ptr<const ClusterShape> largest_shape(CellKind kind, PassKind pass, const RecurrentArgs& args,
                                                  const CudaDevice& device) {
  const auto largest = std::make_shared<const ClusterShape>(kind, args, kClusterBlocks);
  auto s = largest;
  while (s->cluster > 1 && s->groups <= s->most_groups()) {
    const bool fits = config_of(pass, *s, 1).shared_bytes <= device.shared_bytes;
    if (fits && resident(pass, *s, 1, device) > 0) return s;
    s = std::make_shared<const ClusterShape>(kind, args, s->cluster / 2);
  }
  return s->groups <= s->most_groups() ? s : largest;
}

}  // namespace

CudaPlan plan_cluster(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout, bool recompute,
                      const CudaDevice& device) {
  CudaPlan plan{};
  plan.cluster = 1;
  const auto why_not = [&](const std::string& why) { plan.reasons.push_back("cluster: " + why); };
  if (device.major < 9) {
    why_not("compute capability must be 9.0 or more, got " + std::to_string(device.major) + "." +
            std::to_string(device.minor));
  }
  if (!allows_tier(CudaTier::kCluster)) why_not("switched off");
  for (const std::string& why : persistent_obstacles(args, layout)) why_not(why);
  if (args.H % kUnits != 0) why_not("H must be a multiple of 8, got " + std::to_string(args.H));
  if (!plan.reasons.empty()) return plan;

  const auto shape = largest_shape(kind, pass, args, device);
  const ClusterShape& s = *shape;
  plan.shape = shape;
  if (s.groups > s.most_groups()) {
    why_not("H must be at most " + std::to_string(kClusterBlocks * s.most_groups() * kPairUnits) +
            (s.kind.options ? " with options" : "") + ", got " + std::to_string(args.H));
    return plan;
  }
  // The fewest rows per tile for which all clusters are resident; more only if there are more sequences.
  int64_t rows = 0, clusters = 0, at_once = 0;
  for (int64_t more = 1; more <= kMostRows; more *= 2) {
    const int64_t needed = config_of(pass, s, more).shared_bytes;
    const bool fits = needed <= device.shared_bytes;
    const int64_t now = fits ? resident(pass, s, more, device) : 0;
    if (now < 1) {
      if (rows > 0) break;
      const std::string bytes = std::to_string(needed) + " bytes of shared memory";
      why_not(fits ? "the device runs no cluster of " + std::to_string(s.cluster) + " blocks with " + bytes + " each"
                   : "the weights of H = " + std::to_string(args.H) + " do not fit: a block would need " + bytes +
                         ", of " + std::to_string(device.shared_bytes));
      return plan;
    }
    rows = more;
    at_once = now;
    clusters = s.tiles(rows) * s.directions;
    if (clusters <= at_once) break;
  }
  plan.cluster = s.cluster;
  plan.rows = static_cast<int>(rows);
  set_launch(plan, config_of(pass, s, rows));
  plan.workspace = persistent_workspace(s, pass, args, recompute);
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

void forward_by_clusters(const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                         void* stream) {
  const ClusterShape& s = *static_cast<const ClusterShape*>(plan.shape.get());
  WorkspaceArena space(workspace);
  const PersistentForwardSpace at(space, s);
  const PersistentForwardArgs of = start_forward(s, args, layout, plan.rows, at, stream);
  with_cluster_kernel<PassKind::kForward>(
      s, [&](auto kernel, auto config) { launch(kernel, config(plan.rows, stream), of); });
}

void backward_by_clusters(const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                          void* stream) {
  const ClusterShape& s = *static_cast<const ClusterShape*>(plan.shape.get());
  WorkspaceArena space(workspace);
  const PersistentBackwardSpace at(space, s, args, args.saved == nullptr);
  const PersistentBackwardArgs of = start_backward(s, args, layout, plan.rows, at, stream);
  with_cluster_kernel<PassKind::kBackward>(
      s, [&](auto kernel, auto config) { launch(kernel, config(plan.rows, stream), of); });
  finish_backward(s, args, layout, at, of.layer, stream);
}

}  // namespace seqkernels::cuda
