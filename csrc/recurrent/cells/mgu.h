// Minimal gated unit: h' = (1 - f) h + f n with f = sigmoid(.); gates f, n.
// Source: Zhou et al., https://arxiv.org/abs/1603.09420
#pragma once

#include "recurrent/cells/cell.h"

namespace seqkernels {

// The gate after the product: n = tanh(x_n + f h_n).
struct MGUAfter : CellDefaults {
  static constexpr const char* kName = "mgu_after";
  static constexpr const char* kGateNames = "fn";
  static constexpr int kGates = 2, kFirst = 2, kSaved = 3;  // f, n and h_n, which f multiplied
  static constexpr bool kSeparate = true, kPassesH = true, kReadsH = true, kHeads = true, kHasPlain = false;

  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* h, const O& o, V h_prev, V* /*c*/, V* saved) {
    using A = typename O::Arithmetic;
    const V f = activate<Sigmoid>(o, x[0] + h[0], saved[0]);
    const V n = drop_candidate(o, activate<Tanh>(o, A::fma(f, h[1], x[1]), saved[1]));
    saved[2] = h[1];
    return A::fma(f, n - h_prev, h_prev);
  }

  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& o, V h_prev, const V* /*c*/, const V* /*c_prev*/, V dh,
                               V* /*dc*/, StepGradient<V>& d) {
    using A = typename O::Arithmetic;
    const auto f = restore<Sigmoid>(o, saved[0]);
    const auto n = restore<Tanh>(o, saved[1]);
    d.x[1] = drop_candidate(o, dh * f.value) * n.slope;
    d.x[0] = A::fma(d.x[1], saved[2], dh * (drop_candidate(o, n.value) - h_prev)) * f.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1] * f.value;
    d.direct = dh * (typename A::T(1) - f.value);
  }
};

// The gate before the product: n = tanh(x_n + W_hn (f h)).
struct MGU : CellDefaults {
  static constexpr const char* kName = "mgu";
  static constexpr const char* kGateNames = "fn";
  static constexpr int kGates = 2, kFirst = 1, kSaved = 2, kSavedFirst = 1;  // f; n
  static constexpr int kFactors = 1, kCarried = 1;                           // f h; f
  static constexpr bool kPassesH = true, kReadsH = true, kHeads = true, kHasPlain = false;

  template <class O, class V>
  static SK_CELL void forward_first(const V* x, const V* h, const O& o, V h_prev, const V* /*c*/, V* saved, V* q,
                                    V* carried) {
    carried[0] = activate<Sigmoid>(o, x[0] + h[0], saved[0]);
    q[0] = carried[0] * recurrent_input(o, h_prev);
  }
  template <class O, class V>
  static SK_CELL V forward_second(const V* x, const V* h, const O& o, V h_prev, const V* carried, V* /*c*/, V* saved) {
    const V n = drop_candidate(o, activate<Tanh>(o, x[0] + h[0], saved[0]));
    return O::Arithmetic::fma(carried[0], n - h_prev, h_prev);
  }
  // d[0] is the gradient of f except through q, which backward_first adds.
  template <class O, class V>
  static SK_CELL void backward_second(const V* saved, const O& o, V h_prev, const V* /*c*/, const V* /*c_prev*/, V dh,
                                      V* /*dc*/, V* d, V* d_second, V& direct) {
    const auto f = restore<Sigmoid>(o, saved[0]);
    const auto n = restore<Tanh>(o, saved[1]);
    d_second[0] = drop_candidate(o, dh * f.value) * n.slope;
    d[0] = dh * (drop_candidate(o, n.value) - h_prev) * f.slope;
    direct = dh * (typename O::Arithmetic::T(1) - f.value);
  }
  template <class O, class V>
  static SK_CELL void backward_first(const V* saved, const O& o, V h_prev, const V* /*c_prev*/, const V* dq, V* /*dc*/,
                                     V* d, V& direct, V* q) {
    using A = typename O::Arithmetic;
    const auto f = restore<Sigmoid>(o, saved[0]);
    q[0] = f.value * recurrent_input(o, h_prev);
    d[0] = A::fma(dq[0] * recurrent_input(o, h_prev), f.slope, d[0]);
    direct = A::fma(recurrent_input(o, dq[0]), f.value, direct);
  }
};

}  // namespace seqkernels
