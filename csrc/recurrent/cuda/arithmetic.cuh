// The arithmetic of cells/cell.h on CUDA: one hidden unit of one sequence per thread, the same formulas, saved values
// and roundings as on the CPU. And a cell as the kernels of a layer see it.
#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "recurrent/cells/list.h"

namespace seqkernels::cuda {

using namespace device;

SK_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SK_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

// Half types use the hardware's exponential, whose relative error is about 2^-21; the others the CUDA math library.
template <class S>
struct ScalarArithmetic {
  using Storage = S;
  using T = Compute<S>;
  using V = T;
  static constexpr bool kFast = sizeof(S) == 2, kSingle = sizeof(T) == 4;
  static constexpr float kLog2E = 1.4426950408889634f;

  static SK_DEVICE T constant(T x) { return x; }
  static SK_DEVICE T fma(T a, T b, T c) { return multiply_add(a, b, c); }
  static SK_DEVICE T rounded(T x) { return widen(narrow<S>(x)); }
  // No arithmetic where the share is zero, so that an infinite `a` does not enter.
  static SK_DEVICE T blend(T share, T a, T b) { return share == T(0) ? b : multiply_add(share, a - b, b); }

  static SK_DEVICE T exp(T x) {
    if constexpr (kFast) {
      return fast_exp2(kLog2E * x);
    } else if constexpr (kSingle) {
      return expf(x);
    } else {
      return ::exp(x);
    }
  }
  static SK_DEVICE T sigmoid(T x) {
    if constexpr (kFast) {
      return fast_reciprocal(1.0f + fast_exp2(-kLog2E * x));
    } else if constexpr (kSingle) {
      return 1.0f / (1.0f + expf(-x));
    } else {
      return 1.0 / (1.0 + ::exp(-x));
    }
  }
  static SK_DEVICE T tanh(T x) {
    if constexpr (kFast) {
      const float size = fabsf(x), e = fast_exp2(-2.0f * kLog2E * size);
      const float large = copysignf((1.0f - e) * fast_reciprocal(1.0f + e), x);  // loses digits where x is small
      return size < 0.05f ? fmaf(x * x * x, -0.33333333f, x) : large;
    } else if constexpr (kSingle) {
      return tanhf(x);
    } else {
      return ::tanh(x);
    }
  }
  static SK_DEVICE T log_sigmoid(T x) {
    if constexpr (kSingle) {
      return (x > 0.0f ? 0.0f : x) - log1pf(expf(x > 0.0f ? -x : x));
    } else {
      return (x > 0.0 ? 0.0 : x) - ::log1p(::exp(x > 0.0 ? -x : x));
    }
  }
};

// Cell C on storage type S. kOptions: kernels with code for options.
template <class C, class S, With kWith = With::kNoOptions>
struct CellOn : C {
  using Arithmetic = ScalarArithmetic<S>;
  using Storage = S;
  using T = typename Arithmetic::T;
  static constexpr bool kOptions = kWith == With::kOptions;
  using Options = std::conditional_t<kOptions, UnitOptions<Arithmetic>, NoUnitOptions<Arithmetic>>;
  static constexpr int kCellArray = C::kCells > 0 ? C::kCells : 1;  // elements of arrays of cells: at least one
};

// Calls f with the cell of a kind that has CUDA kernels.
template <class S, class F>
void with_cell_on(CellKind kind, F&& f) {
  with_cell(kind, [&f](auto cell) {
    using C = decltype(cell);
    if constexpr (C::kCuda) f(CellOn<C, S>{});
  });
}

}  // namespace seqkernels::cuda
