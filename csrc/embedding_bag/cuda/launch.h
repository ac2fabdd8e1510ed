// Launchers of EmbeddingBag's CUDA kernels. Includes no torch header. Pointers within the structs are device pointers;
// the structs and arrays of structs are host memory and are read before a launcher returns.
//
// A collection is a BagForward of several tables whose bags are consecutive in one array of offsets; the number of
// launches does not grow with the number of tables. For gradients, BagTable::out is the gradient of the output.
//
// Launchers neither allocate nor synchronise, except where noted, so they can be captured in a CUDA graph. `scratch` is
// device memory of at least the size that the corresponding *_scratch_bytes function returns, aligned to 256 bytes.
//
// Faults: elements that are out of range are skipped. One word of device memory records the first fault since the word
// was last zero; a null pointer disables reporting.
#pragma once

#include <cstdint>

#include "embedding_bag/embedding_bag.h"

namespace seqkernels {

using BagFaultWord = uint64_t;

// Waits for the stream and resets the word to zero. For an offset, BagFault::position is counted from the first of the
// call.
BagFault read_bag_fault(BagFaultWord* fault, const BagForward& bags, void* stream);

// Supports every mode, dtype and form of bags; writes arg where BagTable::arg is not null.
int64_t bag_forward_scratch_bytes(const BagForward& bags);
void launch_bag_forward(const BagForward& bags, BagFaultWord* fault, void* scratch, void* stream);

// The gradient of the per-sample weights, [N], in their dtype; zero at positions outside all bags.
int64_t bag_weights_scratch_bytes(const BagForward& bags);
void launch_bag_weights(const BagForward& bags, void* dweights, BagFaultWord* fault, void* scratch, void* stream);

// Gradients by row: sorts the rows, then sums them into targets[bags.count], all of one kind. The scratch memory must
// stay unchanged from the sort to the end of the reduction. A caller that checks for faults must do so between the two
// steps, because the second one may update the table.
int64_t bag_rows_scratch_bytes(const BagForward& bags);
void launch_bag_sort(const BagForward& bags, BagFaultWord* fault, void* scratch, void* stream);
// Number of distinct rows of each table, U; needed only for RowTarget::rows and ::values. Waits for the stream.
void count_bag_rows(const BagForward& bags, int64_t* counts, void* scratch, void* stream);
void launch_bag_reduce(const BagForward& bags, bool by_frequency, const RowTarget* targets, void* scratch,
                       void* stream);

// Scales rows that occur and whose norm exceeds max_norm down to max_norm. For one table, which is written; requires a
// preceding sort in mode kSum.
int64_t bag_renorm_scratch_bytes(const BagForward& bags);
void launch_bag_renorm(const BagForward& bags, double max_norm, double norm_type, void* scratch, void* stream);

void launch_bag_pack_bytes(const BagTable& table, DType dtype, uint8_t* packed, void* stream);  // [E, D + 8]

}  // namespace seqkernels
