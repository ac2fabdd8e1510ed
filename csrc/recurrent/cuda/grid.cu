// Launchers of the grid tier: which layers it supports, and the division of the device into teams.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "recurrent/cuda/grid.cuh"
#include "recurrent/cuda/persistent.h"

namespace seqkernels::cuda {
namespace {

// Tiles per team above which one launch per step is faster, since it reads the weights once for more rows.
constexpr int64_t kMostTurns = 16;

// A layer on a device, with `pairs_of_block` pairs of strips per block.
struct GridShape : PersistentShape {
  int pairs_of_block;
  int64_t team;      // blocks
  int64_t launched;  // directions per launch
  int64_t teams, rows = 1, turns = 0;
  // For each product: blocks of K per warp, and those of them in shared memory and streamed.
  int64_t of_warp[2] = {}, in_shared[2] = {}, streamed[2] = {};
  int64_t shared_bytes = 0;
  PassKind pass;
  bool fits = false;

  GridShape(CellKind of, PassKind of_pass, const RecurrentArgs& args, int pairs_of, const CudaDevice& device)
      : PersistentShape(of, args),
        pairs_of_block(pairs_of),
        team((pairs + pairs_of - 1) / pairs_of),
        // One direction after the other if the device has no room for both.
        launched(directions * team <= device.multiprocessors ? directions : 1),
        teams(device.multiprocessors / (launched * team)),
        pass(of_pass) {
    if (teams == 0) return;
    // The fewest rows per tile for which every team has one tile; more only if there are more sequences.
    while (rows < kMostRows && tiles(rows) > teams) rows *= 2;
    teams = std::min(teams, tiles(rows));
    turns = (tiles(rows) + teams - 1) / teams;
    with_element([&](auto storage) {
      using S = decltype(storage);
      const bool forward = pass == PassKind::kForward;
      const int64_t of_k[2] = {(forward ? 1 : first) * blocks, stages ? blocks : 0};
      const int64_t multiplied[2] = {(forward ? first : 1) * pairs_of_block, stages ? pairs_of_block : 0};
      const int held = forward ? grid_forward_blocks<S>(pairs_of_block, static_cast<int>(gates), kind.options)
                               : grid_backward_blocks<S>(pairs_of_block, stages);
      const auto bytes = [&] {
        SharedBytes bytes;
        const int64_t rest = in_shared[0] * multiplied[0] + in_shared[1] * multiplied[1];
        const GridMemory<S, SharedBytes> memory(bytes, pairs_of_block, rest, multiplied[0], turns, forward ? gates : 0,
                                                forward && separate ? gates : 0, forward ? kRing + 1 : 3, 1 + cells);
        static_cast<void>(memory);
        return bytes.bytes();
      };
      for (int i = 0; i < 2; ++i) {
        of_warp[i] = (of_k[i] + kGridWarps - 1) / kGridWarps;
        in_shared[i] = std::max<int64_t>(of_warp[i] - held, 0);
      }
      while (in_shared[0] + in_shared[1] > 0 && bytes() > device.shared_bytes) {
        const int i = in_shared[1] > in_shared[0] ? 1 : 0;
        --in_shared[i];
        ++streamed[i];
      }
      shared_bytes = bytes();
      fits = shared_bytes <= device.shared_bytes && (all_streamed() == 0 || grid_streams<S>(pairs_of_block));
    });
  }
  int64_t all_streamed() const { return streamed[0] + streamed[1]; }
  int64_t launches() const { return directions / launched; }
  // Lower is better: resident weights first, then less work per multiprocessor and step, then fewer turns.
  auto cost() const {
    const int64_t all = turns * launches();
    return std::tuple{!fits, all_streamed() * all, all * pairs_of_block, all};
  }

  // Calls f with a value of the element type of the products.
  template <class F>
  void with_element(F&& f) const {
    if (element == 4) return f(float{});
    f(Half{});
  }
  LaunchConfig config(void* stream) const {
    LaunchConfig config;
    config.grid = {launched * teams * team};
    config.block = kGridThreads;
    config.shared_bytes = shared_bytes;
    config.cooperative = true;
    config.stream = stream;
    return config;
  }
  int64_t slot_bytes() const {
    return 2 * directions * tiles(rows) * (pass == PassKind::kForward ? 1 : first) * blocks * 512;
  }
  int64_t flag_bytes() const { return directions * tiles(rows) * pairs * static_cast<int64_t>(sizeof(uint32_t)); }
};

// The best division of a layer on a device; null if it has too many units.
std::shared_ptr<const GridShape> best_shape(CellKind kind, PassKind pass, const RecurrentArgs& args,
                                            const CudaDevice& device) {
  std::shared_ptr<const GridShape> best;
  for (int pairs = 1; pairs <= kMostPairs; ++pairs) {
    auto s = std::make_shared<const GridShape>(kind, pass, args, pairs, device);
    if (s->teams > 0 && (best == nullptr || s->cost() < best->cost())) best = s;
  }
  return best;
}

// The exchange follows the workspace that other persistent tiers need too. Flags and slots are cleared together.
struct GridSpace {
  char* cleared;
  int64_t bytes;
  GridLayout place;
  GridSpace(WorkspaceArena& space, const GridShape& s) {
    const int64_t flags = (s.flag_bytes() + 255) / 256 * 256;
    bytes = flags + s.slot_bytes();
    cleared = static_cast<char*>(space.take(bytes));
    place.flags = reinterpret_cast<uint32_t*>(cleared);
    place.slots = cleared == nullptr ? nullptr : cleared + flags;
    place.teams = static_cast<int>(s.teams);
    place.blocks = static_cast<int>(s.team);
    for (int i = 0; i < 2; ++i) place.in_shared[i] = static_cast<int>(s.in_shared[i]);
  }
};

template <PassKind kPass, class F>
void with_grid_kernel(const GridShape& s, F&& f) {
  with_persistent_cell(s.kind, [&](auto cell) {
    using Cell = decltype(cell);
    if constexpr (kPass == PassKind::kForward) {
      f(s.pairs_of_block > 1 ? grid_forward_kernel<Cell, 2> : grid_forward_kernel<Cell, 1>);
    } else {
      f(s.pairs_of_block > 1 ? grid_backward_kernel<Cell, 2> : grid_backward_kernel<Cell, 1>);
    }
  });
}

template <PassKind kPass, class Args>
void launch_all(const GridShape& s, Args args, void* stream) {
  for (int64_t first = 0; first < s.directions; first += s.launched) {
    args.place.direction = static_cast<int>(first);
    with_grid_kernel<kPass>(s, [&](auto kernel) { launch(kernel, s.config(stream), args); });
  }
}

// Blocks resident at once. Cached, since the driver query is slow and every call needs it.
int64_t resident(const GridShape& s, const CudaDevice& device) {
  if (device.described) return device.multiprocessors;
  static thread_local std::map<std::tuple<decltype(s.kind.key()), PassKind, int, int64_t, int, int>, int64_t> known;
  const std::tuple key{
      s.kind.key(), s.pass, s.pairs_of_block, s.shared_bytes, device.multiprocessors, 10 * device.major + device.minor};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int64_t count = 0;
  const auto ask = [&](auto kernel) { count = resident_blocks(kernel, s.config(nullptr)); };
  if (s.pass == PassKind::kForward) {
    with_grid_kernel<PassKind::kForward>(s, ask);
  } else {
    with_grid_kernel<PassKind::kBackward>(s, ask);
  }
  known.emplace(key, count);
  return count;
}

}  // namespace

CudaPlan plan_grid(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout, bool recompute,
                   const CudaDevice& device) {
  CudaPlan plan{};
  plan.cluster = 1;
  const auto why_not = [&](const std::string& why) { plan.reasons.push_back("grid: " + why); };
  if (!allows_tier(CudaTier::kGrid)) why_not("switched off");
  for (const std::string& why : persistent_obstacles(args, layout)) why_not(why);
  if (!plan.reasons.empty()) return plan;

  const std::shared_ptr<const GridShape> s = best_shape(kind, pass, args, device);
  if (s == nullptr) {
    const int64_t most = int64_t{device.multiprocessors} * kMostPairs * kPairUnits;
    why_not("H must be at most " + std::to_string(most) + " on " + std::to_string(device.multiprocessors) +
            " multiprocessors, got " + std::to_string(args.H));
    return plan;
  }
  plan.shape = s;
  plan.cluster = static_cast<int>(s->team);
  plan.teams = static_cast<int>(s->teams);
  plan.rows = static_cast<int>(s->rows);
  set_launch(plan, s->config(nullptr));
  WorkspaceArena space(nullptr);
  space.take(persistent_workspace(*s, pass, args, recompute));
  GridSpace(space, *s);
  plan.workspace = space.bytes();
  if (s->turns > kMostTurns) {
    why_not(std::to_string(s->turns) + " tiles of " + std::to_string(s->rows) + " sequences for each of " +
            std::to_string(s->teams) + " teams of " + std::to_string(s->team) + " blocks");
  } else if (!s->fits) {
    why_not("a block would need " + std::to_string(s->shared_bytes) + " bytes of shared memory, of " +
            std::to_string(device.shared_bytes));
  } else if (s->all_streamed() * s->turns > s->of_warp[0] + s->of_warp[1]) {
    why_not("the weights of H = " + std::to_string(args.H) + " do not fit, and would be read for " +
            std::to_string(s->turns) + " tiles one after the other");
  } else if (plan.workspace > kLargestWorkspace) {
    why_not("a workspace of " + std::to_string(plan.workspace) + " bytes");
  } else if (resident(*s, device) < s->config(nullptr).grid.x) {
    why_not("its blocks would not run all at once");
  } else {
    plan.tier = CudaTier::kGrid;
  }
  return plan;
}

void forward_by_grid(const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                     void* stream) {
  const GridShape& s = *static_cast<const GridShape*>(plan.shape.get());
  WorkspaceArena space(workspace);
  const PersistentForwardSpace at(space, s);
  const GridSpace grid(space, s);
  GridForwardArgs of{start_forward(s, args, layout, plan.rows, at, stream), grid.place};
  fill_bytes(grid.cleared, 0, grid.bytes, stream);
  launch_all<PassKind::kForward>(s, of, stream);
}

void backward_by_grid(const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                      void* stream) {
  const GridShape& s = *static_cast<const GridShape*>(plan.shape.get());
  WorkspaceArena space(workspace);
  const PersistentBackwardSpace at(space, s, args, args.saved == nullptr);
  const GridSpace grid(space, s);
  GridBackwardArgs of{start_backward(s, args, layout, plan.rows, at, stream), grid.place};
  fill_bytes(grid.cleared, 0, grid.bytes, stream);
  launch_all<PassKind::kBackward>(s, of, stream);
  finish_backward(s, args, layout, at, of.layer, stream);
}

}  // namespace seqkernels::cuda
