// The one list of cells. Everything that treats cells one by one follows from it: CellKind and CellShape, the op
// schemas, the kernels of each instruction set (CMake compiles one file per line), the CUDA kernels, and, through
// seqkernels._C, what Python has of them. A line is the name of a struct in one of the files below.
#pragma once

#include <type_traits>

#include "recurrent/cells/gru.h"
#include "recurrent/cells/lstm.h"
#include "recurrent/cells/mgu.h"
#include "recurrent/cells/nested.h"
#include "recurrent/cells/norm.h"
#include "recurrent/cells/rnn.h"
#include "recurrent/cells/slstm.h"

#define SEQKERNELS_CELLS(CELL) \
  CELL(LSTM)                   \
  CELL(LSTMCoupled)            \
  CELL(LSTMNorm)               \
  CELL(NestedLSTM)             \
  CELL(GRU)                    \
  CELL(GRUBefore)              \
  CELL(GRUNorm)                \
  CELL(GRUProjected)           \
  CELL(DreamerGRU)             \
  CELL(MGU)                    \
  CELL(MGUAfter)               \
  CELL(RNNTanh)                \
  CELL(RNNRelu)                \
  CELL(SLSTM)                  \
  CELL(SLSTMExp)

namespace seqkernels {

#define SEQKERNELS_KIND(Cell) k##Cell,
enum class CellKind { SEQKERNELS_CELLS(SEQKERNELS_KIND) };
#undef SEQKERNELS_KIND

#define SEQKERNELS_KIND(Cell) CellKind::k##Cell,
constexpr CellKind kCellKinds[] = {SEQKERNELS_CELLS(SEQKERNELS_KIND)};
#undef SEQKERNELS_KIND

// Calls f with a value of the cell's type: where a kind becomes a type.
template <class F>
constexpr auto with_cell(CellKind kind, F&& f) {
  switch (kind) {
#define SEQKERNELS_CASE(Cell) \
  case CellKind::k##Cell:     \
    return f(Cell{});
    SEQKERNELS_CELLS(SEQKERNELS_CASE)
#undef SEQKERNELS_CASE
  }
  return f(LSTM{});  // every value of CellKind has a case
}

// A cell's constants as values.
struct CellShape {
  const char *name, *gate_names, *state_names;
  int64_t gates, first, cells, states;  // states: h and cells
  int64_t saved;                        // vectors of H per row that forward keeps for backward
  int64_t saved_scalars;                // and single numbers: means and deviations of normalisations
  bool saves_output;                    // without options saved[0] is y
  int64_t peepholes, inner_gates, norm_groups;
  bool joint_norm, norm_c, separate, stages, passes_h;
  Projection projection;
  bool heads, cell_options, gate_clip, cuda, plain, step;
};
constexpr int length(const char* text) {
  int n = 0;
  while (text[n] != 0) ++n;
  return n;
}
constexpr CellShape shape_of(CellKind kind) {
  return with_cell(kind, [](auto cell) {
    using C = decltype(cell);
    static_assert(C::kGates <= 4 && C::kPeepholes <= 3, "StepGradient has room for 4 gates and 3 peepholes");
    static_assert(length(C::kStateNames) == 1 + C::kCells, "each state has a letter");
    static_assert(length(C::kGateNames) == C::kGates, "each gate has a letter");
    static_assert(C::kFirst <= C::kGates, "the first stage has gates of the cell");
    static_assert((C::kFactors > 0) == (C::kFirst < C::kGates || C::kInnerGates > 0), "a second stage has inputs");
    static_assert(C::kSavedFirst <= C::kSaved, "the first stage saves some of the values");
    static_assert(!C::kJointNorm || !(C::kSeparate || C::kNormC), "a joint normalisation has one gradient");
    static_assert(!C::kSavesOutput || C::kSaved == 1, "a cell that saves y saves nothing else");
    CellShape shape{};
    shape.name = C::kName;
    shape.gate_names = C::kGateNames;
    shape.state_names = C::kStateNames;
    shape.gates = C::kGates;
    shape.first = C::kFirst;
    shape.cells = C::kCells;
    shape.states = 1 + C::kCells;
    shape.saved = C::kSaved;
    shape.saved_scalars = (C::kJointNorm ? 1 : 2) * C::kNormGroups + 2 * C::kNormC;
    shape.saves_output = C::kSavesOutput;
    shape.peepholes = C::kPeepholes;
    shape.inner_gates = C::kInnerGates;
    shape.norm_groups = C::kNormGroups;
    shape.joint_norm = C::kJointNorm;
    shape.norm_c = C::kNormC;
    shape.separate = C::kSeparate;
    shape.stages = C::kFactors > 0;
    shape.passes_h = C::kPassesH;
    shape.projection = C::kProjection;
    shape.heads = C::kHeads;
    shape.cell_options = C::kCellOptions;
    shape.gate_clip = C::kGateClip;
    shape.cuda = C::kCuda;
    shape.plain = C::kHasPlain;
    shape.step = C::kStep;
    return shape;
  });
}
constexpr int64_t most_cells() {
  int64_t most = 0;
  for (const CellKind kind : kCellKinds) most = shape_of(kind).cells > most ? shape_of(kind).cells : most;
  return most;
}
constexpr int64_t kMaxCells = most_cells(), kMaxStates = 1 + kMaxCells;

// Elements per row and direction of what forward keeps for backward.
constexpr int64_t saved_width(const CellShape& shape, int64_t H, bool options) {
  return shape.saves_output && !options ? 0 : shape.saved * H + shape.saved_scalars;
}

}  // namespace seqkernels
