// The arithmetic of cells/cell.h on CPU vectors, and a cell as the passes over
// a layer see it.
#pragma once

#include <type_traits>

#include "common/simd.h"
#include "recurrent/cells/list.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class S>
struct VectorArithmetic {
  using Storage = S;
  using T = Compute<S>;
  using V = Native<T>;
  static SEQKERNELS_INLINE V constant(T x) { return broadcast(x); }
  static SEQKERNELS_INLINE V fma(V a, V b, V c) { return SEQKERNELS_ISA::fma(a, b, c); }
  static SEQKERNELS_INLINE V sigmoid(V x) { return SEQKERNELS_ISA::sigmoid<T>(x); }
  static SEQKERNELS_INLINE V tanh(V x) { return SEQKERNELS_ISA::tanh<T>(x); }
  static SEQKERNELS_INLINE V exp(V x) { return SEQKERNELS_ISA::exp<T>(x); }
  static SEQKERNELS_INLINE V log_sigmoid(V x) { return SEQKERNELS_ISA::log_sigmoid<T>(x); }
  static SEQKERNELS_INLINE V rounded(V x) { return SEQKERNELS_ISA::rounded<S>(x); }
  static SEQKERNELS_INLINE V blend(V share, V a, V b) { return fma(share, a - b, b); }
};

// Gates [kGate, kGate + kGates) of a cell, whose product is computed panel by
// panel; kUnits vectors of units share a panel, so that up to 4 vectors come
// from one register tile.
template <int kGate_, int kGates_>
struct GateRange {
  static constexpr int kGate = kGate_, kGates = kGates_, kUnits = 4 / (kGates_ > 0 ? kGates_ : 4);
};

// Cell C on storage type S.
template <class C, class S, With kWith>
struct CellOn : C {
  using Arithmetic = VectorArithmetic<S>;
  using Storage = S;
  using T = typename Arithmetic::T;
  using V = typename Arithmetic::V;
  static constexpr bool kOptions = kWith == With::kOptions;
  using Options = std::conditional_t<kOptions, UnitOptions<Arithmetic>, NoUnitOptions<Arithmetic>>;
  // Elements of arrays that hold the cells or the saved values: at least one.
  static constexpr int kCellArray = C::kCells > 0 ? C::kCells : 1;
  static constexpr bool kStored = !C::kSavesOutput || kOptions;  // saved values lie in memory
  static constexpr bool kDirect = C::kPassesH || kOptions;       // a part of dh bypasses the product
  static constexpr bool kProjects = C::kProjection != Projection::kNever;
  static constexpr bool kTwoStages = C::kFactors > 0, kInner = C::kInnerGates > 0, kNorm = C::kNormGroups > 0;
  static constexpr int kNormProducts = C::kJointNorm ? 1 : 2;  // that are normalised: the sum, or each of the two
  using First = GateRange<0, C::kFirst>;
  using Second = GateRange<(kInner ? 0 : C::kFirst), (kInner ? C::kInnerGates : C::kGates - C::kFirst)>;
};

}  // namespace seqkernels::SEQKERNELS_ISA
