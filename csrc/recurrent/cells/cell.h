// What every cell is built on. A cell is one struct in one file: constants that describe it, then its formulas, written
// once over an arithmetic A. The kernels around it (time loop, products, memory) are the same for all cells; CPU
// vectors (cpu/arithmetic.h) and CUDA scalars (cuda/arithmetic.cuh) provide A.
//
//   A::Storage, A::T, A::V   element type in memory, scalar compute type, value: a vector of hidden units, or one unit
//   A::constant(T)           a V whose lanes all hold that number
//   A::fma(a, b, c)          a * b + c, rounded once where the hardware can
//   A::sigmoid, A::tanh, A::exp, A::log_sigmoid
//   A::rounded(V)            the value that remains once it is stored as A::Storage
//   A::blend(share, a, b)    b + share * (a - b)
//   + - * /, comparisons and ?: act lane by lane
//
// States are rounded to storage, so a sequence that is continued from stored states gets the same bits. Formulas take
// the options of the unit they compute: UnitOptions where any option of the layer is on, else NoUnitOptions, under
// which every option compiles to nothing.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SK_CELL __device__ __forceinline__
#else
#define SK_CELL inline __attribute__((always_inline))
#endif

namespace seqkernels {

enum class With { kNoOptions, kOptions };
enum class Projection { kNever, kMaybe, kAlways };

// The constants of a cell, with the values that most cells have.
struct CellDefaults {
  // Gates [0, kFirst) form the first recurrent product. A cell of two stages has a second one, of the remaining gates
  // with kFactors inputs that the first stage makes; kInnerGates > 0: of separate inner weights instead.
  static constexpr int kFactors = 0, kCarried = 0, kSavedFirst = 0, kInnerGates = 0;
  static constexpr int kCells = 0;                 // states beside h: the cells
  static constexpr const char* kStateNames = "h";  // a letter for each state
  static constexpr int kPeepholes = 0;             // vectors of H in weight_ph
  static constexpr bool kSavesOutput = false;      // without options, saved[0] is y, and nothing is stored for it
  static constexpr bool kSeparate = false;  // the gradients of the two products differ: backward fills d.x and d.h
  static constexpr bool kPassesH = false;   // h also reaches the next h without a product: backward fills d.direct
  static constexpr bool kReadsH = false;    // backward reads the h that the step started from
  static constexpr Projection kProjection = Projection::kNever;
  static constexpr bool kHeads = false;        // weight_hh may be block-diagonal
  static constexpr bool kCellOptions = false;  // may have cell_clip and zoneout_c
  static constexpr bool kGateClip = true;      // may have gate_clip
  // Layer normalisation: kNormGroups sets of gates that are normalised together. kNormC: also the cell on its way to h.
  // kJointNorm: the sum of both products is normalised, over all heads, instead of each product. kReadsGate: the gate
  // whose product, normalised, scaled and shifted, backward reads after the saved values.
  static constexpr int kNormGroups = 0, kReadsGate = 0;
  static constexpr bool kNormC = false, kJointNorm = false;
  static constexpr bool kCuda = true;      // CUDA kernels exist
  static constexpr bool kHasPlain = true;  // kernels without options are compiled besides those with options
  static constexpr bool kStep = false;     // torch.ops.seqkernels.<name>_cell* exist: one step without options
};

template <class A>
struct NoUnitOptions {
  using Arithmetic = A;
  static constexpr bool kAny = false;
};
// The options of one unit (one vector of units) at one time step; neutral where an option is off.
template <class A>
struct UnitOptions {
  using Arithmetic = A;
  using V = typename A::V;
  static constexpr bool kAny = true;
  V zoneout_h, zoneout_c;  // share of the old value in the new one
  V candidate;             // factor of the candidate: recurrent dropout
  V recurrent;             // factor of h in the recurrent products: variational dropout
  V cell_clip, gate_clip;
  V sigmoid_low, sigmoid_high, tanh_high;  // activations at -gate_clip and gate_clip
  V peephole[3];
};

// What backward returns for one unit at one time step, beside the gradients of the cells.
template <class V>
struct StepGradient {
  V x[4], h[4];   // of the pre-activations, as the products with x and with h have them
  V direct;       // of the h before, except through a product
  V peephole[3];  // of the peephole weights
};

// The value of an activation and its derivative with respect to the pre-activation.
template <class V>
struct ValueAndSlope {
  V value, slope;
};

// Activations; the slope is a function of the value.
struct Sigmoid {
  template <class A, class V = typename A::V>
  static SK_CELL V value(V x) {
    return A::sigmoid(x);
  }
  template <class A, class V = typename A::V>
  static SK_CELL V slope(V y) {
    return y * (typename A::T(1) - y);
  }
  template <class O, class V>
  static SK_CELL V limit(const O& o, V side) {
    return side > 0 ? o.sigmoid_high : o.sigmoid_low;
  }
};
struct Tanh {
  template <class A, class V = typename A::V>
  static SK_CELL V value(V x) {
    return A::tanh(x);
  }
  template <class A, class V = typename A::V>
  static SK_CELL V slope(V y) {
    return A::fma(-y, y, A::constant(1));
  }
  template <class O, class V>
  static SK_CELL V limit(const O& o, V side) {
    return side > 0 ? o.tanh_high : -o.tanh_high;
  }
};
struct Relu {
  template <class A, class V = typename A::V>
  static SK_CELL V value(V x) {
    return x < typename A::T(0) ? V{} : x;  // NaN stays NaN
  }
  template <class A, class V = typename A::V>
  static SK_CELL V slope(V y) {
    return y > typename A::T(0) ? A::constant(1) : V{};
  }
};

template <class V>
SK_CELL V clamp(V x, V limit) {  // NaN stays NaN
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// gate_clip. The saved value of a clipped gate, which passes no gradient, is 2 or -2: the side of the limit.
template <class Activation, class O, class V>
SK_CELL V activate(const O& o, V x, V& saved) {
  using A = typename O::Arithmetic;
  if constexpr (O::kAny) {
    const V value = Activation::template value<A>(clamp(x, o.gate_clip));
    saved = x >= o.gate_clip ? A::constant(2) : x <= -o.gate_clip ? A::constant(-2) : value;
    return value;
  } else {
    return saved = Activation::template value<A>(x);
  }
}
// The activation's value and slope, from what `activate` saved.
template <class Activation, class O, class V>
SK_CELL ValueAndSlope<V> restore(const O& o, V saved) {
  using A = typename O::Arithmetic;
  if constexpr (O::kAny) {
    const auto at_limit = saved * saved > typename A::T(2);
    return {at_limit ? Activation::limit(o, saved) : saved, at_limit ? V{} : Activation::template slope<A>(saved)};
  } else {
    return {saved, Activation::template slope<A>(saved)};
  }
}

// Recurrent dropout of a candidate, and of its gradient.
template <class O, class V>
SK_CELL V drop_candidate(const O& o, V g) {
  if constexpr (O::kAny) {
    return g * o.candidate;
  } else {
    return g;
  }
}
// h as the recurrent products see it (variational dropout), and the gradient on its way back.
template <class O, class V>
SK_CELL V recurrent_input(const O& o, V h) {
  if constexpr (O::kAny) {
    return h * o.recurrent;
  } else {
    return h;
  }
}
// Pre-activation x of a gate that sees the cell c through peephole weight k.
template <class O, class V>
SK_CELL V add_peephole(const O& o, int k, V c, V x) {
  if constexpr (O::kAny) {
    return O::Arithmetic::fma(o.peephole[k], c, x);
  } else {
    return x;
  }
}
template <class O, class V>
SK_CELL V clip_gate(const O& o, V x) {
  if constexpr (O::kAny) {
    return clamp(x, o.gate_clip);
  } else {
    return x;
  }
}
template <class O, class V>
SK_CELL V clip_cell(const O& o, V c) {
  if constexpr (O::kAny) {
    return clamp(c, o.cell_clip);
  } else {
    return c;
  }
}
// The gradient d of a clipped cell with respect to the cell before clipping. NaN stays NaN.
template <class O, class V>
SK_CELL V clip_cell_gradient(const O& o, V unclipped, V d) {
  d = unclipped >= o.cell_clip ? V{} : d;
  return unclipped <= -o.cell_clip ? V{} : d;
}

// Zoneout of a state: `before` and `now` are the old and the new value.
template <class A, class V>
SK_CELL V zoneout(V share, V before, V now) {
  return A::rounded(A::blend(share, before, now));
}
template <class O, class V>
SK_CELL V zoneout_h(const O& o, V before, V now) {
  using A = typename O::Arithmetic;
  if constexpr (O::kAny) {
    return zoneout<A>(o.zoneout_h, before, now);
  } else {
    return A::rounded(now);
  }
}
// The cell from which h was computed: the stored one, except where zoneout may have kept the old value.
template <class O, class V>
SK_CELL V before_zoneout(const O& o, V c, V unclipped) {
  return o.zoneout_c == V{} ? c : O::Arithmetic::rounded(clip_cell(o, unclipped));
}

}  // namespace seqkernels
