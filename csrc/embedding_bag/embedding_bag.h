// EmbeddingBag: rows of a table, reduced bag by bag. The structs that operators fill and kernels read; free of torch.
//
// Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, U rows that occur.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

enum class BagMode : int { kSum, kMean, kMax, kMin };  // as ops take it

// What a mean divides by: how many rows the bag has, or the sum of their weights.
enum class MeanBy : int { kCount, kWeight };

struct BagShape {
  DType dtype;        // of the table, the output and its gradient
  bool byte_rows;     // the table is uint8 [E, D + 8]: value = byte * scale + bias, both float32 behind the bytes
  bool wide_weights;  // weights are of the type that the table's is computed in; else of the table's
  bool wide_indices;  // int64; else int32
  bool wide_offsets;
  BagMode mode;
  MeanBy mean_by;

  bool extreme() const { return mode == BagMode::kMax || mode == BagMode::kMin; }
};

// One table, what is looked up in it and where that goes. In a collection the bags of a table are those of all its
// features, feature after feature, `batch` each: bag j is that of sample j % batch and feature j / batch.
struct BagTable {
  const void* table;  // [E, D], strides in elements (rows of bytes: row_stride in bytes, column_stride 1)
  int64_t E, D, row_stride, column_stride;
  const void* indices;  // [N], of every table of the call: offsets count from here
  int64_t N;
  const void* offsets;    // of this table's first bag; null: bag b begins at first + b * length
  int64_t offset_count;   // how many can be read: as many as bags, the last of which ends at N, or one more
  int64_t length, first;  // without offsets
  int64_t bags, batch;    // bags = features * batch
  const void* weights;    // [N] or null
  int64_t padding;        // its rows do not count; below 0: none
  // Bag j's row of the output, of its gradient and of arg begins at (j % batch) * stride + (j / batch) * D.
  void* out;
  int64_t out_stride;
  int32_t* arg;  // max and min: which position of its bag won each column, -1 if the bag is empty; may be null
  int64_t arg_stride;
};

// What kernels find wrong with indices and offsets, and where.
struct BagFault {
  enum What : int { kNone, kFirstOffset, kOffset, kIndex } what;
  int64_t at, value;  // position, and what stood there
};

// Threads that share a pass over so many bytes of rows.
int64_t threads_for(int64_t bytes);

struct BagForward {
  BagShape shape;
  const BagTable* tables;
  int64_t count;
};

// ---- backward: by the rows of one table; BagTable::out is the output's gradient and is read -------------------------

struct BagBackward {
  BagShape shape;
  BagTable table;
  bool by_frequency;  // a row's gradient is divided by how often it occurs
};

enum class RowOptimizer : int { kSGD, kAdagrad, kRowwiseAdagrad, kAdam };  // as ops take it

// A step on the rows that occur, from their summed gradients. States are of the table's compute type.
struct RowStep {
  RowOptimizer optimizer;
  double lr;  // Adagrad: after its decay
  double eps, beta1, beta2;
  double correction1, correction2;  // Adam: 1 - beta^step
  void* state1;  // Adagrad: [E, D] sums of squares; row-wise Adagrad: [E]; Adam: [E, D] first moments
  void* state2;  // Adam: [E, D] second moments
};

// Where the summed gradients of rows go: exactly one of the three.
struct RowTarget {
  void* dense;    // [E, D]; rows that do not occur are filled with zeros
  int64_t* rows;  // [U] ascending, with values [U, D]
  void* values;
  const RowStep* step;  // the table itself moves
};

// ---- CPU kernels
// ------------------------------------------------------------------------------------------------------

class RowSort;  // the pairs (row, position) of a backward call, ordered by row; rows_sort.h

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
