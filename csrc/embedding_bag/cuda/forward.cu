// Forward pass of EmbeddingBag on CUDA: sum, mean, max and min. The algorithm is described in walk.cuh.
#include <vector>

#include "embedding_bag/cuda/walk.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

constexpr int64_t kPositionsPerUnit = 64;  // positions per unit, if bags are shorter
constexpr int64_t kWaves = 4;

// A single table is passed as a kernel parameter, several in device memory. A single table with narrow rows is also
// passed in memory, which saves instantiations.
bool needs_upload(const BagForward& bags) {
  return !bags.shape.byte_rows && (bags.count > 1 || !wide_rows(bags, true));
}

// Bags per unit of work. Several bags per group amortise the latency of loading bounds and indices; enough groups to
// fill the device several times balance the load.
int64_t bags_per_unit(const Bounds& bounds, int64_t group, int64_t tiles) {
  if (bounds.N == 0) return 1;
  const int64_t held = device_limits().multiprocessors * int64_t{640};  // lanes
  const int64_t wanted = ceil_div(kPositionsPerUnit * bounds.bags, bounds.N),
                limit = bounds.bags * group * tiles / (kWaves * held);
  return max(1, min(min(wanted, limit), group));
}

template <class S, bool kWide, class Tables>
void forward_of(const BagForward& bags, const ManyTables& uploaded, BagFaultWord* fault, Scratch& scratch,
                void* stream) {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  auto args = forward_args<Tables, T>(bags, fault);
  args.bags_per_unit = bags_per_unit(args.bounds, group_of<C>(bags), tiles_of<C>(bags));
  const std::vector<TableDescriptor> tables = descriptors_of(bags, args.bags_per_unit);
  for (const TableDescriptor& table : tables) args.ranges += ceil_div(table.t.bags, args.bags_per_unit);
  if constexpr (std::is_same<Tables, OneTable>::value) {
    args.tables.only = tables[0];
  } else {
    args.tables = upload_tables(tables.data(), bags.count, const_cast<TableDescriptor*>(uploaded.descriptors), stream);
  }
  args.partials = allocate_partials<T>(scratch, bags, false);
  args.window_owners = scratch.take<int64_t>(args.windows);
  if (bags.shape.extreme()) {
    launch_walk<ExtremeRows<S, kWide>, ExtremeRows<S, false>>(bags, args, stream);
  } else {
    launch_walk<SumRows<S, kWide>, SumRows<S, false>>(bags, args, stream);
  }
}

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

int64_t bag_forward_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  scratch.take<TableDescriptor>(needs_upload(bags) ? bags.count : 0);
  dispatch(bags.shape.dtype,
           [&](auto storage) { allocate_partials<Compute<decltype(storage)>>(scratch, bags, false); });
  scratch.take<int64_t>(windows_of(bags));
  return scratch.bytes();
}

void launch_bag_forward(const BagForward& bags, BagFaultWord* fault, void* memory, void* stream) {
  if (bounds_of(bags).bags == 0) return;
  Scratch scratch(memory);
  const ManyTables uploaded{scratch.take<TableDescriptor>(needs_upload(bags) ? bags.count : 0), bags.count};
  dispatch_rows(bags, true, [&](auto storage, auto wide) {
    using S = decltype(storage);
    constexpr bool kBytes = std::is_same<S, Byte>::value;
    if constexpr (kBytes || wide.value) {
      if (!needs_upload(bags)) return forward_of<S, wide.value, OneTable>(bags, uploaded, fault, scratch, stream);
    }
    if constexpr (!kBytes) {
      forward_of<S, wide.value, ManyTables>(bags, uploaded, fault, scratch, stream);
    }
  });
}

}  // namespace seqkernels
