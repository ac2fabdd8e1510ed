// Sorted rows of a backward pass, and its scratch memory.
#pragma once

#include <vector>

#include "embedding_bag/cuda/bags.cuh"
#include "embedding_bag/cuda/radix_sort.cuh"

namespace seqkernels::bags_cuda {

constexpr int kPerGroup = 32;  // places per group; a warp counts the rows that begin in them by one ballot
static_assert(kPerGroup == kWarp, "bag_heads_kernel assigns one warp to the places of one group");

struct Sorted {
  const uint32_t* keys_;
  const uint32_t* places_;  // bags, or positions if gradients depend on the position
  int64_t N;
  uint32_t none;

  SK_DEVICE Global<const uint32_t> keys() const { return global<const uint32_t>(keys_, N); }
  SK_DEVICE Global<const uint32_t> places() const { return global<const uint32_t>(places_, N); }
  // The first place in [low, high) whose key is at least `key`.
  SK_DEVICE int64_t lower_bound(uint32_t key, int64_t low, int64_t high) const {
    const auto sorted = keys();
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sorted[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  SK_DEVICE bool begins(int64_t i) const {
    const auto sorted = keys();
    return sorted[i] < none && (i == 0 || sorted[i] != sorted[i - 1]);
  }
};

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }  // size of the compute type

inline int64_t total_rows(const BagForward& bags) {
  int64_t rows = 0;
  for (int64_t i = 0; i < bags.count; ++i) rows += bags.tables[i].E;
  return rows;
}

// Scratch memory of a backward pass; its layout is the same for all callers. Arrays that only sums need come last.
struct RowsMemory {
  TableDescriptor* tables;
  uint32_t* bag_of;
  SortMemory sort;
  int64_t groups, width, tiles;
  char* scales;            // [bags]
  char* tallies;           // scratch memory to compute them
  uint32_t* ordinals;      // [groups + 1]
  int64_t* values_before;  // [tables + 1]
  char* partials;          // [2 groups, width]
  char* squares;           // [tiles, N]

  RowsMemory(const BagForward& bags, Scratch& scratch, bool sums)
      : tables(scratch.take<TableDescriptor>(bags.count)),
        bag_of(scratch.take<uint32_t>(bags.tables[0].N)),
        sort(bags.tables[0].N, static_cast<uint32_t>(total_rows(bags)), scratch) {
    constexpr int64_t kMaxCount = 0xffffffff;
    const int64_t N = bags.tables[0].N, all = bounds_of(bags).bags, size = size_of(bags.shape.dtype);
    if (total_rows(bags) >= kMaxCount || N >= kMaxCount || all >= kMaxCount) {
      throw std::runtime_error("embedding_bag: rows, indices and bags must be below 2^32 - 1 each on CUDA");
    }
    const bool mean = bags.shape.mode == BagMode::kMean;
    groups = ceil_div(N, kPerGroup);
    width = sums ? ceil_div(most_columns(bags), 16) * 16 : 0;
    constexpr int64_t kLeastTile = 64;  // the smallest tile of any loader
    tiles = ceil_div(width, kLeastTile);
    scales = scratch.take<char>(sums && mean ? all * size : 0);
    tallies = scratch.take<char>(sums && mean ? bag_scales_scratch_bytes(bags) : 0);
    ordinals = scratch.take<uint32_t>(sums ? groups + 1 : 0);
    values_before = scratch.take<int64_t>(sums ? bags.count + 1 : 0);
    partials = scratch.take<char>(2 * groups * width * size);
    squares = scratch.take<char>(tiles > 1 ? tiles * N * size : 0);
  }
  Sorted sorted(const BagForward& bags) const {
    return {sort.keys[sort.result], sort.values[sort.result], sort.n, static_cast<uint32_t>(total_rows(bags))};
  }
  // Whether gradients depend on the position and not only on the row and the bag.
  static bool by_position(const BagForward& bags) { return bags.tables[0].weights != nullptr || bags.shape.extreme(); }
};

inline std::vector<TableDescriptor> row_descriptors(const BagForward& bags) {
  std::vector<TableDescriptor> tables(bags.count);
  int64_t bags_before = 0, rows_before = 0;
  for (int64_t i = 0; i < bags.count; ++i) {
    const BagTable& t = bags.tables[i];
    tables[i] = {};
    tables[i].t = t;
    tables[i].bags_before = bags_before;
    tables[i].rows_before = rows_before;
    bags_before += t.bags;
    rows_before += t.E;
  }
  return tables;
}

}  // namespace seqkernels::bags_cuda
