// Loads indices as rows of a table and checks them.
#pragma once

#include "embedding_bag/cuda/bags.cuh"

namespace seqkernels::bags_cuda {

// Loads the indices of some positions as rows of the table, with their weights.
template <class S>
struct IndexLoader {
  using T = typename Element<S>::T;
  static constexpr uint32_t kSkipped = 0xffffffffu;  // padding or out of range

  Integers indices;
  Weights<S> weights;
  int64_t E, padding;
  FaultReporter faults;

  SK_DEVICE IndexLoader(const BagTable& t, bool wide_indices, bool wide_weights, FaultReporter faults_)
      : indices{t.indices, t.N, wide_indices},
        weights{t.weights, t.N, wide_weights},
        E(t.E),
        padding(t.padding),
        faults(faults_) {}
  // Loads up to n indices from position `first` on; the others are kSkipped.
  template <int kMaxCount>
  SK_DEVICE void fetch(uint32_t (&rows)[kMaxCount], int64_t first, int n) const {
    if (indices.wide) {
      fetch_as<int64_t>(rows, first, n);
    } else {
      fetch_as<int32_t>(rows, first, n);
    }
  }
  SK_DEVICE T weight(int64_t position) const { return weights.data == nullptr ? T(1) : weights[position]; }

 private:
  template <class I, int kMaxCount>
  SK_DEVICE void fetch_as(uint32_t (&rows)[kMaxCount], int64_t first, int n) const {
    const auto from = global<const I>(indices.data, indices.count);
    I index[kMaxCount];
    bool invalid = false;
    SK_UNROLL
    for (int j = 0; j < kMaxCount; ++j) index[j] = j < n ? load<Cache::kReadOnly>(from, first + j) : I(0);
    SK_UNROLL
    for (int j = 0; j < kMaxCount; ++j) {
      const bool inside = static_cast<uint64_t>(index[j]) < static_cast<uint64_t>(E);
      invalid |= j < n && !inside;
      rows[j] = j < n && inside && index[j] != padding ? static_cast<uint32_t>(index[j]) : kSkipped;
    }
    if (invalid) report<I>(first, n < kMaxCount ? n : kMaxCount);
  }
  template <class I>
  SK_DEVICE void report(int64_t first, int64_t n) const {
    const auto from = global<const I>(indices.data, indices.count);
    for (int64_t i = first; i < first + n; ++i) {
      const int64_t index = from[i];
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(E)) return faults.report(BagFault::kIndex, i);
    }
  }
};

}  // namespace seqkernels::bags_cuda
