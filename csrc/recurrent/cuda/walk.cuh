// The order in which a layer processes its rows on a GPU: links between rows, computed on the device from lengths,
// batch_sizes and resets, so that the host does not need the lengths. The later kernels treat dense, padded and packed
// rows, both directions and resets alike.
//
// Rows are those of y: t * B + b of a padded batch, or the packed row. The links of a direction are followed by B more,
// one for the initial states of each sequence.
#pragma once

#include "common/device.cuh"

namespace seqkernels::cuda {

using namespace device;

struct Link {  // four int64
  // Row before this one; rows + b: the initial states of sequence b. With kResetFlag if the states before this row are
  // zero because of a reset. kNone: the row belongs to no sequence. For initial states: the number of steps.
  int64_t prev;
  // Row after this one, with kResetFlag if that row follows a reset; kNone: none.
  int64_t next;
  int64_t sequence;
  int64_t last;  // for initial states: the last row of the sequence; kNone: none
};
constexpr int64_t kNone = -1, kResetFlag = int64_t{1} << 62;
SK_DEVICE bool is_reset(int64_t link) { return link >= kResetFlag; }

}  // namespace seqkernels::cuda
