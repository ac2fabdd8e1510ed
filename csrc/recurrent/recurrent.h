// Arguments of the kernels of recurrent layers. Free of torch types.
//
// Dimensions: B sequences, T steps, N packed rows (the real tokens), D input, H
// hidden, P fed-back size (the projection size, or H), G gates. A layer has one
// or two directions.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "recurrent/cells/list.h"
#include "recurrent/packed_weights.h"

namespace seqkernels {

constexpr int kMaxDirections = 2;

// The order in which a layer processes its rows, the same for dense, padded and
// packed batches. Sequences are sorted by length, longest first: the first
// batch_sizes[t] of them have a step t, and packed row offsets[t] + j is step t
// of the j-th longest sequence.
struct Walk {
  int64_t T, B, N;
  const int64_t* batch_sizes;  // [T] non-increasing
  const int64_t* offsets;      // [T + 1]
  const int64_t* sequence;     // [B] index in the user's batch of the j-th longest sequence
  const int64_t* rows;         // [N] row of y, dy and dx that corresponds to packed row n
  const int64_t* x_offsets;    // [N] offset of the row's first element in x, which
                               // may be strided
};

// How the work is divided. A stream is one direction of one head; streams are
// independent. The sequences of a stream are divided into row_groups
// independent groups, and the hidden units of a group into unit_groups shares,
// which wait for each other once per step.
struct Plan {
  int64_t row_groups, unit_groups;
  int64_t threads;     // 1: the calling thread does all the work
  double nanoseconds;  // expected duration of forward on one thread
};

// One direction's weights, or their gradients; null where a layer has none. H_
// is the number of hidden units per head.
template <class Pointer>
struct WeightsOf {
  Pointer w_ih;                    // [G * H, D]
  Pointer w_hh;                    // [G * H, P], with heads [G * H, H_]
  Pointer b_ih, b_hh;              // [G * H]
  Pointer w_hr;                    // [P, H]
  Pointer peephole;                // [3 * H] of gates i, f, o; coupled: [2 * H] of i, o
  Pointer gain_ih, gain_hh;        // [G * H]
  Pointer gain_c, bias_c;          // [H]
  Pointer norm_weight, norm_bias;  // [G * H] of a joint normalisation
  Pointer inner_ih, inner_hh;      // [4 * H, H]
  Pointer inner_b_ih, inner_b_hh;  // [4 * H]
};
using Weights = WeightsOf<const void*>;
using WeightGradients = WeightsOf<void*>;

// Options beyond torch's layers. An option that is off is null or neutral.
struct LayerOptions {
  bool any;
  const uint8_t* reset;  // [N] packed rows: the states are zero before that step
  const uint8_t *zoneout_h, *zoneout_c,
      *candidate;                         // [rows, directions * H] 0 or 1, rows as in y
  const void* variational;                // [directions, B, P] factors of h in the recurrent products
  double cell_clip, gate_clip;            // infinity: off
  double zoneout_h_rate, zoneout_c_rate;  // used without a mask
  double candidate_scale;                 // 1 / (1 - p)
  double norm_eps;                        // added to the variance by layer normalisation
};

struct RecurrentArgs {
  DType dtype;
  Walk walk;
  Plan plan;
  int64_t directions, heads;
  int64_t D, H, P;
  int64_t saved_rows;   // rows of `saved` per direction: N or more
  int64_t saved_width;  // elements per row of `saved`
  const void* x;
  const void* h0;             // [directions, B, P] or null for zeros
  const void* c0[kMaxCells];  // [directions, B, H] each, or null for zeros
  Weights weights[kMaxDirections];
  const PreparedLayer* prepared;  // replaces the matrices of `weights` in inference with dtype float32, or null
  LayerOptions options;
};

struct ForwardArgs : RecurrentArgs {
  void* y;                 // [rows, directions * P]
  void* h_n;               // [directions, B, P]
  void* c_n[kMaxCells];    // [directions, B, H] each
  void* saved;             // [directions, saved_rows, saved_width], or null in inference
  void* cells[kMaxCells];  // [rows, directions * H] each: the cells at every
                           // step, or null
};

struct BackwardArgs : RecurrentArgs {
  const void *y, *saved, *cells[kMaxCells];
  const void* dy;                 // [rows, directions * P] or null for zeros
  const void* dcells[kMaxCells];  // like cells, or null
  const void* dh_n;               // [directions, B, P] or null
  const void* dc_n[kMaxCells];    // [directions, B, H] each, or null
  void* dx;                       // [rows, D] or null: not required
  void* dh0;                      // [directions, B, P] or null: not required
  void* dc0[kMaxCells];           // [directions, B, H] each, or null
  bool weights_wanted;
  WeightGradients dw[kMaxDirections];
};

// The source of the states before step t of the j-th sequence: the previous row
// in the direction of processing, the initial states, or zeros after a reset.
// `row` receives the previous packed row.
enum class Previous { kRow, kInitial, kReset };
inline Previous previous_row(const RecurrentArgs& args, int64_t direction, int64_t t, int64_t j, int64_t& row) {
  const Walk& walk = args.walk;
  const int64_t before = direction == 0 ? t - 1 : t + 1;
  const bool exists = before >= 0 && before < walk.T && j < walk.batch_sizes[before];
  if (exists) row = walk.offsets[before] + j;
  if (args.options.reset != nullptr) {  // in reverse, a segment ends where the next one starts
    if (direction == 0 ? args.options.reset[walk.offsets[t] + j] : exists && args.options.reset[row]) {
      return Previous::kReset;
    }
  }
  return exists ? Previous::kRow : Previous::kInitial;
}

// How a layer is divided among `threads` threads; depends on the shape alone.
Plan plan_recurrent(const RecurrentArgs& args, CellKind kind, int64_t threads);

struct RecurrentKernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};
namespace portable {
RecurrentKernels recurrent_kernels(CellKind kind, bool options);
}
namespace avx2 {
RecurrentKernels recurrent_kernels(CellKind kind, bool options);
}
namespace avx512 {
RecurrentKernels recurrent_kernels(CellKind kind, bool options);
}

}  // namespace seqkernels
