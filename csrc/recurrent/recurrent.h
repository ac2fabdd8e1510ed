// Recurrent layers: what a launcher passes to a kernel. Free of torch types.
//
// Dimensions: B sequences, T steps, N packed rows (the real tokens), D input, H hidden, P what is fed back (the
// projection size, or H), G gates. A layer has one or two directions.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

constexpr int kMaxDirections = 2;
constexpr int kMaxStates = 3;

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
// share of the hidden units and meet at a barrier once a step. One strand (a direction of a head) after the other in
// the numbering: heads never meet either.
struct Plan {
  int64_t row_groups, unit_groups;
  int64_t threads;  // 1: all of it in the calling thread
};

// One direction's weights, or their gradients; null where a layer has none. H_ here is the hidden units of one head.
template <class Pointer>
struct WeightsOf {
  Pointer w_ih;                    // [G * H, D]
  Pointer w_hh;                    // [G * H, P], with heads [G * H, H_]
  Pointer b_ih, b_hh;              // [G * H]
  Pointer w_hr;                    // [P, H]
  Pointer peephole;                // [3 * H] of gates i, f, o; coupled: [2 * H] of i, o
  Pointer gain_ih, gain_hh;        // [G * H]
  Pointer gain_c, bias_c;          // [H]
  Pointer inner_ih, inner_hh;      // [4 * H, H]
  Pointer inner_b_ih, inner_b_hh;  // [4 * H]
};
using Weights = WeightsOf<const void*>;
using WeightGradients = WeightsOf<void*>;

// What a plain layer does without: null and neutral where it is off.
struct Options {
  bool any;
  const uint8_t* reset;                              // [N] in the order of the walk: before that step states are zero
  const uint8_t *zoneout_h, *zoneout_c, *candidate;  // [rows, directions * H] 0 or 1, rows as in y
  const void* variational;                           // [directions, B, P] factors of h in the recurrent products
  double cell_clip, gate_clip;                       // infinity: none
  double zoneout_h_rate, zoneout_c_rate;             // where there is no mask
  double candidate_scale;                            // 1 / (1 - p)
};

struct RecurrentArgs {
  DType dtype;
  Walk walk;
  Plan plan;
  int64_t directions, heads;
  int64_t D, H, P;
  int64_t saved_rows;   // between one direction and the next in saved: N or more
  int64_t saved_width;  // of a row of saved
  const void* x;
  const void* h0;  // [directions, B, P] or null for zeros
  const void* c0;  // [directions, B, H] or null for zeros
  const void* s0;  // like c0: the inner state of a nested cell
  Weights weights[kMaxDirections];
  Options options;
};

struct ForwardArgs : RecurrentArgs {
  void* y;      // [rows, directions * P]
  void* h_n;    // [directions, B, P]
  void* c_n;    // [directions, B, H]; null in a cell without c
  void* s_n;    // like c_n
  void* saved;  // [directions, saved_rows, saved_width], or null: nothing is saved
  void* cells;  // [rows, directions * H] every c, or null
  void* inner;  // like cells: every s
};

struct BackwardArgs : RecurrentArgs {
  const void *y, *saved, *cells, *inner;
  const void* dy;               // [rows, directions * P] or null for zeros
  const void *dcells, *dinner;  // like cells, or null
  const void* dh_n;             // [directions, B, P] or null
  const void *dc_n, *ds_n;      // [directions, B, H] or null
  void* dx;                     // [rows, D] or null: not wanted
  void* dh0;                    // [directions, B, P] or null: not wanted
  void *dc0, *ds0;              // [directions, B, H] or null
  bool weights_wanted;
  WeightGradients dw[kMaxDirections];
};

// What step t of the j-th sequence starts from: a row before it in the direction of the walk, the initial states, or
// zeros after a reset. `row`: the packed row before it.
enum class Previous { kRow, kInitial, kReset };
inline Previous previous_row(const RecurrentArgs& args, int64_t direction, int64_t t, int64_t j, int64_t& row) {
  const Walk& walk = args.walk;
  const int64_t before = direction == 0 ? t - 1 : t + 1;
  const bool exists = before >= 0 && before < walk.T && j < walk.batch_sizes[before];
  if (exists) row = walk.offsets[before] + j;
  if (args.options.reset != nullptr) {  // walking back, a segment ends where the next one starts
    if (direction == 0 ? args.options.reset[walk.offsets[t] + j] : exists && args.options.reset[row]) {
      return Previous::kReset;
    }
  }
  return exists ? Previous::kRow : Previous::kInitial;
}

enum class CellKind {
  kLSTM,
  kLSTMCoupled,
  kLSTMNorm,
  kLSTMNested,
  kGRU,
  kGRUBefore,
  kGRUNorm,
  kGRUProjected,
  kMGU,
  kMGUBefore,
  kRNNTanh,
  kRNNRelu,
};

// What the op files know of a cell; the kernels have it from csrc/recurrent/cells.h.
struct CellShape {
  const char* name;
  int64_t gates, states;
  int64_t saved;          // vectors of H per row that forward keeps for backward
  int64_t saved_scalars;  // and numbers
  enum Projection { kNever, kMaybe, kAlways } projection;
  bool heads, peephole;  // may have
  bool cell_options;     // cell_clip and zoneout_c
};
constexpr CellShape shape_of(CellKind kind) {
  switch (kind) {
    case CellKind::kLSTM:
      return {"lstm", 4, 2, 4, 0, CellShape::kMaybe, true, true, true};
    case CellKind::kLSTMCoupled:
      return {"lstm_coupled", 3, 2, 3, 0, CellShape::kMaybe, true, true, true};
    case CellKind::kLSTMNorm:
      return {"lstm_norm", 4, 2, 12, 4, CellShape::kNever, false, false, true};
    case CellKind::kLSTMNested:
      return {"lstm_nested", 4, 3, 8, 0, CellShape::kNever, false, false, false};
    case CellKind::kGRU:
      return {"gru", 3, 1, 4, 0, CellShape::kNever, true, false, false};
    case CellKind::kGRUBefore:
      return {"gru_before", 3, 1, 3, 0, CellShape::kNever, true, false, false};
    case CellKind::kGRUNorm:
      return {"gru_norm", 3, 1, 9, 4, CellShape::kNever, false, false, false};
    case CellKind::kGRUProjected:
      return {"gru_projected", 3, 2, 4, 0, CellShape::kAlways, false, false, false};
    case CellKind::kMGU:
      return {"mgu_after", 2, 1, 3, 0, CellShape::kNever, true, false, false};
    case CellKind::kMGUBefore:
      return {"mgu", 2, 1, 2, 0, CellShape::kNever, true, false, false};
    case CellKind::kRNNTanh:
      return {"rnn_tanh", 1, 1, 0, 0, CellShape::kNever, true, false, false};
    case CellKind::kRNNRelu:
      return {"rnn_relu", 1, 1, 0, 0, CellShape::kNever, true, false, false};
  }
  return {};
}
constexpr CellKind kCellKinds[] = {CellKind::kLSTM,       CellKind::kLSTMCoupled,  CellKind::kLSTMNorm,
                                   CellKind::kLSTMNested, CellKind::kGRU,          CellKind::kGRUBefore,
                                   CellKind::kGRUNorm,    CellKind::kGRUProjected, CellKind::kMGU,
                                   CellKind::kMGUBefore,  CellKind::kRNNTanh,      CellKind::kRNNRelu};
// A plain RNN's y tells all; options hide the activation, so it is kept.
constexpr int64_t saved_width(CellKind kind, int64_t H, bool options) {
  const CellShape shape = shape_of(kind);
  return (shape.saved + (shape.gates == 1 && options)) * H + shape.saved_scalars;
}

// The cut of a layer for so many threads: a function of the shape alone.
Plan plan_recurrent(const RecurrentArgs& args, int64_t gates, int64_t threads);

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
