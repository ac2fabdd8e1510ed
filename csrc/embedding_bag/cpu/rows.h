// Shared by the CPU kernels that work by rows: sorted pairs, scalar loads and loops over threads.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/row_sort.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class U>
struct Pair {
  U row, source;  // source: a bag or a position
};

template <class S>
SEQKERNELS_INLINE Compute<S> load_value(const S* p) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return *p;
  } else {
    return load(p, 1)[0];
  }
}
SEQKERNELS_INLINE float load_value(const Half* p) { return half_to_float(p->bits); }
SEQKERNELS_INLINE float load_value(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// A row that occurs more often than this is summed in chunks of this size. Slots of partial sums are derived from the
// chunk's place among the sorted pairs: no two first chunks and no two later chunks share kRowChunk places.
constexpr int64_t kRowChunk = 512;
SEQKERNELS_INLINE int64_t partial_slots(int64_t n) { return 2 * (n / kRowChunk + 1); }
SEQKERNELS_INLINE int64_t partial_slot(int64_t begin, bool first) { return 2 * (begin / kRowChunk) + first; }

// The per-sample weight at a position.
template <class S>
SEQKERNELS_INLINE Compute<S> weight_at(const BagBackward& args, int64_t position) {
  if (args.shape.wide_weights) return static_cast<const Compute<S>*>(args.table.weights)[position];
  return load_value(static_cast<const S*>(args.table.weights) + position);
}

// The first pair with this row or a later one.
template <class U>
inline int64_t lower_bound(const Pair<U>* pairs, int64_t n, int64_t row) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (int64_t(pairs[middle].row) < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The end of the pairs of the row at `begin`.
template <class U>
SEQKERNELS_INLINE int64_t end_of_row(const Pair<U>* pairs, int64_t n, int64_t begin) {
  const U row = pairs[begin].row;
  const int64_t near = min(n, begin + 64);
  int64_t i = begin + 1;
  while (i < near && pairs[i].row == row) ++i;
  return i < near ? i : lower_bound(pairs, n, int64_t(row) + 1);
}

}  // namespace seqkernels::SEQKERNELS_ISA
