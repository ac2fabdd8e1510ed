// Cells whose products with x and with h are each normalised over the hidden units (layer normalisation); the kernels
// around them (cpu/norm.h) normalise. Source: Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450
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
  static constexpr int kSaved = 9, kValues = 3, kNormGroups = 2;
  static constexpr bool kHeads = false, kCuda = false, kHasPlain = false;
  static constexpr int group_of(int gate) { return gate == 2; }
};

}  // namespace seqkernels
