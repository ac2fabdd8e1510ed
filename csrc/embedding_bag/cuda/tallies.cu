// Sums over bags that read no rows: the divisors of means, and sums of per-sample weights.
#include "embedding_bag/cuda/walk.cuh"

namespace seqkernels::bags_cuda {
namespace {

struct LengthArgs {
  Bounds bounds;
  void* scales;
};

template <class T>
SK_KERNEL(kThreads)
bag_lengths_kernel(const SK_GRID_CONSTANT LengthArgs a) {
  const int64_t bag = grid_thread_index();
  if (bag >= a.bounds.bags) return;
  global<T>(a.scales, a.bounds.bags)[bag] = T(1) / T(a.bounds.clamped(bag).size());
}

template <class S>
void launch_tallies(const BagForward& bags, const ManyTables& tables, void* tallies, bool inverted, Scratch& scratch,
                    void* stream) {
  using T = typename Element<S>::T;
  auto args = forward_args<ManyTables, T>(bags, nullptr);
  args.tables = tables;
  args.ranges = args.bounds.bags;
  args.partials = allocate_partials<T>(scratch, bags, true);
  args.window_owners = scratch.take<int64_t>(args.windows);
  args.tallies = static_cast<T*>(tallies);
  args.inverted = inverted;
  launch_walk<TallyRows<S>, TallyRows<S>>(bags, args, stream);
}

}  // namespace

int64_t bag_scales_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  dispatch(bags.shape.dtype, [&](auto storage) { allocate_partials<Compute<decltype(storage)>>(scratch, bags, true); });
  scratch.take<int64_t>(windows_of(bags));
  return scratch.bytes();
}

void launch_bag_scales(const BagForward& bags, const ManyTables& tables, void* scales, void* memory, void* stream) {
  const BagTable& t = bags.tables[0];
  const bool by_weight = t.weights != nullptr && bags.shape.mean_by == MeanBy::kWeight;
  dispatch(bags.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (by_weight || t.padding >= 0) {
      Scratch scratch(memory);
      launch_tallies<S>(bags, tables, scales, true, scratch, stream);
    } else {
      const LengthArgs args{bounds_of(bags), scales};
      launch(bag_lengths_kernel<Compute<S>>, blocks_of(args.bounds.bags, stream), args);
    }
  });
}

void launch_bag_tallies(const BagForward& bags, const ManyTables& tables, void* tallies, void* memory, void* stream) {
  dispatch(bags.shape.dtype, [&](auto storage) {
    Scratch scratch(memory);
    launch_tallies<decltype(storage)>(bags, tables, tallies, false, scratch, stream);
  });
}

}  // namespace seqkernels::bags_cuda
