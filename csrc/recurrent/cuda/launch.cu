// Entry points of the ops: which tier runs a pass, and its launch.
#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "recurrent/cuda/steps.h"

namespace seqkernels {

namespace {
std::atomic<bool> tf32_allowed{false};
}
bool allows_tf32() { return tf32_allowed; }
bool set_allows_tf32(bool allow) { return tf32_allowed.exchange(allow); }

CudaDevice current_cuda_device() {
  const DeviceLimits limits = device_limits();
  return {limits.major, limits.minor, limits.multiprocessors, limits.shared_bytes};
}

const char* cuda_tier_name(CudaTier tier) {
  switch (tier) {
    case CudaTier::kCell:
      return "cell";
    case CudaTier::kCluster:
      return "cluster";
    case CudaTier::kGrid:
      return "grid";
    case CudaTier::kSteps:
      return "steps";
    default:
      return "none";
  }
}

namespace {

constexpr CudaTier kTiers[] = {CudaTier::kCell, CudaTier::kCluster, CudaTier::kGrid, CudaTier::kSteps};
int bit_of(CudaTier tier) { return 1 << static_cast<int>(tier); }

int tiers_called(const std::vector<std::string>& names, const std::string& where) {
  int bits = 0;
  for (const std::string& name : names) {
    int bit = 0;
    for (const CudaTier tier : kTiers) {
      if (name == cuda_tier_name(tier)) bit = bit_of(tier);
    }
    if (bit == 0)
      throw std::invalid_argument(where + " must name some of cell, cluster, grid and steps, got '" + name + "'");
    bits |= bit;
  }
  return bits;
}

std::atomic<int>& tiers() {
  static std::atomic<int> bits = [] {
    const char* wanted = std::getenv("SEQKERNELS_CUDA_TIERS");
    std::vector<std::string> names;
    if (wanted == nullptr || *wanted == 0) {
      for (const CudaTier tier : kTiers) names.push_back(cuda_tier_name(tier));
    } else {
      std::istringstream list(wanted);
      for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    }
    return tiers_called(names, "the environment variable SEQKERNELS_CUDA_TIERS");
  }();
  return bits;
}

}  // namespace

bool allows_tier(CudaTier tier) { return (tiers().load() & bit_of(tier)) != 0; }

std::vector<std::string> set_cuda_tiers(const std::vector<std::string>& names) {
  const int before = tiers().exchange(tiers_called(names, "set_cuda_tiers: names"));
  std::vector<std::string> were;
  for (const CudaTier tier : kTiers) {
    if (before & bit_of(tier)) were.push_back(cuda_tier_name(tier));
  }
  return were;
}

CudaPlan plan_recurrent_cuda(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                             bool recompute, const CudaDevice& device) {
  using namespace cuda;
  CudaPlan plan{};
  const auto why_not = [&](const std::string& why) { plan.reasons.push_back("steps: " + why); };
  if (!shape_of(kind).cuda) why_not(std::string(shape_of(kind).name) + " has no CUDA kernel");
  if (args.heads != 1) why_not("heads must be 1, got " + std::to_string(args.heads));
  if (args.weights[0].w_hr != nullptr) {
    why_not("a projection must be absent, got one to " + std::to_string(args.P));
  }
  if (device.major < 8) {
    why_not("compute capability must be 8.0 or more, got " + std::to_string(device.major) + "." +
            std::to_string(device.minor));
  }
  if (!plan.reasons.empty()) return plan;
  // The first tier that supports the layer; the reasons of those before it are kept.
  std::vector<std::string> reasons;
  const auto supports = [&](CudaPlan pass_plan) {
    plan = std::move(pass_plan);
    reasons.insert(reasons.end(), plan.reasons.begin(), plan.reasons.end());
    plan.reasons = reasons;
    return plan.tier != CudaTier::kNone;
  };
  if (args.walk.T == 1 && supports(plan_single_step(kind, pass, args, layout, recompute))) return plan;
  if (supports(plan_cluster(kind, pass, args, layout, recompute, device))) return plan;
  if (supports(plan_grid(kind, pass, args, layout, recompute, device))) return plan;
  if (allows_tier(CudaTier::kSteps)) {
    supports(plan_steps(kind, pass, args, recompute));
  } else {
    plan.reasons.push_back("steps: switched off");
  }
  return plan;
}

void launch_recurrent_forward(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan,
                              void* workspace, void* stream) {
  switch (plan.tier) {
    case CudaTier::kCell:
      return cuda::forward_by_single_step(kind, args, layout, workspace, stream);
    case CudaTier::kCluster:
      return cuda::forward_by_clusters(args, layout, plan, workspace, stream);
    case CudaTier::kGrid:
      return cuda::forward_by_grid(args, layout, plan, workspace, stream);
    case CudaTier::kSteps:
      return cuda::forward_by_steps(kind, args, layout, workspace, stream);
    default:
      throw std::logic_error("launch_recurrent_forward: the plan has no kernels");
  }
}

void launch_recurrent_backward(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan,
                               void* workspace, void* stream) {
  switch (plan.tier) {
    case CudaTier::kCell:
      return cuda::backward_by_single_step(kind, args, layout, workspace, stream);
    case CudaTier::kCluster:
      return cuda::backward_by_clusters(args, layout, plan, workspace, stream);
    case CudaTier::kGrid:
      return cuda::backward_by_grid(args, layout, plan, workspace, stream);
    case CudaTier::kSteps:
      return cuda::backward_by_steps(kind, args, layout, workspace, stream);
    default:
      throw std::logic_error("launch_recurrent_backward: the plan has no kernels");
  }
}

}  // namespace seqkernels
