// Input of the backward pass of EmbeddingBag: the rows that occur, sorted, and the positions where they occur.
#pragma once

#include "common/memory.h"
#include "embedding_bag/embedding_bag.h"

namespace seqkernels {

// The result of BagKernels::sort: pairs of a row and the bag in which it occurs, or the position if the gradient
// depends on it (per-sample weights, max, min). Pairs are sorted by row, and pairs of one row by position.
class RowSort {
 public:
  RowSort() = default;
  RowSort(const RowSort&) = delete;
  RowSort& operator=(const RowSort&) = delete;
  ~RowSort() { delete memory; }

  // Set by the caller: the gradient of every row is written; distinct rows are counted.
  bool dense = false, counts_unique = false;

  Memory* memory = nullptr;
  bool wide = false;            // the integers below are uint64; else uint32
  const void* pairs = nullptr;  // [n] of (row, bag or position)
  int64_t n = 0;
  const void* bag_of = nullptr;  // [N], if the pairs hold positions
  const void* scale = nullptr;   // [bags] factor of a mean's gradients, in the compute type; null: 1
  void* partials = nullptr;      // partial sums of frequent rows
  bool any_frequent = false;     // whether any row may be frequent
  // Ranges of rows and of pairs per thread, [division.threads + 1], and the number of distinct rows before each range
  // if they are counted (`unique_before`); its last element is U.
  Division division{1, 0};
  int64_t *rows = nullptr, *begins = nullptr, *unique_before = nullptr;
};

}  // namespace seqkernels
