// max_norm on CUDA: scales rows with a larger norm down to it.
#include "embedding_bag/cuda/sorted_rows.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

struct RenormArgs {
  BagTable t;
  Sorted sorted;
  double max_norm, p;
  int group;
};

// One group per place; it acts where a row begins.
template <class S>
SK_KERNEL(kThreads)
bag_renorm_kernel(const SK_GRID_CONSTANT RenormArgs a) {
  using T = typename Element<S>::T;
  const BagTable& t = a.t;
  const int64_t i = grid_thread_index() / a.group;
  if (i >= a.sorted.N || !a.sorted.begins(i)) return;
  const int64_t row = a.sorted.keys()[i];
  const int lane = thread_index() % a.group;
  const auto w = global<S>(const_cast<void*>(t.table), (t.E - 1) * t.row_stride + (t.D - 1) * t.column_stride + 1) +
                 row * t.row_stride;
  const bool largest = a.p > 0 && a.p * 2 == a.p, smallest = a.p < 0 && a.p * 2 == a.p;  // p is infinite
  double sum = smallest ? 1.0 / 0.0 : 0.0;
  for (int64_t d = lane; d < t.D; d += a.group) {
    const double x = fabs(double(widen(load<Cache::kDefault>(w, d * t.column_stride))));
    if (largest) {
      sum = x > sum || x != x ? x : sum;
    } else if (smallest) {
      sum = x < sum || x != x ? x : sum;
    } else {
      sum += a.p == 2 ? x * x : a.p == 1 ? x : a.p == 0 ? double(x != 0) : pow(x, a.p);
    }
  }
  for (int distance = a.group / 2; distance > 0; distance /= 2) {
    const double x = shuffle_xor(sum, distance, kWarp, group_mask(a.group));
    if (largest) {
      sum = x > sum || x != x ? x : sum;
    } else if (smallest) {
      sum = x < sum || x != x ? x : sum;
    } else {
      sum += x;
    }
  }
  const double norm = a.p == 2 ? sqrt(sum) : a.p == 1 || a.p == 0 || largest || smallest ? sum : pow(sum, 1 / a.p);
  if (!(norm > a.max_norm)) return;
  const T factor = T(a.max_norm / (norm + 1e-7));
  for (int64_t d = lane; d < t.D; d += a.group) {
    const T x = widen(load<Cache::kDefault>(w, d * t.column_stride));
    w[d * t.column_stride] = narrow<S>(x * factor);
  }
}

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

int64_t bag_renorm_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  RowsMemory memory(bags, scratch, false);
  return scratch.bytes();
}

void launch_bag_renorm(const BagForward& bags, double max_norm, double norm_type, void* memory, void* stream) {
  const BagTable& t = bags.tables[0];
  if (t.N == 0 || t.bags == 0 || t.D == 0 || t.E == 0) return;
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, false);
  dispatch(bags.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int group = group_for<Columns<S, false>>(t.D);
    const RenormArgs args{t, m.sorted(bags), max_norm, norm_type, group};
    launch(bag_renorm_kernel<S>, blocks_of(t.N * group, stream), args);
  });
}

}  // namespace seqkernels
