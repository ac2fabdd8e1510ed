// The cells of recurrent layers on vectors of hidden units. A cell says what it keeps and does one step each way; the
// time loop, the packed walk, the products and the threads are the same for all.
//
//   kGates      columns of W_ih and W_hh per hidden unit
//   kUnits      vectors of units in a panel of gates: kUnits * kGates vectors are made by one register tile
//   kSaved      vectors per unit kept for backward, beside y (and c)
//   kHasC       a second state, c
//   kSeparate   the gradients of the two products differ: backward fills dx and dh, else dx alone serves both
//   kDirect     h_prev also reaches h without a product: backward gives that share of its gradient
//
// forward: x and h are the two products with their biases; returns the new h. States are rounded to what is stored, so
// a chunk that starts from stored states goes on with the same bits. backward: dh and dc are gradients of this step's
// states; dc becomes that of the previous c.
#pragma once

#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

// d/dx of sigmoid and tanh, from their values.
template <class T>
SEQKERNELS_INLINE Native<T> sigmoid_slope(Native<T> y) {
  return y * (T(1) - y);
}
template <class T>
SEQKERNELS_INLINE Native<T> tanh_slope(Native<T> y) {
  return fma(-y, y, broadcast(T(1)));
}

template <class V>
struct StepGradient {
  V x[4], h[4];  // of the pre-activations, as the two products see them
  V direct;      // of h_prev, not by way of a product
};

// c = sigmoid(f) c' + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c); gates i, f, g, o.
// Source: Hochreiter and Schmidhuber, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000.
template <class S>
struct LSTMCell {
  using Storage = S;
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kGates = 4, kUnits = 1, kSaved = 4;
  static constexpr bool kHasC = true, kSeparate = false, kDirect = false;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, V /*h_prev*/, V& c, V* saved) {
    saved[0] = sigmoid<T>(x[0] + h[0]);
    saved[1] = sigmoid<T>(x[1] + h[1]);
    saved[2] = tanh<T>(x[2] + h[2]);
    saved[3] = sigmoid<T>(x[3] + h[3]);
    c = rounded<S>(fma(saved[1], c, saved[0] * saved[2]));
    return saved[3] * tanh<T>(c);
  }

  static SEQKERNELS_INLINE void backward(const V* saved, V /*h*/, V /*h_prev*/, V c, V c_prev, V dh, V& dc,
                                         StepGradient<V>& d) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = tanh<T>(c);
    dc = fma(dh * o, tanh_slope<T>(tanh_c), dc);
    d.x[0] = dc * g * sigmoid_slope<T>(i);
    d.x[1] = dc * c_prev * sigmoid_slope<T>(f);
    d.x[2] = dc * i * tanh_slope<T>(g);
    d.x[3] = dh * tanh_c * sigmoid_slope<T>(o);
    dc = dc * f;
  }
};

// h = (1 - z) n + z h',  r = sigmoid(.), z = sigmoid(.), n = tanh(x_n + r h_n): torch's GRU, the reset gate after the
// product. Source: Cho et al., 2014; this variant: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
template <class S>
struct GRUCell {
  using Storage = S;
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kGates = 3, kUnits = 1, kSaved = 4;  // r, z, n and h_n, which r multiplied
  static constexpr bool kHasC = false, kSeparate = true, kDirect = true;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, V h_prev, V& /*c*/, V* saved) {
    saved[0] = sigmoid<T>(x[0] + h[0]);
    saved[1] = sigmoid<T>(x[1] + h[1]);
    saved[2] = tanh<T>(fma(saved[0], h[2], x[2]));
    saved[3] = h[2];
    return fma(saved[1], h_prev - saved[2], saved[2]);
  }

  static SEQKERNELS_INLINE void backward(const V* saved, V /*h*/, V h_prev, V /*c*/, V /*c_prev*/, V dh, V& /*dc*/,
                                         StepGradient<V>& d) {
    const V r = saved[0], z = saved[1], n = saved[2], h_n = saved[3];
    d.x[2] = dh * (T(1) - z) * tanh_slope<T>(n);
    d.x[1] = dh * (h_prev - n) * sigmoid_slope<T>(z);
    d.x[0] = d.x[2] * h_n * sigmoid_slope<T>(r);
    d.h[0] = d.x[0];
    d.h[1] = d.x[1];
    d.h[2] = d.x[2] * r;
    d.direct = dh * z;
  }
};

// h = tanh(.) or relu(.). Source: Elman, "Finding Structure in Time", 1990.
struct Tanh {
  template <class T>
  static SEQKERNELS_INLINE Native<T> value(Native<T> x) {
    return tanh<T>(x);
  }
  template <class T>
  static SEQKERNELS_INLINE Native<T> slope(Native<T> y) {
    return tanh_slope<T>(y);
  }
};
struct Relu {
  template <class T>
  static SEQKERNELS_INLINE Native<T> value(Native<T> x) {
    return x < T(0) ? Native<T>{} : x;  // NaN stays NaN
  }
  template <class T>
  static SEQKERNELS_INLINE Native<T> slope(Native<T> y) {
    return y > T(0) ? broadcast(T(1)) : Native<T>{};
  }
};

template <class S, class Activation>
struct RNNCell {
  using Storage = S;
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kGates = 1, kUnits = 4, kSaved = 0;  // y tells all
  static constexpr bool kHasC = false, kSeparate = false, kDirect = false;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return Activation::template value<T>(x[0] + h[0]);
  }

  static SEQKERNELS_INLINE void backward(const V* /*saved*/, V h, V /*h_prev*/, V /*c*/, V /*c_prev*/, V dh, V& /*dc*/,
                                         StepGradient<V>& d) {
    d.x[0] = dh * Activation::template slope<T>(h);
  }
};
template <class S>
using RNNTanhCell = RNNCell<S, Tanh>;
template <class S>
using RNNReluCell = RNNCell<S, Relu>;

}  // namespace seqkernels::SEQKERNELS_ISA
