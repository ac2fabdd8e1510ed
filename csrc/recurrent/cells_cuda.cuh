// The cells of recurrent layers on a GPU, one hidden unit of one sequence at a time: the same formulas, saved values
// and roundings as in cells.h. A cell knows nothing of how its products are made or where its states lie, so all
// kernels share it.
//
//   kGates      columns of W_ih per hidden unit
//   kFirst      of a cell with two products in a row: the gates of the first, [0, kFirst); the second is with q, which
//               the first stage left, and has the others. Else all of them
//   kSaved      values per unit kept for backward, beside y (and c); of a plain RNN 1, and none without options
//   kStates     h, or h and c
//   kSeparate   the gradients of the two products differ: backward fills x and h, else x alone serves both
//   kDirect     h_prev also reaches h without a product: backward gives that share of its gradient
//   kReadsH     backward reads the h that a step started from
//
// Options (Extra) enter as arithmetic that is neutral where one is off; a cell on NoExtra has none of it.
#pragma once

#include "common/device.cuh"

namespace seqkernels::cuda {

using namespace device;

SK_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SK_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

// Sigmoid and tanh. What is stored in half precision is computed with the hardware's exponential, which is off by 2^-21
// or so; the rest by the library's functions.
template <class S>
struct Curves {
  using T = Compute<S>;
  static constexpr bool kFast = sizeof(S) == 2;
  static constexpr float kLog2E = 1.4426950408889634f;
  static SK_DEVICE T sigmoid(T x) {
    if constexpr (kFast) {
      return fast_reciprocal(1.0f + fast_exp2(-kLog2E * x));
    } else if constexpr (sizeof(T) == 4) {
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
    } else if constexpr (sizeof(T) == 4) {
      return tanhf(x);
    } else {
      return ::tanh(x);
    }
  }
};

template <class S, class T>
SK_DEVICE T rounded(T x) {
  return widen(narrow<S>(x));
}

// What the options make of one unit of one token.
template <class T>
struct NoExtra {};
template <class T>
struct Extra {
  T zoneout_h, zoneout_c, candidate, fed;  // fed: the factor of h in the products
  T cell_clip, gate_clip;
  T sigmoid_low, sigmoid_high, tanh_high;  // at the limits of gate_clip
  T peephole[3];
};

template <class E>
constexpr bool kHasOptions = false;
template <class T>
constexpr bool kHasOptions<Extra<T>> = true;

template <class S>
struct Sigmoid {
  using T = Compute<S>;
  static SK_DEVICE T value(T x) { return Curves<S>::sigmoid(x); }
  static SK_DEVICE T slope(T y) { return y * (T(1) - y); }
  static SK_DEVICE T limit(const Extra<T>& e, T side) { return side > 0 ? e.sigmoid_high : e.sigmoid_low; }
};
template <class S>
struct Tanh {
  using T = Compute<S>;
  static SK_DEVICE T value(T x) { return Curves<S>::tanh(x); }
  static SK_DEVICE T slope(T y) { return multiply_add(-y, y, T(1)); }
  static SK_DEVICE T limit(const Extra<T>& e, T side) { return side > 0 ? e.tanh_high : -e.tanh_high; }
};
template <class S>
struct Relu {
  using T = Compute<S>;
  static SK_DEVICE T value(T x) { return x < T(0) ? T(0) : x; }  // NaN stays NaN
  static SK_DEVICE T slope(T y) { return y > T(0) ? T(1) : T(0); }
};

template <class T>
SK_DEVICE T limited(T x, T limit) {  // NaN stays NaN
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// A sigmoid or tanh and how its value is kept for backward: one at the limit of gate_clip, where no gradient passes, as
// 2 or -2, which say which limit.
template <class Activation, class T>
SK_DEVICE T activate(const NoExtra<T>&, T x, T& kept) {
  return kept = Activation::value(x);
}
template <class Activation, class T>
SK_DEVICE T activate(const Extra<T>& e, T x, T& kept) {
  const T value = Activation::value(limited(x, e.gate_clip));
  kept = x >= e.gate_clip ? T(2) : x <= -e.gate_clip ? T(-2) : value;
  return value;
}
// Its value and slope from what was kept.
template <class T>
struct Kept {
  T value, slope;
};
template <class Activation, class T>
SK_DEVICE Kept<T> reopen(const NoExtra<T>&, T kept) {
  return {kept, Activation::slope(kept)};
}
template <class Activation, class T>
SK_DEVICE Kept<T> reopen(const Extra<T>& e, T kept) {
  const bool at_limit = kept * kept > T(2);
  return {at_limit ? Activation::limit(e, kept) : kept, at_limit ? T(0) : Activation::slope(kept)};
}

// The other options, each nothing in a plain layer.
template <class T>
SK_DEVICE T candidate(const NoExtra<T>&, T g) {
  return g;
}
template <class T>
SK_DEVICE T candidate(const Extra<T>& e, T g) {
  return e.candidate * g;
}
template <class T>
SK_DEVICE T fed(const NoExtra<T>&, T h) {
  return h;
}
template <class T>
SK_DEVICE T fed(const Extra<T>& e, T h) {
  return e.fed * h;
}
template <class T>
SK_DEVICE T peephole(const NoExtra<T>&, int, T, T x) {
  return x;
}
template <class T>
SK_DEVICE T peephole(const Extra<T>& e, int k, T c, T x) {
  return multiply_add(e.peephole[k], c, x);
}
template <class T>
SK_DEVICE T clip_cell(const NoExtra<T>&, T c) {
  return c;
}
template <class T>
SK_DEVICE T clip_cell(const Extra<T>& e, T c) {
  return limited(c, e.cell_clip);
}
template <class T>
SK_DEVICE T clip_gate(const NoExtra<T>&, T x) {
  return x;
}
template <class T>
SK_DEVICE T clip_gate(const Extra<T>& e, T x) {
  return limited(x, e.gate_clip);
}
template <class T>
SK_DEVICE T through_clip(const Extra<T>& e, T unclipped, T d) {  // NaN stays NaN
  d = unclipped >= e.cell_clip ? T(0) : d;
  return unclipped <= -e.cell_clip ? T(0) : d;
}

// What keeps the last h or c (zoneout), and the share of a gradient that goes on.
template <class S, class T>
SK_DEVICE T zoned(T keep, T before, T now) {
  return rounded<S>(keep == T(0) ? now : multiply_add(keep, before - now, now));
}
template <class S, class T>
SK_DEVICE T zoned_h(const NoExtra<T>&, T, T now) {
  return rounded<S>(now);
}
template <class S, class T>
SK_DEVICE T zoned_h(const Extra<T>& e, T before, T now) {
  return zoned<S>(e.zoneout_h, before, now);
}

template <class T>
struct StepGradient {
  T x[4], h[4];   // of the pre-activations, as the two products see them
  T direct;       // of h_prev, not by way of a product
  T peephole[3];  // what this token adds to those
};

template <class S>
struct CellBase {
  using Storage = S;
  using T = Compute<S>;
  static constexpr bool kSeparate = false, kDirect = false, kReadsH = false;
  static constexpr int kPeepholes = 0;
  static constexpr bool kOptions = false;  // of kernels that come with options and without: WithOptions
};
template <class Cell>
struct WithOptions : Cell {
  static constexpr bool kOptions = true;
};
template <class Cell>
using ExtraOf = std::conditional_t<Cell::kOptions, Extra<typename Cell::T>, NoExtra<typename Cell::T>>;

// c = sigmoid(f) c' + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c); gates i, f, g, o; coupled: f = 1 - i, gates i, g, o.
template <class S, bool kCoupled>
struct LSTMCellOf : CellBase<S> {
  using typename CellBase<S>::T;
  static constexpr int kGates = kCoupled ? 3 : 4, kFirst = kGates, kSaved = kGates, kStates = 2,
                       kPeepholes = kGates - 1;
  static constexpr int kF = 1, kG = kCoupled ? 1 : 2, kO = kCoupled ? 2 : 3;  // i is gate 0

  template <class E>
  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T /*h_prev*/, T& c, T* saved) {
    const T i = activate<Sigmoid<S>>(e, peephole(e, 0, c, x[0] + h[0]), saved[0]);
    T f;
    if constexpr (kCoupled) {
      f = T(1) - i;
    } else {
      f = activate<Sigmoid<S>>(e, peephole(e, 1, c, x[kF] + h[kF]), saved[kF]);
    }
    const T g = candidate(e, activate<Tanh<S>>(e, x[kG] + h[kG], saved[kG]));
    const T now = rounded<S>(clip_cell(e, multiply_add(f, c, i * g)));
    const T o = activate<Sigmoid<S>>(e, peephole(e, kPeepholes - 1, now, x[kO] + h[kO]), saved[kO]);
    if constexpr (kHasOptions<E>) {
      c = zoned<S>(e.zoneout_c, c, now);
    } else {
      c = now;
    }
    return o * Curves<S>::tanh(now);
  }

  template <class E>
  static SK_DEVICE void backward(const T* saved, const E& e, T /*h*/, T /*h_prev*/, T c, T c_prev, T dh, T& dc,
                                 StepGradient<T>& d) {
    const auto i = reopen<Sigmoid<S>>(e, saved[0]), o = reopen<Sigmoid<S>>(e, saved[kO]);
    Kept<T> f;
    if constexpr (kCoupled) {
      f.value = T(1) - i.value;
    } else {
      f = reopen<Sigmoid<S>>(e, saved[kF]);
    }
    const auto g = reopen<Tanh<S>>(e, saved[kG]);
    T dc_prev = T(0), now = c, unclipped = T(0);
    if constexpr (kHasOptions<E>) {
      unclipped = multiply_add(f.value, c_prev, i.value * candidate(e, g.value));
      // The c that h was made of: the one that was kept, unless zoneout may have held it back.
      if (e.zoneout_c != T(0)) now = rounded<S>(clip_cell(e, unclipped));
      dc_prev = dc * e.zoneout_c;
      dc = dc - dc_prev;
    }
    const T tanh_c = Curves<S>::tanh(now);
    d.x[kO] = dh * tanh_c * o.slope;
    dc = multiply_add(dh * o.value, Tanh<S>::slope(tanh_c), dc);
    if constexpr (kHasOptions<E>) {
      dc = multiply_add(d.x[kO], e.peephole[kPeepholes - 1], dc);
      d.peephole[kPeepholes - 1] = d.x[kO] * now;
      dc = through_clip(e, unclipped, dc);
    }
    if constexpr (kCoupled) {
      d.x[0] = dc * (candidate(e, g.value) - c_prev) * i.slope;
    } else {
      d.x[0] = dc * candidate(e, g.value) * i.slope;
      d.x[kF] = dc * c_prev * f.slope;
    }
    d.x[kG] = candidate(e, dc * i.value) * g.slope;
    dc = dc * f.value;
    if constexpr (kHasOptions<E>) {
      SK_UNROLL
      for (int k = 0; k < kPeepholes - 1; ++k) {
        dc = multiply_add(d.x[k], e.peephole[k], dc);
        d.peephole[k] = d.x[k] * c_prev;
      }
      dc = dc + dc_prev;
    }
    d.direct = T(0);
  }
};
template <class S>
using LSTMCell = LSTMCellOf<S, false>;
template <class S>
using LSTMCoupledCell = LSTMCellOf<S, true>;

// h = (1 - z) n + z h',  r = sigmoid(.), z = sigmoid(.), n = tanh(x_n + r h_n): the reset gate after the product.
template <class S>
struct GRUCell : CellBase<S> {
  using typename CellBase<S>::T;
  static constexpr int kGates = 3, kFirst = 3, kSaved = 4, kStates = 1;  // r, z, n and h_n, which r multiplied
  static constexpr bool kSeparate = true, kDirect = true, kReadsH = true;

  template <class E>
  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T h_prev, T& /*c*/, T* saved) {
    const T r = activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]);
    const T z = activate<Sigmoid<S>>(e, x[1] + h[1], saved[1]);
    const T n = candidate(e, activate<Tanh<S>>(e, multiply_add(r, h[2], x[2]), saved[2]));
    saved[3] = h[2];
    return multiply_add(z, h_prev - n, n);
  }

  template <class E>
  static SK_DEVICE void backward(const T* saved, const E& e, T /*h*/, T h_prev, T /*c*/, T /*c_prev*/, T dh, T& /*dc*/,
                                 StepGradient<T>& d) {
    const auto r = reopen<Sigmoid<S>>(e, saved[0]), z = reopen<Sigmoid<S>>(e, saved[1]);
    const auto n = reopen<Tanh<S>>(e, saved[2]);
    d.x[2] = candidate(e, dh * (T(1) - z.value)) * n.slope;
    d.x[1] = dh * (h_prev - candidate(e, n.value)) * z.slope;
    d.x[0] = d.x[2] * saved[3] * r.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1];
    d.h[2] = d.x[2] * r.value;
    d.direct = dh * z.value;
  }
};

// h = (1 - f) h' + f n,  f = sigmoid(.), n = tanh(x_n + f h_n).
template <class S>
struct MGUCell : CellBase<S> {
  using typename CellBase<S>::T;
  static constexpr int kGates = 2, kFirst = 2, kSaved = 3, kStates = 1;  // f, n and h_n, which f multiplied
  static constexpr bool kSeparate = true, kDirect = true, kReadsH = true;

  template <class E>
  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T h_prev, T& /*c*/, T* saved) {
    const T f = activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]);
    const T n = candidate(e, activate<Tanh<S>>(e, multiply_add(f, h[1], x[1]), saved[1]));
    saved[2] = h[1];
    return multiply_add(f, n - h_prev, h_prev);
  }

  template <class E>
  static SK_DEVICE void backward(const T* saved, const E& e, T /*h*/, T h_prev, T /*c*/, T /*c_prev*/, T dh, T& /*dc*/,
                                 StepGradient<T>& d) {
    const auto f = reopen<Sigmoid<S>>(e, saved[0]);
    const auto n = reopen<Tanh<S>>(e, saved[1]);
    d.x[1] = candidate(e, dh * f.value) * n.slope;
    d.x[0] = multiply_add(d.x[1], saved[2], dh * (candidate(e, n.value) - h_prev)) * f.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1] * f.value;
    d.direct = dh * (T(1) - f.value);
  }
};

// h = tanh(.) or relu(.). Without options y tells all; with them saved[0] is the activation.
template <class S, class Activation>
struct RNNCellOf : CellBase<S> {
  using typename CellBase<S>::T;
  static constexpr int kGates = 1, kFirst = 1, kSaved = 1, kStates = 1;

  template <class E>
  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T /*h_prev*/, T& /*c*/, T* saved) {
    const T pre = x[0] + h[0], value = Activation::value(clip_gate(e, pre));
    saved[0] = value;
    if constexpr (kHasOptions<E>) {  // a slope of zero is that of 1 for tanh, and of 0 for relu
      if (pre >= e.gate_clip || pre <= -e.gate_clip) saved[0] = Activation::slope(T(0));
    }
    return value;
  }

  template <class E>
  static SK_DEVICE void backward(const T* saved, const E& /*e*/, T /*h*/, T /*h_prev*/, T /*c*/, T /*c_prev*/, T dh,
                                 T& /*dc*/, StepGradient<T>& d) {
    d.x[0] = dh * Activation::slope(saved[0]);
    d.direct = T(0);
  }
};
template <class S>
using RNNTanhCell = RNNCellOf<S, Tanh<S>>;
template <class S>
using RNNReluCell = RNNCellOf<S, Relu<S>>;

// ---- cells of two products: the second is with what the first stage leaves, q ----
//
//   kSavedFirst  of kSaved, those that the first stage makes
// carried: what the second stage needs of the first.

// h = (1 - z) n + z h',  n = tanh(x_n + W_hn (r h')): the GRU as it was first written.
template <class S>
struct GRUBeforeCell : CellBase<S> {
  using typename CellBase<S>::T;
  static constexpr int kGates = 3, kFirst = 2, kSaved = 3, kSavedFirst = 2, kStates = 1;  // r, z; n
  static constexpr bool kDirect = true, kReadsH = true;

  template <class E>
  static SK_DEVICE T first(const T* x, const T* h, const E& e, T h_prev, T* saved, T& carried) {
    carried = activate<Sigmoid<S>>(e, x[1] + h[1], saved[1]);
    return activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]) * fed(e, h_prev);
  }
  template <class E>
  static SK_DEVICE T second(T x, T h, const E& e, T h_prev, T carried, T* saved) {
    const T n = candidate(e, activate<Tanh<S>>(e, x + h, saved[0]));
    return multiply_add(carried, h_prev - n, n);
  }
  // d: gradients of the first stage's gates as far as they are known here; returns that of the second's.
  template <class E>
  static SK_DEVICE T backward_second(const T* saved, const E& e, T h_prev, T dh, T* d, T& direct) {
    const auto z = reopen<Sigmoid<S>>(e, saved[1]);
    const auto n = reopen<Tanh<S>>(e, saved[2]);
    d[0] = T(0);
    d[1] = dh * (h_prev - candidate(e, n.value)) * z.slope;
    direct = dh * z.value;
    return candidate(e, dh * (T(1) - z.value)) * n.slope;
  }
  template <class E>
  static SK_DEVICE void backward_first(const T* saved, const E& e, T h_prev, T dq, T* d, T& direct, T& q) {
    const auto r = reopen<Sigmoid<S>>(e, saved[0]);
    q = r.value * fed(e, h_prev);
    d[0] = dq * fed(e, h_prev) * r.slope;
    direct = multiply_add(fed(e, dq), r.value, direct);
  }
};

// h = (1 - f) h' + f n,  n = tanh(x_n + W_hn (f h')).
template <class S>
struct MGUBeforeCell : CellBase<S> {
  using typename CellBase<S>::T;
  static constexpr int kGates = 2, kFirst = 1, kSaved = 2, kSavedFirst = 1, kStates = 1;  // f; n
  static constexpr bool kDirect = true, kReadsH = true;

  template <class E>
  static SK_DEVICE T first(const T* x, const T* h, const E& e, T h_prev, T* saved, T& carried) {
    carried = activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]);
    return carried * fed(e, h_prev);
  }
  template <class E>
  static SK_DEVICE T second(T x, T h, const E& e, T h_prev, T carried, T* saved) {
    const T n = candidate(e, activate<Tanh<S>>(e, x + h, saved[0]));
    return multiply_add(carried, n - h_prev, h_prev);
  }
  // d[0] is f's gradient by way of h alone; what comes by way of q is added later.
  template <class E>
  static SK_DEVICE T backward_second(const T* saved, const E& e, T h_prev, T dh, T* d, T& direct) {
    const auto f = reopen<Sigmoid<S>>(e, saved[0]);
    const auto n = reopen<Tanh<S>>(e, saved[1]);
    d[0] = dh * (candidate(e, n.value) - h_prev) * f.slope;
    direct = dh * (T(1) - f.value);
    return candidate(e, dh * f.value) * n.slope;
  }
  template <class E>
  static SK_DEVICE void backward_first(const T* saved, const E& e, T h_prev, T dq, T* d, T& direct, T& q) {
    const auto f = reopen<Sigmoid<S>>(e, saved[0]);
    q = f.value * fed(e, h_prev);
    d[0] = multiply_add(dq * fed(e, h_prev), f.slope, d[0]);
    direct = multiply_add(fed(e, dq), f.value, direct);
  }
};

}  // namespace seqkernels::cuda
