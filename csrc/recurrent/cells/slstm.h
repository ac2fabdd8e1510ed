// sLSTM, the scalar LSTM of xLSTM: exponential gates, a normaliser n and a stabiliser m. Gates i, f, z, o.
//   z = tanh(.), o = sigmoid(.), log f = log sigmoid(f~), or f~ with an exponential forget gate
//   m' = max(log f + m, i~), or i~ where n = 0;  i = exp(i~ - m'), f = exp(log f + m - m')
//   c' = f c + i z, n' = f n + i, h' = o c' / n'
// Where n = 0, f is at most 1: it multiplies an empty state, and its exponential could overflow.
// Source: Beck et al., https://arxiv.org/abs/2405.04517; as a recurrent layer: https://arxiv.org/abs/2412.07752.
#pragma once

#include "recurrent/cells/cell.h"

namespace seqkernels {

template <bool kExponential>
struct SLSTMCell : CellDefaults {
  static constexpr int kGates = 4, kFirst = 4, kCells = 3;  // c, n, m
  static constexpr int kSaved = 5;                          // i, f, z, o, the slope of log f: negative where m' = i~
  static constexpr const char *kGateNames = "ifzo", *kStateNames = "hcnm";
  static constexpr bool kHeads = true, kGateClip = false;

  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* h, const O& o, V /*h_prev*/, V* c, V* saved) {
    using A = typename O::Arithmetic;
    const V input = x[0] + h[0], forget = x[1] + h[1], z = A::tanh(x[2] + h[2]);
    V log_f = forget, slope = A::constant(1);
    if constexpr (!kExponential) {
      log_f = A::log_sigmoid(forget);
      slope = A::sigmoid(-forget);
    }
    log_f = log_f + c[2];
    const auto empty = c[1] == V{};
    const auto by_forget = log_f > input;
    V m = by_forget ? log_f : input;
    m = A::rounded(empty ? input : m);
    V f = log_f - m;
    f = empty && f > V{} ? V{} : f;
    saved[0] = A::exp(input - m);
    saved[1] = A::exp(f);
    saved[2] = z;
    saved[3] = A::sigmoid(x[3] + h[3]);
    saved[4] = empty || input >= log_f ? -slope : slope;
    c[0] = A::rounded(A::fma(saved[1], c[0], saved[0] * drop_candidate(o, z)));
    c[1] = A::rounded(A::fma(saved[1], c[1], saved[0]));
    c[2] = m;
    return saved[3] * (c[0] / c[1]);
  }

  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& o, V /*h_prev*/, const V* c, const V* c_prev, V dh, V* dc,
                               StepGradient<V>& d) {
    using A = typename O::Arithmetic;
    const V i = saved[0], f = saved[1], z = saved[2], output = saved[3], ratio = c[0] / c[1], of_c = dh * output / c[1];
    d.x[3] = dh * ratio * Sigmoid::slope<A>(output);
    dc[0] = dc[0] + of_c;
    dc[1] = A::fma(-of_c, ratio, dc[1]);
    d.x[2] = drop_candidate(o, dc[0] * i) * Tanh::slope<A>(z);
    const auto clamped = c_prev[1] == V{} && f >= typename A::T(1);
    const V of_f = A::fma(dc[0], c_prev[0], dc[1] * c_prev[1]) * f, di = A::fma(dc[0], drop_candidate(o, z), dc[1]) * i;
    const V df = clamped ? V{} : of_f, dm = dc[2] - di - df;
    const auto by_input = saved[4] < V{};
    d.x[0] = by_input ? di + dm : di;
    dc[2] = by_input ? df : df + dm;
    d.x[1] = dc[2] * (by_input ? -saved[4] : saved[4]);
    dc[0] = dc[0] * f;
    dc[1] = dc[1] * f;
    d.direct = V{};
  }
};

struct SLSTM : SLSTMCell<false> {
  static constexpr const char* kName = "slstm";
  static constexpr bool kHasPlain = false;
};
struct SLSTMExp : SLSTMCell<true> {
  static constexpr const char* kName = "slstm_exp";
  static constexpr bool kHasPlain = false;
};

}  // namespace seqkernels
