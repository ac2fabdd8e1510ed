// How a layer is divided among threads.
#include <algorithm>

#include "recurrent/recurrent.h"

namespace seqkernels {

namespace {
// Multiply-adds below which a second thread does not pay off: starting it costs
// about 5 us.
constexpr double kProductsForThreads = 1e5;
// Duration of a step of one thread, in ns, below which a barrier per step, about 0.3 us, does not pay off.
constexpr double kWorthABarrier = 2.4e3;
// Bytes of weights that stay in a core's L2 cache (1 MiB on most processors)
// beside the activations.
constexpr double kWeightsPerCore = 512 * 1024;
// Rows of a register tile: a smaller row group does not fill it.
constexpr double kTileRows = 6;
}  // namespace

Plan plan_recurrent(const RecurrentArgs& args, CellKind kind, int64_t threads) {
  const CellShape cell = shape_of(kind);
  const Walk& walk = args.walk;
  const int64_t gates = cell.gates;
  // Under a joint normalisation the heads of a direction are one stream, with the units of all heads.
  const int64_t joined = cell.joint_norm ? args.heads : 1, streams = args.directions * args.heads / joined;
  const int64_t H = args.H / args.heads * joined, P = args.P / args.heads;
  const double steps = std::max<int64_t>(walk.T, 1), rows = walk.N / steps;
  const double step = rows * gates * H * P, total = walk.N * double(gates) * H * (args.D + P);
  // Products run at about 12 multiply-adds per ns in float32; a single step reads its weights from memory, at about 10
  // bytes per ns.
  const bool int8 = args.prepared != nullptr && args.prepared->precision == Precision::kInt8;
  const int64_t element = args.dtype == DType::kFloat64 ? 8
                          : args.prepared == nullptr    ? 4
                                                        : bytes_of(args.prepared->precision);
  // ns per multiply-add.
  const double product = args.dtype == DType::kFloat64 ? 0.16 : int8 ? 0.02 : 0.08;
  const double read = double(streams) * gates * H * (args.D + P) * element;
  Plan plan{1, 1, 1, total * streams * product + (walk.T <= 1 ? 0.1 * read : 0)};
  if (threads <= 1 || total * streams < kProductsForThreads) return plan;
  plan.threads = threads;
  const int64_t each = std::max<int64_t>(threads / streams, 1);
  const double weights = double(gates) * H * P * element;
  const bool rows_suffice = rows >= each * kTileRows || (rows >= each && weights <= kWeightsPerCore / 2);
  // As many shares of the units as have enough work in a step.
  const int64_t units = std::min({each, H / 32, int64_t(step * product / kWorthABarrier)});
  const bool units_suffice = units > 1;
  if (rows_suffice && (weights <= kWeightsPerCore || !units_suffice)) {
    plan.row_groups = std::min(each, std::max<int64_t>(walk.B, 1));
  } else if (units_suffice) {
    plan.unit_groups = units;
  } else if (walk.T == 1) {
    plan.unit_groups = std::min(each, std::max<int64_t>(H / 32, 1));
  } else {
    plan.row_groups = std::min(each, std::max<int64_t>(walk.B, 1));
  }
  plan.unit_groups = (plan.unit_groups + joined - 1) / joined;  // of each head
  if (plan.row_groups * plan.unit_groups * streams * joined == 1) plan.threads = 1;
  return plan;
}

}  // namespace seqkernels
