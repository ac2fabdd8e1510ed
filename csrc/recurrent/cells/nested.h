// Nested LSTM: the cell c is the output of an inner LSTM whose input is i g and whose h is f c; its own cell is s.
// h' = o tanh(c'). Gates i, f, g, o of both. Source: Moniz and Krueger, https://arxiv.org/abs/1801.10308
#pragma once

#include "recurrent/cells/cell.h"

namespace seqkernels {

struct NestedLSTM : CellDefaults {
  static constexpr const char* kName = "nested_lstm";
  static constexpr int kGates = 4, kFirst = 4, kInnerGates = 4, kCells = 2;  // c, s
  static constexpr int kSaved = 8, kSavedFirst = 4;                          // i, f, g, o; the inner i, f, g, o
  static constexpr int kFactors = 2, kCarried = 1;                           // i g, f c; o
  static constexpr const char *kGateNames = "ifgo", *kStateNames = "hcs";
  static constexpr bool kGateClip = false, kCuda = false, kHasPlain = false;

  template <class O, class V>
  static SK_CELL void forward_first(const V* x, const V* h, const O& o, V /*h_prev*/, const V* c, V* saved, V* q,
                                    V* carried) {
    const V input = activate<Sigmoid>(o, x[0] + h[0], saved[0]), forget = activate<Sigmoid>(o, x[1] + h[1], saved[1]);
    q[0] = input * drop_candidate(o, activate<Tanh>(o, x[2] + h[2], saved[2]));
    q[1] = forget * c[0];
    carried[0] = activate<Sigmoid>(o, x[3] + h[3], saved[3]);
  }
  template <class O, class V>
  static SK_CELL V forward_second(const V* /*x*/, const V* h, const O& /*o*/, V /*h_prev*/, const V* carried, V* c,
                                  V* saved) {
    using A = typename O::Arithmetic;
    saved[0] = A::sigmoid(h[0]);
    saved[1] = A::sigmoid(h[1]);
    saved[2] = A::tanh(h[2]);
    saved[3] = A::sigmoid(h[3]);
    c[1] = A::rounded(A::fma(saved[1], c[1], saved[0] * saved[2]));
    c[0] = A::rounded(saved[3] * A::tanh(c[1]));
    return carried[0] * A::tanh(c[0]);
  }
  template <class O, class V>
  static SK_CELL void backward_second(const V* saved, const O& o, V /*h_prev*/, const V* c, const V* c_prev, V dh,
                                      V* dc, V* d, V* d_second, V& direct) {
    using A = typename O::Arithmetic;
    const V *inner = saved + 4, tanh_c = A::tanh(c[0]), tanh_s = A::tanh(c[1]);
    const auto output = restore<Sigmoid>(o, saved[3]);
    d[3] = dh * tanh_c * output.slope;
    dc[0] = A::fma(dh * output.value, Tanh::slope<A>(tanh_c), dc[0]);
    d_second[3] = dc[0] * tanh_s * Sigmoid::slope<A>(inner[3]);
    dc[1] = A::fma(dc[0] * inner[3], Tanh::slope<A>(tanh_s), dc[1]);
    d_second[0] = dc[1] * inner[2] * Sigmoid::slope<A>(inner[0]);
    d_second[1] = dc[1] * c_prev[1] * Sigmoid::slope<A>(inner[1]);
    d_second[2] = dc[1] * inner[0] * Tanh::slope<A>(inner[2]);
    dc[1] = dc[1] * inner[1];
    direct = V{};
  }
  template <class O, class V>
  static SK_CELL void backward_first(const V* saved, const O& o, V /*h_prev*/, const V* c_prev, const V* dq, V* dc,
                                     V* d, V& /*direct*/, V* q) {
    const auto input = restore<Sigmoid>(o, saved[0]), forget = restore<Sigmoid>(o, saved[1]);
    const auto g = restore<Tanh>(o, saved[2]);
    q[0] = input.value * drop_candidate(o, g.value);
    q[1] = forget.value * c_prev[0];
    d[0] = dq[0] * drop_candidate(o, g.value) * input.slope;
    d[1] = dq[1] * c_prev[0] * forget.slope;
    d[2] = drop_candidate(o, dq[0] * input.value) * g.slope;
    dc[0] = dq[1] * forget.value;
  }
};

}  // namespace seqkernels
