// The LSTM cell on vectors of hidden units: gates i, f, g, o.
//   c = sigmoid(f) c' + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c)
// Source: Hochreiter and Schmidhuber, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000.
#pragma once

#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class S>
struct LSTMCell {
  static constexpr int kGates = 4;
  using T = Compute<S>;
  using V = Native<T>;

  // gate: pre-activations in, activations out. c: the previous state in, this one out. Returns h.
  // States are rounded to what is stored: a chunk that starts from stored states goes on with the same bits.
  static SEQKERNELS_INLINE V forward(V (&gate)[kGates], V& c) {
    gate[0] = sigmoid<T>(gate[0]);
    gate[1] = sigmoid<T>(gate[1]);
    gate[2] = tanh<T>(gate[2]);
    gate[3] = sigmoid<T>(gate[3]);
    c = rounded<S>(fma(gate[1], c, gate[0] * gate[2]));
    return gate[3] * tanh<T>(c);
  }

  // gate: activations in, gradients of the pre-activations out. dc: gradient of c in, of c_prev out.
  static SEQKERNELS_INLINE void backward(V (&gate)[kGates], V c, V c_prev, V dh, V& dc) {
    const V i = gate[0], f = gate[1], g = gate[2], o = gate[3], one = broadcast(T(1));
    const V tanh_c = tanh<T>(c);
    dc = fma(dh * o, fma(-tanh_c, tanh_c, one), dc);
    gate[0] = dc * g * (i * (one - i));
    gate[1] = dc * c_prev * (f * (one - f));
    gate[2] = dc * i * fma(-g, g, one);
    gate[3] = dh * tanh_c * (o * (one - o));
    dc = dc * f;
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
