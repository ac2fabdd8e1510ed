// LSTM: c' = f c + i g, h' = o tanh(c') with i, f, o = sigmoid(.), g = tanh(.); gates i, f, g, o.
// Source: Hochreiter and Schmidhuber, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000; peepholes: Gers and
// Schmidhuber, 2000; coupled, f = 1 - i and gates i, g, o: Greff et al., https://arxiv.org/abs/1503.04069; projection:
// Sak, Senior and Beaufays, https://arxiv.org/abs/1402.1128.
#pragma once

#include "recurrent/cells/cell.h"

namespace seqkernels {

template <bool kCoupled>
struct LSTMCell : CellDefaults {
  static constexpr int kGates = kCoupled ? 3 : 4, kFirst = kGates, kSaved = kGates, kCells = 1;
  static constexpr int kPeepholes = kGates - 1;  // of every gate but g
  static constexpr int kI = 0, kF = 1, kG = kCoupled ? 1 : 2, kO = kCoupled ? 2 : 3;
  static constexpr const char *kGateNames = kCoupled ? "igo" : "ifgo", *kStateNames = "hc";
  static constexpr Projection kProjection = Projection::kMaybe;
  static constexpr bool kHeads = true, kCellOptions = true;

  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* h, const O& o, V /*h_prev*/, V* c, V* saved) {
    using A = typename O::Arithmetic;
    const V input = activate<Sigmoid>(o, add_peephole(o, 0, c[0], x[kI] + h[kI]), saved[kI]);
    V forget;
    if constexpr (kCoupled) {
      forget = typename A::T(1) - input;
    } else {
      forget = activate<Sigmoid>(o, add_peephole(o, 1, c[0], x[kF] + h[kF]), saved[kF]);
    }
    const V g = drop_candidate(o, activate<Tanh>(o, x[kG] + h[kG], saved[kG]));
    const V now = A::rounded(clip_cell(o, A::fma(forget, c[0], input * g)));
    const V output = activate<Sigmoid>(o, add_peephole(o, kPeepholes - 1, now, x[kO] + h[kO]), saved[kO]);
    if constexpr (O::kAny) {
      c[0] = zoneout<A>(o.zoneout_c, c[0], now);
    } else {
      c[0] = now;
    }
    return output * A::tanh(now);
  }

  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& o, V /*h_prev*/, const V* c, const V* c_prev, V dh, V* dc_io,
                               StepGradient<V>& d) {
    using A = typename O::Arithmetic;
    const auto input = restore<Sigmoid>(o, saved[kI]), output = restore<Sigmoid>(o, saved[kO]);
    ValueAndSlope<V> forget;
    if constexpr (kCoupled) {
      forget.value = typename A::T(1) - input.value;
    } else {
      forget = restore<Sigmoid>(o, saved[kF]);
    }
    const auto g = restore<Tanh>(o, saved[kG]);
    V dc = dc_io[0], kept = V{}, now = c[0], unclipped = V{};
    if constexpr (O::kAny) {
      unclipped = A::fma(forget.value, c_prev[0], input.value * drop_candidate(o, g.value));
      now = before_zoneout(o, c[0], unclipped);
      kept = dc * o.zoneout_c;
      dc = dc - kept;
    }
    const V tanh_c = A::tanh(now);
    d.x[kO] = dh * tanh_c * output.slope;
    dc = A::fma(dh * output.value, Tanh::slope<A>(tanh_c), dc);
    if constexpr (O::kAny) {
      dc = A::fma(d.x[kO], o.peephole[kPeepholes - 1], dc);
      d.peephole[kPeepholes - 1] = d.x[kO] * now;
      dc = clip_cell_gradient(o, unclipped, dc);
    }
    if constexpr (kCoupled) {
      d.x[kI] = dc * (drop_candidate(o, g.value) - c_prev[0]) * input.slope;
    } else {
      d.x[kI] = dc * drop_candidate(o, g.value) * input.slope;
      d.x[kF] = dc * c_prev[0] * forget.slope;
    }
    d.x[kG] = drop_candidate(o, dc * input.value) * g.slope;
    dc = dc * forget.value;
    if constexpr (O::kAny) {
      for (int k = 0; k < kPeepholes - 1; ++k) {
        dc = A::fma(d.x[k], o.peephole[k], dc);
        d.peephole[k] = d.x[k] * c_prev[0];
      }
      dc = dc + kept;
    }
    dc_io[0] = dc;
    d.direct = V{};
  }

  // h before its projection.
  template <class O, class V>
  static SK_CELL V output(const V* saved, const O& o, V c, V c_prev) {
    using A = typename O::Arithmetic;
    if constexpr (O::kAny) {
      const V input = restore<Sigmoid>(o, saved[kI]).value, g = drop_candidate(o, restore<Tanh>(o, saved[kG]).value);
      const V forget = kCoupled ? typename A::T(1) - input : restore<Sigmoid>(o, saved[kF]).value;
      c = before_zoneout(o, c, A::fma(forget, c_prev, input * g));
    }
    return restore<Sigmoid>(o, saved[kO]).value * A::tanh(c);
  }
};

struct LSTM : LSTMCell<false> {
  static constexpr const char* kName = "lstm";
  static constexpr bool kStep = true;
};
struct LSTMCoupled : LSTMCell<true> {
  static constexpr const char* kName = "lstm_coupled";
  static constexpr bool kHasPlain = false;
};

}  // namespace seqkernels
