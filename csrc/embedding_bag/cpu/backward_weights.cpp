// The gradient of EmbeddingBag's per-sample weights.
#include "common/memory.h"
#include "embedding_bag/cpu/bags.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

// The gradient of a weight is the dot product of its row and its bag's gradient; for max and min, over the columns that
// the row provides. A mean divides by the count, or, by the sum of weights after subtracting the weighted mean of the
// dot products.
template <class S>
struct WeightGradient {
  using T = Compute<S>;
  using Int = typename Vec<T>::NativeInt;

  const BagBackward& args;
  T* dots;  // [N]
  void* dweights;
  const BagTable& t = args.table;
  const Bounds bounds{t, args.shape.wide_offsets};
  const bool large = t.E * t.D * int64_t(sizeof(S)) > Prefetch::kNearFrom;

  void run(int64_t low, int64_t high, BagFault& fault) const {
    IndexStream<S> index_stream(t, args.shape, min(bounds.begin(bounds.bags), high), fault);
    Memory memory(2 * sizeof(T) * t.D);
    T *grad = reinterpret_cast<T*>(memory.get()), *gathered = grad + t.D;
    for_each_unit(bounds, low, high, [&](const Unit& unit) {
      const int64_t* row_offsets = index_stream.at(unit.begin, unit.end);
      convert(grad, static_cast<const S*>(t.out) + output_offset(t, unit.bag, t.out_stride), t.D);
      const int32_t* winners = t.arg == nullptr ? nullptr : t.arg + output_offset(t, unit.bag, t.arg_stride);
      for (int64_t i = 0; i < unit.end - unit.begin; ++i) {
        const S* table = static_cast<const S*>(t.table);
        for (int64_t b = 0; large && b < t.D * int64_t(sizeof(S)); b += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(table + row_offsets[i + Prefetch::kNear]) + b);
        }
        if (row_offsets[i] < 0) {
          dots[unit.begin + i] = 0;
          continue;
        }
        const S* row = table + row_offsets[i];
        if (t.column_stride != 1) {
          S* side = reinterpret_cast<S*>(gathered);
          for (int64_t d = 0; d < t.D; ++d) side[d] = row[d * t.column_stride];
          row = side;
        }
        dots[unit.begin + i] = winners == nullptr ? product<false>(row, grad, nullptr, 0)
                                                  : product<true>(row, grad, winners, unit.chunk * kChunk + i);
      }
    });
  }

  template <bool kWinners>
  SEQKERNELS_INLINE T product(const S* row, const T* grad, const int32_t* winners, int64_t where) const {
    constexpr int64_t kWide = kLanes<T>;
    Native<T> sums[4] = {};
    const auto add = [&](Native<T>& sum, int64_t d, int64_t n) {
      Native<T> g = load(grad + d, n);
      if constexpr (kWinners) {
        const Int at = load_positions<T>(winners + d, n);
        g = at == Int{} + typename Vec<T>::Int(where) ? g : Native<T>{};
      }
      sum = fma(load(row + d, n), g, sum);
    };
    int64_t d = 0;
    for (; d + 4 * kWide <= t.D; d += 4 * kWide) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) add(sums[v], d + v * kWide, kWide);
    }
    for (int v = 0; d < t.D; d += kWide, ++v) add(sums[v], d, min(kWide, t.D - d));
    const Native<T> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    T lanes[kWide];
    store(lanes, all);
    for (int64_t half = kWide / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

  void finish(int64_t low, int64_t high, BagFault& fault) const {
    IndexStream<S> index_stream(t, args.shape, min(bounds.begin(bounds.bags), high), fault);
    for_each_unit(bounds, low, high, [&](const Unit& first) {
      if (first.chunk != 0) return;
      const int64_t begin = first.begin, end = bounds.begin(first.bag + 1);
      T divisor = 1, mean_dot = 0;
      if (args.shape.mode == BagMode::kMean) {
        T weight = 0, weighted_dots = 0;
        int64_t count = 0;
        for (int64_t from = begin; from < end; from += kChunk) {
          const int64_t to = min(end, from + kChunk);
          const int64_t* row_offsets = index_stream.at(from, to);
          const T* weights = index_stream.weights_at(from);
          for (int64_t i = 0; i < to - from; ++i) {
            if (row_offsets[i] < 0) continue;
            count += 1;
            weight += weights[i];
            weighted_dots += weights[i] * dots[from + i];
          }
        }
        divisor = T(count);
        if (args.shape.mean_by == MeanBy::kWeight) {
          divisor = weight;
          mean_dot = weighted_dots / weight;
        }
      }
      for (int64_t from = begin; from < end; from += kChunk) {
        const int64_t to = min(end, from + kChunk);
        if (args.shape.mode == BagMode::kMean) {
          const int64_t* row_offsets = index_stream.at(from, to);
          for (int64_t i = 0; i < to - from; ++i) {
            if (row_offsets[i] >= 0) dots[from + i] = (dots[from + i] - mean_dot) / divisor;
          }
        }
        if (dweights != dots) convert(static_cast<S*>(dweights) + from, dots + from, to - from);
      }
    });
  }
};

template <class S>
BagFault weight_gradient_of(const BagBackward& args, void* dweights) {
  using T = Compute<S>;
  const BagTable& t = args.table;
  int64_t longest = 0;
  const BagFault fault = check_offsets(t, args.shape.wide_offsets, longest);
  if (fault.kind != BagFault::kNone) return fault;
  const bool in_place = sizeof(S) == sizeof(T) || args.shape.wide_weights;
  Memory memory(in_place ? 0 : sizeof(T) * t.N);
  WeightGradient<S> gradient{args, static_cast<T*>(in_place ? dweights : memory.get()), dweights};
  const BagForward all{args.shape, &t, 1};
  const Division division = divide(gradient.bounds.work() * t.D * int64_t(sizeof(S)));
  Faults faults;
  const auto each = [&](auto&& pass) {
    for_each_share(all, division, [&](int64_t, int64_t low, int64_t high) {
      BagFault found{};
      pass(low, high, found);
      faults.add(found);
    });
  };
  each([&](int64_t low, int64_t high, BagFault& found) { gradient.run(low, high, found); });
  if (faults.first().kind != BagFault::kNone) return faults.first();
  if (!in_place || args.shape.mode == BagMode::kMean) {
    each([&](int64_t low, int64_t high, BagFault& found) { gradient.finish(low, high, found); });
  }
  // Positions behind the last bag have a zero gradient.
  const int64_t end = gradient.bounds.begin(t.bags), size = in_place ? sizeof(T) : sizeof(S);
  if (end < t.N) memset(static_cast<char*>(dweights) + end * size, 0, (t.N - end) * size);
  return {};
}

}  // namespace

BagFault bag_weights(const BagBackward& args, void* dweights) {
  return dispatch(args.shape.dtype,
                  [&](auto storage) { return weight_gradient_of<decltype(storage)>(args, dweights); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
