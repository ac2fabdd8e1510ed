#include "recurrent/walk.h"

#include <algorithm>
#include <numeric>

namespace seqkernels {

void WalkArrays::of_packed(const std::string& op, const Tensor& sizes, const Tensor& x, bool rows_needed, Walk& walk) {
  check_cpu(op, "batch_sizes", sizes);
  check_dtype(op, "batch_sizes", sizes, ScalarType::Long);
  if (sizes.dim() != 1) fail(op, ": batch_sizes must have 1 dimension, got ", show(shape_of(sizes)));
  const Tensor contiguous = sizes.is_contiguous() ? sizes : torch::stable::contiguous(sizes);
  const int64_t* from = static_cast<const int64_t*>(contiguous.const_data_ptr());
  walk.T = sizes.size(0);
  walk.N = x.size(0);
  batch_sizes.assign(from, from + walk.T);
  walk.B = walk.T > 0 ? from[0] : 0;
  for (int64_t t = 0; t < walk.T; ++t) {
    if (from[t] < 1 || (t > 0 && from[t] > from[t - 1])) {
      fail(op, ": batch_sizes must be positive and non-increasing, got ", from[t], " at step ", t,
           t > 0 ? " after " + std::to_string(from[t - 1]) : std::string());
    }
    // Checked entry by entry, so that the sum cannot overflow.
    if (from[t] > walk.N) fail(op, ": batch_sizes must sum to the rows of x, ", walk.N, ", got ", from[t], " in one");
  }
  fill_offsets(walk.T);
  if (offsets.back() != walk.N) {
    fail(op, ": batch_sizes must sum to the rows of x, ", walk.N, ", got ", offsets.back());
  }
  if (!rows_needed) return;
  sequence.resize(walk.B);
  std::iota(sequence.begin(), sequence.end(), 0);
  rows.resize(walk.N);
  std::iota(rows.begin(), rows.end(), 0);
  x_offsets.resize(walk.N);
  for (int64_t n = 0; n < walk.N; ++n) x_offsets[n] = n * x.stride(0);
}

void WalkArrays::of_padded(const std::string& op, const std::optional<Tensor>& given, const Tensor& x, Walk& walk) {
  walk.T = x.size(0);
  walk.B = x.size(1);
  sequence.resize(walk.B);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (!given) {
    batch_sizes.assign(walk.T, walk.B);
  } else {
    const Tensor lengths = checked(op, "lengths", *given, ScalarType::Long, {walk.B}, x);
    const int64_t* length = static_cast<const int64_t*>(lengths.const_data_ptr());
    batch_sizes.assign(walk.T, 0);
    for (int64_t b = 0; b < walk.B; ++b) {
      if (length[b] < 0 || length[b] > walk.T) {
        fail(op, ": lengths must lie in [0, T] = [0, ", walk.T, "], got ", length[b], " at ", b);
      }
      if (length[b] > 0) ++batch_sizes[length[b] - 1];
    }
    for (int64_t t = walk.T - 2; t >= 0; --t) batch_sizes[t] += batch_sizes[t + 1];
    std::stable_sort(sequence.begin(), sequence.end(),
                     [length](int64_t a, int64_t b) { return length[a] > length[b]; });
  }
  fill_offsets(walk.T);
  walk.N = offsets.back();
  rows.resize(walk.N);
  x_offsets.resize(walk.N);
  const int64_t step = x.stride(0), across = x.stride(1);
  for (int64_t t = 0; t < walk.T; ++t) {
    for (int64_t j = 0; j < batch_sizes[t]; ++j) {
      rows[offsets[t] + j] = t * walk.B + sequence[j];
      x_offsets[offsets[t] + j] = t * step + sequence[j] * across;
    }
  }
}

void WalkArrays::of_step(int64_t B, int64_t stride, Walk& walk) {
  walk.T = 1;
  walk.B = walk.N = B;
  batch_sizes.assign(1, B);
  fill_offsets(1);
  sequence.resize(B);
  std::iota(sequence.begin(), sequence.end(), 0);
  rows = sequence;
  x_offsets.resize(B);
  for (int64_t b = 0; b < B; ++b) x_offsets[b] = b * stride;
}

void WalkArrays::fill_offsets(int64_t T) {
  offsets.resize(T + 1);
  offsets[0] = 0;
  for (int64_t t = 0; t < T; ++t) offsets[t + 1] = offsets[t] + batch_sizes[t];
}

void WalkArrays::point(Walk& walk) const {
  walk.batch_sizes = batch_sizes.data();
  walk.offsets = offsets.data();
  walk.sequence = sequence.data();
  walk.rows = rows.data();
  walk.x_offsets = x_offsets.data();
}

}  // namespace seqkernels
