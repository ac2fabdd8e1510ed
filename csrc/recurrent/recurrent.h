// Recurrent layers: what a launcher passes to a kernel. Free of torch types.
//
// Dimensions: B sequences, T steps, N packed rows (the real tokens), D input, H hidden, P what is fed back (the
// projection size, or H), G gates. A layer has one or two directions.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

constexpr int kMaxDirections = 2;
constexpr int kMaxTeams = 256;  // directions x row groups

// The order in which a layer visits its rows, dense, padded or packed alike. Sequences are taken longest first, so
// those that have a step t are the first batch_sizes[t]; row n = offsets[t] + j is step t of the j-th longest.
struct Walk {
  int64_t T, B, N;
  const int64_t* batch_sizes;  // [T] non-increasing
  const int64_t* offsets;      // [T + 1]
  const int64_t* sequence;     // [B] place in the user's batch of the j-th longest sequence
  const int64_t* rows;         // [N] row of y, dy and dx that packed row n is
  const int64_t* x_offsets;    // [N] its first element in x, which may be strided
};

// How the work is cut: row_groups sets of sequences that never meet, each walked by unit_groups threads that own a
// share of the hidden units and meet at a barrier once a step. One direction after the other in the numbering.
struct Plan {
  int64_t row_groups, unit_groups;
  int64_t threads;  // 1: all of it in the calling thread
};

struct Weights {
  const void* w_ih;  // [G * H, D]
  const void* w_hh;  // [G * H, P]
  const void* b_ih;  // [G * H] or null
  const void* b_hh;  // [G * H] or null
  const void* w_hr;  // [P, H] or null
};

struct RecurrentArgs {
  DType dtype;
  Walk walk;
  Plan plan;
  int64_t directions, D, H, P;
  int64_t saved_rows;  // between one direction and the next in gates and cells: N or more
  const void* x;
  const void* h0;  // [directions, B, P] or null for zeros
  const void* c0;  // [directions, B, H] or null for zeros
  Weights weights[kMaxDirections];
};

struct ForwardArgs : RecurrentArgs {
  void* y;      // [rows, directions * P]
  void* h_n;    // [directions, B, P]
  void* c_n;    // [directions, B, H]; null in a cell without c
  void* saved;  // [directions, saved_rows, cell's kSaved * H], or null: nothing is saved
  void* cells;  // [directions, saved_rows, H] every c, or null
};

struct WeightGradients {  // like Weights
  void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

struct BackwardArgs : RecurrentArgs {
  const void *y, *saved, *cells;
  const void* dy;    // [rows, directions * P] or null for zeros
  const void* dh_n;  // [directions, B, P] or null
  const void* dc_n;  // [directions, B, H] or null
  void* dx;          // [rows, D] or null: not wanted
  void* dh0;         // [directions, B, P] or null: not wanted
  void* dc0;         // [directions, B, H] or null
  bool weights_wanted;
  WeightGradients dw[kMaxDirections];
};

enum class CellKind { kLSTM, kGRU, kRNNTanh, kRNNRelu };

// What the op files know of a cell; the kernels have it from csrc/recurrent/cells.h.
struct CellShape {
  int64_t gates, saved;
  bool has_c;
};
constexpr CellShape shape_of(CellKind cell) {
  switch (cell) {
    case CellKind::kLSTM:
      return {4, 4, true};
    case CellKind::kGRU:
      return {3, 4, false};
    default:
      return {1, 0, false};
  }
}

// The cut of a layer for so many threads: a function of the shape alone.
Plan plan_recurrent(const RecurrentArgs& args, int64_t gates, int64_t threads);

struct RecurrentKernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};
namespace portable {
RecurrentKernels recurrent_kernels(CellKind cell);
}
namespace avx2 {
RecurrentKernels recurrent_kernels(CellKind cell);
}
namespace avx512 {
RecurrentKernels recurrent_kernels(CellKind cell);
}

}  // namespace seqkernels
