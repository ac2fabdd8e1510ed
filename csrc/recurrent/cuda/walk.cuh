// The order in which a layer visits its rows on a GPU: links between rows, made on the device from lengths, batch_sizes
// and resets, so the host need not know how long a sequence is. Dense, padded and packed rows, both directions and
// resets look alike to all later kernels.
//
// Rows are those of y: t * B + b of a padded batch, or the packed row. Behind the rows of a direction stand B more
// links, one for the initial states of each sequence.
#pragma once

#include "common/device.cuh"

namespace seqkernels::cuda {

using namespace device;

struct Link {  // four int64
  // The row before this one, rows + b standing for the initial states of sequence b; plus kResetFlag where this row
  // starts anew, from zeros, after a reset. kNone: no sequence has this row. Of initial states: how many steps there
  // are.
  int64_t prev;
  // The row after this one, plus kResetFlag where that one starts anew; kNone: none.
  int64_t next;
  int64_t sequence;
  int64_t last;  // of initial states: the row where the walk ends; kNone: none
};
constexpr int64_t kNone = -1, kResetFlag = int64_t{1} << 62;
SK_DEVICE bool is_reset(int64_t link) { return link >= kResetFlag; }

SK_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
SK_DEVICE double fused(double a, double b, double c) { return ::fma(a, b, c); }

}  // namespace seqkernels::cuda
