// EmbeddingBag: reduces rows of a table bag by bag. The argument structs that operators fill and kernels read; includes
// no torch header.
//
// Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, U distinct rows that occur.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

enum class BagMode : int { kSum, kMean, kMax, kMin };  // numbered as in the op schemas

// Divisor of a mean: the number of rows of the bag, or the sum of their weights.
enum class MeanBy : int { kCount, kWeight };

struct BagShape {
  DType dtype;        // of the table, the output and the output's gradient
  bool byte_rows;     // the table is uint8 [E, D + 8]: value = byte * scale + bias, two float32 after the D bytes
  bool wide_weights;  // weights have the table's compute type; else the table's dtype
  bool wide_indices;  // int64; else int32
  bool wide_offsets;
  BagMode mode;
  MeanBy mean_by;

  bool extreme() const { return mode == BagMode::kMax || mode == BagMode::kMin; }
};

// One table with its lookups and outputs. In a collection, a table has the bags of all its features, feature after
// feature, `batch` bags each: bag j belongs to sample j % batch and feature j / batch.
struct BagTable {
  const void* table;  // [E, D], strides in elements (rows of bytes: row_stride in bytes, column_stride 1)
  int64_t E, D, row_stride, column_stride;
  const void* indices;  // [N], of all tables of the call; offsets are positions in it
  int64_t N;
  const void* offsets;    // offset of this table's first bag; null: bag b begins at first + b * length
  int64_t offset_count;   // readable offsets: `bags` (the last bag ends at N) or bags + 1
  int64_t length, first;  // used without offsets
  int64_t bags, batch;    // bags = features * batch
  const void* weights;    // [N] or null
  int64_t padding;        // index to ignore; negative: none
  // Offset of bag j's row in the output, in its gradient and in arg: (j % batch) * stride + (j / batch) * D.
  void* out;
  int64_t out_stride;
  int32_t* arg;  // max and min: position in the bag of each column's value, -1 if the bag is empty; may be null
  int64_t arg_stride;
};

// An invalid index or offset found by a kernel, and its position.
struct BagFault {
  enum Kind : int { kNone, kFirstOffset, kOffset, kIndex } kind;
  int64_t position, value;  // of the invalid element
};

// How a pass is divided among threads.
struct Division {
  int64_t threads;
  double nanoseconds;  // expected duration on one thread
};
Division divide(int64_t bytes);  // a pass that reads this many bytes of rows

struct BagForward {
  BagShape shape;
  const BagTable* tables;
  int64_t count;
};

// Backward by rows of one table. BagTable::out is the gradient of the output and is read.

struct BagBackward {
  BagShape shape;
  BagTable table;
  bool by_frequency;  // divide a row's gradient by its number of occurrences
};

enum class RowOptimizer : int { kSGD, kAdagrad, kRowwiseAdagrad, kAdam };  // numbered as in the op schemas

// One optimizer step on the rows that occur, from their summed gradients. States have the table's compute type.
struct RowStep {
  RowOptimizer optimizer;
  double lr;  // Adagrad: with its decay applied
  double eps, beta1, beta2;
  double correction1, correction2;  // Adam: 1 - beta^step
  void* state1;  // Adagrad: [E, D] sums of squares; row-wise Adagrad: [E]; Adam: [E, D] first moments
  void* state2;  // Adam: [E, D] second moments
};

// Destination of the summed gradients of rows: exactly one of the three.
struct RowTarget {
  void* dense;    // [E, D]; rows that do not occur are set to zero
  int64_t* rows;  // [U] ascending, with values [U, D]
  void* values;
  const RowStep* step;  // updates the table in place
};

// CPU kernels.

class RowSort;  // the (row, position) pairs of a backward pass, sorted by row; row_sort.h

struct BagKernels {
  BagFault (*forward)(const BagForward&);
  BagFault (*weights)(const BagBackward&, void* dweights);  // [N]
  BagFault (*sort)(const BagBackward&, RowSort&);
  void (*reduce)(const BagBackward&, const RowSort&, const RowTarget&);
  BagFault (*renorm)(const BagBackward&, double max_norm, double norm_type);
  void (*pack_bytes)(const BagTable&, DType dtype, uint8_t* packed);  // [E, D + 8]
};

namespace portable {
BagKernels bag_kernels();
}
namespace avx2 {
BagKernels bag_kernels();
}
namespace avx512 {
BagKernels bag_kernels();
}

}  // namespace seqkernels
