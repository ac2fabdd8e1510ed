// Cells with layer normalisation over the hidden units: of the products with x and with h, each by itself, or of their
// sum. The kernels around them (cpu/norm.h) normalise. Source: Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450
#pragma once

#include "recurrent/cells/cell.h"
#include "recurrent/cells/gru.h"

namespace seqkernels {

// LSTM with h' = o tanh(norm(c')). kSaved: the gates, then the normalised products with x and with h.
struct LSTMNorm : CellDefaults {
  static constexpr const char* kName = "lstm_norm";
  static constexpr int kGates = 4, kFirst = 4, kSaved = 12, kValues = 4, kCells = 1, kNormGroups = 1;
  static constexpr const char *kGateNames = "ifgo", *kStateNames = "hc";
  static constexpr bool kSeparate = true, kNormC = true, kCellOptions = true, kCuda = false, kHasPlain = false;
  static constexpr int group_of(int /*gate*/) { return 0; }

  // Returns c' before zoneout.
  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* h, const O& o, V /*h_prev*/, V* c, V* saved) {
    using A = typename O::Arithmetic;
    const V input = activate<Sigmoid>(o, x[0] + h[0], saved[0]), forget = activate<Sigmoid>(o, x[1] + h[1], saved[1]);
    const V g = drop_candidate(o, activate<Tanh>(o, x[2] + h[2], saved[2]));
    activate<Sigmoid>(o, x[3] + h[3], saved[3]);
    return A::rounded(clip_cell(o, A::fma(forget, c[0], input * g)));
  }
  template <class O, class V>
  static SK_CELL V unclipped(const V* saved, const O& o, V c_prev) {
    const V input = restore<Sigmoid>(o, saved[0]).value, forget = restore<Sigmoid>(o, saved[1]).value;
    return O::Arithmetic::fma(forget, c_prev, input * drop_candidate(o, restore<Tanh>(o, saved[2]).value));
  }
  // dc: in, the gradient of c' before zoneout; out, that of c_prev through f. The caller fills d[3].
  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& o, V c_prev, V& dc, V* d) {
    const auto input = restore<Sigmoid>(o, saved[0]), forget = restore<Sigmoid>(o, saved[1]);
    const auto g = restore<Tanh>(o, saved[2]);
    dc = clip_cell_gradient(o, unclipped(saved, o, c_prev), dc);
    d[0] = dc * drop_candidate(o, g.value) * input.slope;
    d[1] = dc * c_prev * forget.slope;
    d[2] = drop_candidate(o, dc * input.value) * g.slope;
    dc = dc * forget.value;
  }
};

// torch's GRU; gates r and z are normalised together, n by itself.
struct GRUNorm : GRUCell<false> {
  static constexpr const char* kName = "gru_norm";
  static constexpr int kSaved = 9, kValues = 3, kNormGroups = 2, kReadsGate = 2;
  static constexpr bool kHeads = false, kCuda = false, kHasPlain = false;
  static constexpr int group_of(int gate) { return gate == 2; }
};

// The GRU of Dreamer: x holds norm(W_ih x + W_hh h), one normalisation over all gates and heads;
// n = tanh(r n~), u = sigmoid(u~ - 1), h' = u n + (1 - u) h. kSaved: the gates, then the normalised sum.
// Source: Hafner et al., https://arxiv.org/abs/2010.02193 and https://arxiv.org/abs/2301.04104
struct DreamerGRU : CellDefaults {
  static constexpr const char* kName = "dreamer_gru";
  static constexpr const char* kGateNames = "rnu";
  static constexpr int kGates = 3, kFirst = 3, kSaved = 6, kValues = 3, kNormGroups = 1, kReadsGate = 1;
  static constexpr bool kJointNorm = true, kPassesH = true, kReadsH = true, kHeads = true;
  static constexpr bool kCuda = false, kHasPlain = false;
  static constexpr int group_of(int /*gate*/) { return 0; }

  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* /*h*/, const O& o, V h_prev, V* /*c*/, V* saved) {
    using A = typename O::Arithmetic;
    const V r = activate<Sigmoid>(o, x[0], saved[0]);
    const V n = drop_candidate(o, activate<Tanh>(o, r * x[1], saved[1]));
    const V u = activate<Sigmoid>(o, x[2] - typename A::T(1), saved[2]);
    return A::fma(u, n - h_prev, h_prev);
  }
  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& o, V h_prev, const V* /*c*/, const V* /*c_prev*/, V dh,
                               V* /*dc*/, StepGradient<V>& d) {
    using T = typename O::Arithmetic::T;
    const auto r = restore<Sigmoid>(o, saved[0]), u = restore<Sigmoid>(o, saved[2]);
    const auto n = restore<Tanh>(o, saved[1]);
    const V dn = drop_candidate(o, dh * u.value) * n.slope;
    d.x[0] = dn * saved[kValues] * r.slope;
    d.x[1] = dn * r.value;
    d.x[2] = dh * (drop_candidate(o, n.value) - h_prev) * u.slope;
    d.direct = dh * (T(1) - u.value);
  }
};

}  // namespace seqkernels
