// Kernels that compute the links of walk.cuh. Included by one .cu file: kernels that are not templates have one
// definition.
#pragma once

#include "recurrent/cuda/walk.cuh"

namespace seqkernels::cuda {

constexpr int kWalkThreads = 128;

struct PaddedLinksArgs {
  Link* links;             // [directions, T * B + B]
  const int64_t* lengths;  // [B] or null: all T. Clamped to [0, T]
  const uint8_t* reset;    // [T * B] or null
  int64_t T, B;
};

static SK_KERNEL(kWalkThreads) padded_links_kernel(const SK_GRID_CONSTANT PaddedLinksArgs args) {
  const int64_t T = args.T, B = args.B, rows = T * B, direction = block_index_y();
  const Global<Link> links = global<Link>(args.links, grid_blocks_y() * (rows + B)) + direction * (rows + B);
  const Global<const int64_t> lengths = global<const int64_t>(args.lengths, args.lengths == nullptr ? 0 : B);
  const Global<const uint8_t> reset = global<const uint8_t>(args.reset, args.reset == nullptr ? 0 : rows);
  const auto resets = [&](int64_t row) {
    const uint8_t value = reset ? load<Cache::kReadOnly>(reset, row) : 0;
    return value != 0;
  };
  for (int64_t row = grid_thread_index(); row < rows + B; row += grid_threads()) {
    const int64_t t = row / B, b = row % B;
    int64_t length = lengths ? load<Cache::kReadOnly>(lengths, b) : T;
    length = length < 0 ? 0 : length > T ? T : length;
    Link link{kNone, kNone, b, kNone};
    if (t == T) {
      link.prev = length;
      if (length > 0) {
        link.next = direction == 0 ? b | (resets(b) ? kResetFlag : 0) : (length - 1) * B + b;
        link.last = direction == 0 ? (length - 1) * B + b : b;
      }
    } else if (t < length) {
      if (direction == 0) {
        link.prev = (t > 0 ? row - B : rows + b) | (resets(row) ? kResetFlag : 0);
        if (t + 1 < length) link.next = (row + B) | (resets(row + B) ? kResetFlag : 0);
      } else {  // in reverse, a segment ends where the next one starts
        link.prev = t + 1 == length ? rows + b : (row + B) | (resets(row + B) ? kResetFlag : 0);
        if (t > 0) link.next = (row - B) | (resets(row) ? kResetFlag : 0);
      }
    }
    links[row] = link;
  }
}

// Links of packed rows, for several steps per launch. batch_sizes are on the host and are passed as kernel arguments,
// which a CUDA graph records and which need no synchronisation.
constexpr int kWalkSteps = 448;
struct PackedLinksArgs {
  Link* links;           // [directions, N + B]
  const uint8_t* reset;  // [N] or null
  int64_t T, B, N;
  int64_t first;  // first of `count` steps
  int count;
  int64_t offsets[kWalkSteps + 3];  // row offsets of steps first - 1 to first + count + 1, as far as they exist
};

static SK_KERNEL(kWalkThreads) packed_links_kernel(const SK_GRID_CONSTANT PackedLinksArgs args) {
  const int64_t step = block_index_y(), t = args.first + step, direction = block_index_z(), N = args.N;
  const int64_t before = args.offsets[step], start = args.offsets[step + 1], after = args.offsets[step + 2];
  const int64_t next_size = t + 1 < args.T ? args.offsets[step + 3] - after : 0;
  const int64_t every = N + args.B;
  const Global<Link> links = global<Link>(args.links, grid_blocks_z() * every) + direction * every;
  const Global<int64_t> words = global<int64_t>(args.links, grid_blocks_z() * every * 4) + direction * every * 4;
  const Global<const uint8_t> reset = global<const uint8_t>(args.reset, args.reset == nullptr ? 0 : N);
  const auto resets = [&](int64_t row) {
    const uint8_t value = reset ? load<Cache::kReadOnly>(reset, row) : 0;
    return value != 0;
  };
  for (int64_t j = grid_thread_index(); j < after - start; j += grid_threads()) {
    const int64_t row = start + j;
    const bool follows = j < next_size;
    Link link{N + j, kNone, j, kNone};
    if (direction == 0) {
      link.prev = (t > 0 ? before + j : N + j) | (resets(row) ? kResetFlag : 0);
      if (follows) link.next = (after + j) | (resets(after + j) ? kResetFlag : 0);
    } else {
      if (follows) link.prev = (after + j) | (resets(after + j) ? kResetFlag : 0);
      if (t > 0) link.next = (before + j) | (resets(row) ? kResetFlag : 0);
    }
    links[row] = link;
    // The link of the initial states, which the threads of the first and of the last step share.
    const Global<int64_t> initial = words + (N + j) * 4;
    if (t == 0) initial[direction == 0 ? 1 : 3] = j | (direction == 0 && resets(j) ? kResetFlag : 0);
    if (!follows) {
      initial[direction == 0 ? 3 : 1] = row;
      initial[0] = t + 1;
      initial[2] = j;
    }
  }
}

}  // namespace seqkernels::cuda
