// What the backward of EmbeddingBag works from: the rows that occur, in order, with where each occurs.
#pragma once

#include "common/memory.h"
#include "embedding_bag/embedding_bag.h"

namespace seqkernels {

// Filled by BagKernels::sort. A row, and the bag or, where a weight or the winner of a column hangs on it, the position
// in which it occurs; equal rows in the order of positions.
class RowSort {
 public:
  RowSort() = default;
  RowSort(const RowSort&) = delete;
  RowSort& operator=(const RowSort&) = delete;
  ~RowSort() { delete memory; }

  // Set by who asks: the gradient of every row will be written; the rows that occur are to be numbered.
  bool dense = false, numbered = false;

  Memory* memory = nullptr;
  bool wide = false;            // all integers below are uint64; else uint32
  const void* pairs = nullptr;  // [n] of (row, bag or position)
  int64_t n = 0;
  const void* bag_of = nullptr;  // [N], if pairs hold positions
  const void* scale = nullptr;   // [bags] what a mean multiplies gradients by, in the compute type; null: 1
  void* partials = nullptr;      // of rows that occur often
  bool any_often = false;        // else none does
  // What each thread takes, rows and their pairs: [threads + 1], with the rows that occur before, where they are
  // numbered; the last of these is U.
  int64_t threads = 1;
  int64_t *rows = nullptr, *begins = nullptr, *unique_before = nullptr;
};

}  // namespace seqkernels
