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
// Options enter as arithmetic that is neutral where one is off.
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
  static SK_DEVICE T sigmoid(T x) {
    if constexpr (kFast) {
      return fast_divide(1.0f, 1.0f + fast_exp(-x));
    } else if constexpr (sizeof(T) == 4) {
      return 1.0f / (1.0f + expf(-x));
    } else {
      return 1.0 / (1.0 + ::exp(-x));
    }
  }
  static SK_DEVICE T tanh(T x) {
    if constexpr (kFast) {
      const float size = fabsf(x), e = fast_exp(-2.0f * size);
      const float large = copysignf(fast_divide(1.0f - e, 1.0f + e), x);  // loses digits where x is small
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
struct Extra {
  T zoneout_h, zoneout_c, candidate, fed;  // fed: the factor of h in the products
  T cell_clip, gate_clip;
  T sigmoid_low, sigmoid_high, tanh_high;  // at the limits of gate_clip
  T peephole[3];
};

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
SK_DEVICE Kept<T> reopen(const Extra<T>& e, T kept) {
  const bool at_limit = kept * kept > T(2);
  return {at_limit ? Activation::limit(e, kept) : kept, at_limit ? T(0) : Activation::slope(kept)};
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
  using E = Extra<T>;
  static constexpr bool kSeparate = false, kDirect = false, kReadsH = false;
  static constexpr int kPeepholes = 0;
};

// c = sigmoid(f) c' + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c); gates i, f, g, o; coupled: f = 1 - i, gates i, g, o.
template <class S, bool kCoupled>
struct LSTMCellOf : CellBase<S> {
  using typename CellBase<S>::E, typename CellBase<S>::T;
  static constexpr int kGates = kCoupled ? 3 : 4, kFirst = kGates, kSaved = kGates, kStates = 2,
                       kPeepholes = kGates - 1;
  static constexpr int kF = 1, kG = kCoupled ? 1 : 2, kO = kCoupled ? 2 : 3;  // i is gate 0

  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T /*h_prev*/, T& c, T* saved) {
    const T i = activate<Sigmoid<S>>(e, multiply_add(e.peephole[0], c, x[0] + h[0]), saved[0]);
    T f;
    if constexpr (kCoupled) {
      f = T(1) - i;
    } else {
      f = activate<Sigmoid<S>>(e, multiply_add(e.peephole[1], c, x[kF] + h[kF]), saved[kF]);
    }
    const T g = e.candidate * activate<Tanh<S>>(e, x[kG] + h[kG], saved[kG]);
    const T now = rounded<S>(limited(multiply_add(f, c, i * g), e.cell_clip));
    const T o = activate<Sigmoid<S>>(e, multiply_add(e.peephole[kPeepholes - 1], now, x[kO] + h[kO]), saved[kO]);
    c = zoned<S>(e.zoneout_c, c, now);
    return o * Curves<S>::tanh(now);
  }

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
    const T unclipped = multiply_add(f.value, c_prev, i.value * (e.candidate * g.value));
    // The c that h was made of: the one that was kept, unless zoneout may have held it back.
    const T now = e.zoneout_c == T(0) ? c : rounded<S>(limited(unclipped, e.cell_clip));
    const T dc_prev = dc * e.zoneout_c;
    dc = dc - dc_prev;
    const T tanh_c = Curves<S>::tanh(now);
    d.x[kO] = dh * tanh_c * o.slope;
    dc = multiply_add(dh * o.value, Tanh<S>::slope(tanh_c), dc);
    dc = multiply_add(d.x[kO], e.peephole[kPeepholes - 1], dc);
    d.peephole[kPeepholes - 1] = d.x[kO] * now;
    dc = through_clip(e, unclipped, dc);
    if constexpr (kCoupled) {
      d.x[0] = dc * (e.candidate * g.value - c_prev) * i.slope;
    } else {
      d.x[0] = dc * (e.candidate * g.value) * i.slope;
      d.x[kF] = dc * c_prev * f.slope;
    }
    d.x[kG] = e.candidate * (dc * i.value) * g.slope;
    dc = dc * f.value;
    SK_UNROLL
    for (int k = 0; k < kPeepholes - 1; ++k) {
      dc = multiply_add(d.x[k], e.peephole[k], dc);
      d.peephole[k] = d.x[k] * c_prev;
    }
    dc = dc + dc_prev;
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
  using typename CellBase<S>::E, typename CellBase<S>::T;
  static constexpr int kGates = 3, kFirst = 3, kSaved = 4, kStates = 1;  // r, z, n and h_n, which r multiplied
  static constexpr bool kSeparate = true, kDirect = true, kReadsH = true;

  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T h_prev, T& /*c*/, T* saved) {
    const T r = activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]);
    const T z = activate<Sigmoid<S>>(e, x[1] + h[1], saved[1]);
    const T n = e.candidate * activate<Tanh<S>>(e, multiply_add(r, h[2], x[2]), saved[2]);
    saved[3] = h[2];
    return multiply_add(z, h_prev - n, n);
  }

  static SK_DEVICE void backward(const T* saved, const E& e, T /*h*/, T h_prev, T /*c*/, T /*c_prev*/, T dh, T& /*dc*/,
                                 StepGradient<T>& d) {
    const auto r = reopen<Sigmoid<S>>(e, saved[0]), z = reopen<Sigmoid<S>>(e, saved[1]);
    const auto n = reopen<Tanh<S>>(e, saved[2]);
    d.x[2] = e.candidate * (dh * (T(1) - z.value)) * n.slope;
    d.x[1] = dh * (h_prev - e.candidate * n.value) * z.slope;
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
  using typename CellBase<S>::E, typename CellBase<S>::T;
  static constexpr int kGates = 2, kFirst = 2, kSaved = 3, kStates = 1;  // f, n and h_n, which f multiplied
  static constexpr bool kSeparate = true, kDirect = true, kReadsH = true;

  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T h_prev, T& /*c*/, T* saved) {
    const T f = activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]);
    const T n = e.candidate * activate<Tanh<S>>(e, multiply_add(f, h[1], x[1]), saved[1]);
    saved[2] = h[1];
    return multiply_add(f, n - h_prev, h_prev);
  }

  static SK_DEVICE void backward(const T* saved, const E& e, T /*h*/, T h_prev, T /*c*/, T /*c_prev*/, T dh, T& /*dc*/,
                                 StepGradient<T>& d) {
    const auto f = reopen<Sigmoid<S>>(e, saved[0]);
    const auto n = reopen<Tanh<S>>(e, saved[1]);
    d.x[1] = e.candidate * (dh * f.value) * n.slope;
    d.x[0] = multiply_add(d.x[1], saved[2], dh * (e.candidate * n.value - h_prev)) * f.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1] * f.value;
    d.direct = dh * (T(1) - f.value);
  }
};

// h = tanh(.) or relu(.). Without options y tells all; with them saved[0] is the activation.
template <class S, class Activation>
struct RNNCellOf : CellBase<S> {
  using typename CellBase<S>::E, typename CellBase<S>::T;
  static constexpr int kGates = 1, kFirst = 1, kSaved = 1, kStates = 1;

  static SK_DEVICE T forward(const T* x, const T* h, const E& e, T /*h_prev*/, T& /*c*/, T* saved) {
    const T pre = x[0] + h[0], value = Activation::value(limited(pre, e.gate_clip));
    // A slope of zero is that of 1 for tanh, and of 0 for relu.
    saved[0] = pre >= e.gate_clip || pre <= -e.gate_clip ? Activation::slope(T(0)) : value;
    return value;
  }

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
  using typename CellBase<S>::E, typename CellBase<S>::T;
  static constexpr int kGates = 3, kFirst = 2, kSaved = 3, kSavedFirst = 2, kStates = 1;  // r, z; n
  static constexpr bool kDirect = true, kReadsH = true;

  static SK_DEVICE T first(const T* x, const T* h, const E& e, T h_prev, T* saved, T& carried) {
    carried = activate<Sigmoid<S>>(e, x[1] + h[1], saved[1]);
    return activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]) * (e.fed * h_prev);
  }
  static SK_DEVICE T second(T x, T h, const E& e, T h_prev, T carried, T* saved) {
    const T n = e.candidate * activate<Tanh<S>>(e, x + h, saved[0]);
    return multiply_add(carried, h_prev - n, n);
  }
  // d: gradients of the first stage's gates as far as they are known here; returns that of the second's.
  static SK_DEVICE T backward_second(const T* saved, const E& e, T h_prev, T dh, T* d, T& direct) {
    const auto z = reopen<Sigmoid<S>>(e, saved[1]);
    const auto n = reopen<Tanh<S>>(e, saved[2]);
    d[0] = T(0);
    d[1] = dh * (h_prev - e.candidate * n.value) * z.slope;
    direct = dh * z.value;
    return e.candidate * (dh * (T(1) - z.value)) * n.slope;
  }
  static SK_DEVICE void backward_first(const T* saved, const E& e, T h_prev, T dq, T* d, T& direct, T& q) {
    const auto r = reopen<Sigmoid<S>>(e, saved[0]);
    q = r.value * (e.fed * h_prev);
    d[0] = dq * (e.fed * h_prev) * r.slope;
    direct = multiply_add(e.fed * dq, r.value, direct);
  }
};

// h = (1 - f) h' + f n,  n = tanh(x_n + W_hn (f h')).
template <class S>
struct MGUBeforeCell : CellBase<S> {
  using typename CellBase<S>::E, typename CellBase<S>::T;
  static constexpr int kGates = 2, kFirst = 1, kSaved = 2, kSavedFirst = 1, kStates = 1;  // f; n
  static constexpr bool kDirect = true, kReadsH = true;

  static SK_DEVICE T first(const T* x, const T* h, const E& e, T h_prev, T* saved, T& carried) {
    carried = activate<Sigmoid<S>>(e, x[0] + h[0], saved[0]);
    return carried * (e.fed * h_prev);
  }
  static SK_DEVICE T second(T x, T h, const E& e, T h_prev, T carried, T* saved) {
    const T n = e.candidate * activate<Tanh<S>>(e, x + h, saved[0]);
    return multiply_add(carried, n - h_prev, h_prev);
  }
  // d[0] is f's gradient by way of h alone; what comes by way of q is added later.
  static SK_DEVICE T backward_second(const T* saved, const E& e, T h_prev, T dh, T* d, T& direct) {
    const auto f = reopen<Sigmoid<S>>(e, saved[0]);
    const auto n = reopen<Tanh<S>>(e, saved[1]);
    d[0] = dh * (e.candidate * n.value - h_prev) * f.slope;
    direct = dh * (T(1) - f.value);
    return e.candidate * (dh * f.value) * n.slope;
  }
  static SK_DEVICE void backward_first(const T* saved, const E& e, T h_prev, T dq, T* d, T& direct, T& q) {
    const auto f = reopen<Sigmoid<S>>(e, saved[0]);
    q = f.value * (e.fed * h_prev);
    d[0] = multiply_add(dq * (e.fed * h_prev), f.slope, d[0]);
    direct = multiply_add(e.fed * dq, f.value, direct);
  }
};

}  // namespace seqkernels::cuda
