// max_norm: scales rows that occur and whose norm is larger down to it.
#include "embedding_bag/cpu/bags.h"
#include "embedding_bag/cpu/rows.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

template <class F>
double norm_of(F&& value, int64_t D, double p) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double x = __builtin_fabs(value(d));
    if (p == 2) {
      sum += x * x;
    } else if (p == 1) {
      sum += x;
    } else if (__builtin_isinf(p)) {
      sum = p > 0 ? (x > sum || x != x ? x : sum) : (d == 0 || x < sum || x != x ? x : sum);
    } else if (p == 0) {
      sum += x != 0;
    } else {
      sum += __builtin_pow(x, p);
    }
  }
  return p == 2 ? __builtin_sqrt(sum) : p == 1 || p == 0 || __builtin_isinf(p) ? sum : __builtin_pow(sum, 1 / p);
}

template <class S, class U>
void renorm(const BagTable& t, const RowSort& sort, double max_norm, double p) {
  using T = Compute<S>;
  const Pair<U>* pairs = static_cast<const Pair<U>*>(sort.pairs);
  for_each_part(sort.division, [&](int64_t thread) {
    for (int64_t begin = sort.begins[thread]; begin < sort.begins[thread + 1];
         begin = end_of_row(pairs, sort.n, begin)) {
      S* w = static_cast<S*>(const_cast<void*>(t.table)) + int64_t(pairs[begin].row) * t.row_stride;
      const auto value = [&](int64_t d) { return double(load_value(w + d * t.column_stride)); };
      const double norm = norm_of(value, t.D, p);
      if (!(norm > max_norm)) continue;
      const T factor = T(max_norm / (norm + 1e-7));
      for (int64_t d = 0; d < t.D; ++d) {
        const T scaled = load_value(w + d * t.column_stride) * factor;
        convert(w + d * t.column_stride, &scaled, 1);
      }
    }
  });
}

}  // namespace

BagFault bag_renorm(const BagBackward& args, double max_norm, double norm_type) {
  RowSort sort;
  const BagFault fault = bag_sort(args, sort);
  if (fault.kind != BagFault::kNone) return fault;
  dispatch(args.shape.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (sort.wide) {
      renorm<S, uint64_t>(args.table, sort, max_norm, norm_type);
    } else {
      renorm<S, uint32_t>(args.table, sort, max_norm, norm_type);
    }
  });
  return fault;
}

}  // namespace seqkernels::SEQKERNELS_ISA
