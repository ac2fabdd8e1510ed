// EmbeddingBag on CUDA: what operators launch. Free of torch; all pointers in the structs are of device memory, the
// structs and arrays of structs are of the host and are read before a launcher returns.
//
// A collection is a BagForward of several tables whose bags follow one another in one array of offsets; its launches do
// not grow in number with its tables. Where gradients are meant, BagTable::out is the output's gradient and is read.
//
// Launchers allocate nothing and wait for nothing (but where it is said), so they can be captured in a graph. `scratch`
// is device memory of at least the bytes that the function of that name answers, aligned to 256.
//
// Faults: what is out of range is skipped, never read, and reported in one word of device memory, which keeps the first
// fault of all that it has been given since it was last zero. Null: no report.
#pragma once

#include <cstdint>

#include "embedding_bag/embedding_bag.h"

namespace seqkernels {

using BagFaultWord = uint64_t;

// Waits for the stream. The word is zero again afterwards. BagFault::at of an offset counts from the first of the call.
BagFault read_bag_fault(BagFaultWord* fault, const BagForward& bags, void* stream);

// Every mode, type and form of bags, with arg where BagTable::arg is not null.
int64_t bag_forward_scratch_bytes(const BagForward& bags);
void launch_bag_forward(const BagForward& bags, BagFaultWord* fault, void* scratch, void* stream);

// The gradient of per-sample weights, [N], of their type; positions that belong to no bag get zeros.
int64_t bag_weights_scratch_bytes(const BagForward& bags);
void launch_bag_weights(const BagForward& bags, void* dweights, BagFaultWord* fault, void* scratch, void* stream);

// Gradients by row: first the rows are sorted, then summed into targets[bags.count], all of one kind. The scratch
// memory lives from the sort to the end of the reduction. A caller that checks reads the fault in between: a table that
// has moved by half a gradient does not come back.
int64_t bag_rows_scratch_bytes(const BagForward& bags);
void launch_bag_sort(const BagForward& bags, BagFaultWord* fault, void* scratch, void* stream);
// Only for RowTarget::rows and ::values: how many rows of each table occur, U. Waits for the stream.
void count_bag_rows(const BagForward& bags, int64_t* counts, void* scratch, void* stream);
void launch_bag_reduce(const BagForward& bags, bool by_frequency, const RowTarget* targets, void* scratch,
                       void* stream);

// Rows that occur and whose norm is above max_norm are scaled down to it: of one table, which is written, and after a
// sort in the mode of sums.
int64_t bag_renorm_scratch_bytes(const BagForward& bags);
void launch_bag_renorm(const BagForward& bags, double max_norm, double norm_type, void* scratch, void* stream);

void launch_bag_pack_bytes(const BagTable& table, DType dtype, uint8_t* packed, void* stream);  // [E, D + 8]

}  // namespace seqkernels
