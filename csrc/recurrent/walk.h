// Builds the walk over the rows of a batch (see Walk in recurrent.h) from torch's tensors.
#pragma once

#include <vector>

#include "common/check.h"
#include "recurrent/recurrent.h"

namespace seqkernels {

// The arrays that a walk points to.
struct WalkArrays {
  std::vector<int64_t> batch_sizes, offsets, sequence, rows, x_offsets;

  // x is [N, D], packed. rows_needed: the CPU kernels read sequence, rows and x_offsets.
  void of_packed(const std::string& op, const Tensor& sizes, const Tensor& x, bool rows_needed, Walk& walk);
  // x is [T, B, D], with lengths [B] or without.
  void of_padded(const std::string& op, const std::optional<Tensor>& lengths, const Tensor& x, Walk& walk);
  // One step of B rows, `stride` elements apart.
  void of_step(int64_t B, int64_t stride, Walk& walk);
  void point(Walk& walk) const;

 private:
  void fill_offsets(int64_t T);
};

}  // namespace seqkernels
