// The gradient of EmbeddingBag's per-sample weights on CUDA.
#include <vector>

#include "embedding_bag/cuda/index_loader.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

struct WeightArgs {
  ManyTables tables;
  Bounds bounds;
  FaultReporter faults;
  bool extreme, wide_indices, wide_weights;
  int group;
  int64_t N;
  const void* scales;   // [bags] or null: factor of a bag's dot products
  void* dots;           // [N]
  bool wide_dots;       // dots are in the compute type; else in the table's dtype
  const void* weights;  // [N]; used for `weighted`
  void* weighted;       // [N] or null: weights * dots, in the compute type
};

// <gradient of the bag, row> for kDots consecutive positions per group. Lanes accumulate over the whole row and are
// summed once at its end.
constexpr int kDots = 4;  // with as many rows of gradients, eight loads are in flight

template <class S, bool kWide>
SK_KERNEL(kWalkThreads, sizeof(S) == 8 && !kWide ? 2 : 3)
bag_dots_kernel(const SK_GRID_CONSTANT WeightArgs a) {
  using C = Columns<S, kWide>;
  using T = typename Element<S>::T;
  using Rows = RowLoader<S, kWide>;
  constexpr uint32_t kSkipped = IndexLoader<S>::kSkipped;
  const int64_t first = grid_thread_index() / a.group * kDots, stop = min(a.N, first + kDots);
  if (first >= a.N) return;
  const int lane = thread_index() % a.group;
  T dots[kDots];
  SK_UNROLL
  for (int j = 0; j < kDots; ++j) dots[j] = 0;

  int64_t at = max(first, a.bounds.clamped(0).begin);
  const int64_t end = min(stop, a.bounds.clamped(a.bounds.bags - 1).end);
  int64_t bag = at < end ? a.bounds.bag_at(at) : a.bounds.bags;
  while (bag < a.bounds.bags) {  // once for each table with some of the positions
    const TableDescriptor table = a.tables.of_bag(bag);
    const BagTable& t = table.t;
    const int64_t last_bag = table.bags_before + t.bags;
    const IndexLoader<S> loader(t, a.wide_indices, false, a.faults);
    uint32_t rows[kDots];
    int64_t bags[kDots];
    SK_UNROLL
    for (int j = 0; j < kDots; ++j) {
      const int64_t position = first + j;
      uint32_t row[1] = {kSkipped};
      bags[j] = bag;
      if (position >= at && position < end) {
        while (bag < last_bag && a.bounds.begin(bag + 1) <= position) ++bag;
        if (bag < last_bag) {
          at = position + 1;
          bags[j] = bag;
          loader.fetch(row, position, 1);
        }
      }
      rows[j] = row[0];
    }
    if (at == end) bag = a.bounds.bags;
    const auto grad = global<const S>(t.out, table.rows_end(t.out_stride));
    const auto arg = global<const int32_t>(t.arg, a.extreme ? table.rows_end(t.arg_stride) : 0);
    for (int64_t column = 0; column < t.D; column += C::kTile) {
      const C columns{t.D, column, lane, a.group};
      const Rows row_loads = row_loader<S, kWide>(t, columns), grad_loads{grad, 1, columns};
      typename Rows::Raw raw[kDots], raw_grad[kDots];
      SK_UNROLL
      for (int j = 0; j < kDots; ++j) {
        if (rows[j] == kSkipped) continue;
        row_loads.load(raw[j], rows[j] * t.row_stride);
        grad_loads.load(raw_grad[j], table.output_offset(bags[j], t.out_stride));
      }
      SK_UNROLL
      for (int j = 0; j < kDots; ++j) {
        if (rows[j] == kSkipped) continue;
        const int64_t arg_place = a.extreme ? table.output_offset(bags[j], t.arg_stride) : 0;
        const int64_t within = a.extreme ? first + j - a.bounds.begin(bags[j]) : 0;
        SK_UNROLL
        for (int v = 0; v < C::kCount; ++v) {
          if (!columns.in_row(v)) continue;
          if (a.extreme && arg[arg_place + columns.at(v)] != within) continue;
          dots[j] = fma(grad_loads.value(raw_grad[j], v), row_loads.value(raw[j], v), dots[j]);
        }
      }
    }
  }
  SK_UNROLL
  for (int j = 0; j < kDots; ++j) dots[j] = group_sum(dots[j], a.group);
  if (lane != 0) return;
  const auto scales = global<const T>(a.scales, a.bounds.bags);
  SK_UNROLL
  for (int j = 0; j < kDots; ++j) {
    const int64_t position = first + j;
    if (position >= stop) continue;
    T dot = dots[j];
    if (scales && dot != 0) {  // the scale of a bag without counted rows is not finite
      const T scale = scales[a.bounds.bag_at(position)];
      dot *= scale;
    }
    if (a.wide_dots) {
      global<T>(a.dots, a.N)[position] = dot;
    } else {
      global<S>(a.dots, a.N)[position] = narrow<S>(dot);
    }
    if (a.weighted != nullptr) {
      const T weight = Weights<S>{a.weights, a.N, a.wide_weights}[position];
      global<T>(a.weighted, a.N)[position] = weight * dot;
    }
  }
}

// A mean by weight: dw_i = (d_i - sum(w d) / sum(w)) / sum(w), where d are the dot products.
struct CenterArgs {
  Bounds bounds;
  Integers indices;
  bool wide_weights;
  int64_t padding, N;
  const void* scales;  // [bags] 1 / sum of weights
  const void* sums;    // [bags] sum of weights * dots
  const void* dots;    // [N]
  void* dweights;      // [N]
};

template <class S>
SK_KERNEL(kThreads)
bag_center_kernel(const SK_GRID_CONSTANT CenterArgs a) {
  using T = typename Element<S>::T;
  const int64_t i = grid_thread_index();
  if (i >= a.N) return;
  T gradient = 0;
  if (i >= a.bounds.clamped(0).begin && i < a.bounds.clamped(a.bounds.bags - 1).end && a.indices[i] != a.padding) {
    const int64_t bag = a.bounds.bag_at(i);
    const T scale = global<const T>(a.scales, a.bounds.bags)[bag];
    const T sum = global<const T>(a.sums, a.bounds.bags)[bag];
    const T dot = global<const T>(a.dots, a.N)[i];
    gradient = (dot - sum * scale) * scale;
  }
  if (a.wide_weights) {
    global<T>(a.dweights, a.N)[i] = gradient;
  } else {
    global<S>(a.dweights, a.N)[i] = narrow<S>(gradient);
  }
}

struct WeightMemory {
  TableDescriptor* tables;  // [2, count]
  char* scales;             // [bags] each
  char* sums;
  char* dots;  // [N] each
  char* weighted;
  char* tallies;

  static bool needs_centering(const BagForward& bags) {
    return bags.shape.mode == BagMode::kMean && bags.shape.mean_by == MeanBy::kWeight;
  }
  WeightMemory(const BagForward& bags, Scratch& scratch) {
    const int64_t size = bags.shape.dtype == DType::kFloat64 ? 8 : 4, all = bounds_of(bags).bags, N = bags.tables[0].N;
    const bool mean = bags.shape.mode == BagMode::kMean, centering = needs_centering(bags);
    tables = scratch.take<TableDescriptor>(2 * bags.count);
    scales = scratch.take<char>(mean ? all * size : 0);
    sums = scratch.take<char>(centering ? all * size : 0);
    dots = scratch.take<char>(centering ? N * size : 0);
    weighted = scratch.take<char>(centering ? N * size : 0);
    tallies = scratch.take<char>(mean ? bag_scales_scratch_bytes(bags) : 0);
  }
};

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

int64_t bag_weights_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  WeightMemory memory(bags, scratch);
  return scratch.bytes();
}

void launch_bag_weights(const BagForward& bags, void* dweights, BagFaultWord* fault, void* memory, void* stream) {
  const BagShape& shape = bags.shape;
  const BagTable& t = bags.tables[0];
  Scratch scratch(memory);
  const WeightMemory m(bags, scratch);
  WeightArgs args{};
  args.bounds = bounds_of(bags);
  if (args.bounds.bags == 0) {
    const int64_t size = shape.dtype == DType::kFloat64                         ? 8
                         : shape.wide_weights || shape.dtype == DType::kFloat32 ? 4
                                                                                : 2;
    return fill_bytes(dweights, 0, t.N * size, stream);
  }
  std::vector<TableDescriptor> tables = descriptors_of(bags, 1);
  args.tables = upload_tables(tables.data(), bags.count, m.tables, stream);
  args.faults.word = fault;
  args.extreme = shape.extreme();
  args.wide_indices = shape.wide_indices;
  args.wide_weights = shape.wide_weights;
  args.N = t.N;
  args.scales = nullptr;
  args.dots = dweights;
  args.wide_dots = shape.wide_weights;
  if (shape.mode == BagMode::kMean) launch_bag_scales(bags, args.tables, m.scales, m.tallies, stream);
  const bool needs_centering = WeightMemory::needs_centering(bags);
  if (needs_centering) {
    args.dots = m.dots;
    args.wide_dots = true;
    args.weights = t.weights;
    args.weighted = m.weighted;
  } else if (shape.mode == BagMode::kMean) {
    args.scales = m.scales;
  }
  dispatch_rows(bags, true, [&](auto storage, auto wide) {
    using S = decltype(storage);
    if constexpr (!std::is_same<S, Byte>::value) {
      args.group = group_of<Columns<S, wide.value>>(bags);
      launch(bag_dots_kernel<S, wide.value>, blocks_of(ceil_div(args.N, kDots) * args.group, stream, 1, kWalkThreads),
             args);
    }
  });
  if (!needs_centering) return;
  BagForward sums = bags;
  std::vector<BagTable> weighted(bags.tables, bags.tables + bags.count);
  for (int64_t i = 0; i < bags.count; ++i) tables[i].t.weights = weighted[i].weights = m.weighted;
  sums.tables = weighted.data();
  sums.shape.wide_weights = true;
  const ManyTables uploaded_sums = upload_tables(tables.data(), bags.count, m.tables + bags.count, stream);
  launch_bag_tallies(sums, uploaded_sums, m.sums, m.tallies, stream);
  dispatch(shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    const CenterArgs centering{
        args.bounds, {t.indices, t.N, shape.wide_indices}, shape.wide_weights, t.padding, t.N, m.scales, m.sums, m.dots,
        dweights};
    launch(bag_center_kernel<S>, blocks_of(t.N, stream), centering);
  });
}

}  // namespace seqkernels
