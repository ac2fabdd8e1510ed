// GRU: h' = (1 - z) n + z h with r, z = sigmoid(.); gates r, z, n.
#pragma once

#include "recurrent/cells/cell.h"

namespace seqkernels {

// torch's GRU, the reset gate after the product: n = tanh(x_n + r h_n).
// Source: Cho et al., 2014; this variant: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
// kProjected: h is a projection of c = (1 - z) n + z c, as in Sak, Senior and Beaufays,
// https://arxiv.org/abs/1402.1128.
template <bool kProjected>
struct GRUCell : CellDefaults {
  static constexpr const char* kGateNames = "rzn";
  static constexpr int kGates = 3, kFirst = 3, kSaved = 4;  // r, z, n and h_n, which r multiplied
  static constexpr int kCells = kProjected ? 1 : 0;
  static constexpr const char* kStateNames = kProjected ? "hc" : "h";
  static constexpr bool kSeparate = true, kPassesH = true, kReadsH = !kProjected, kHeads = !kProjected;
  static constexpr Projection kProjection = kProjected ? Projection::kAlways : Projection::kNever;

  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* h, const O& o, V h_prev, V* c, V* saved) {
    using A = typename O::Arithmetic;
    const V r = activate<Sigmoid>(o, x[0] + h[0], saved[0]);
    const V z = activate<Sigmoid>(o, x[1] + h[1], saved[1]);
    const V n = drop_candidate(o, activate<Tanh>(o, A::fma(r, h[2], x[2]), saved[2]));
    saved[3] = h[2];
    if constexpr (kProjected) return c[0] = A::rounded(A::fma(z, c[0] - n, n));
    return A::fma(z, h_prev - n, n);
  }

  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& o, V h_prev, const V* /*c*/, const V* c_prev, V dh, V* dc,
                               StepGradient<V>& d) {
    using T = typename O::Arithmetic::T;
    const auto r = restore<Sigmoid>(o, saved[0]), z = restore<Sigmoid>(o, saved[1]);
    const auto n = restore<Tanh>(o, saved[2]);
    V before = h_prev;
    if constexpr (kProjected) {
      before = c_prev[0];
      dh = dh + dc[0];
    }
    d.x[2] = drop_candidate(o, dh * (T(1) - z.value)) * n.slope;
    d.x[1] = dh * (before - drop_candidate(o, n.value)) * z.slope;
    d.x[0] = d.x[2] * saved[3] * r.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1];
    d.h[2] = d.x[2] * r.value;
    if constexpr (kProjected) {
      dc[0] = dh * z.value;
      d.direct = V{};
    } else {
      d.direct = dh * z.value;
    }
  }

  // h before its projection.
  template <class O, class V>
  static SK_CELL V output(const V* /*saved*/, const O& /*o*/, V c, V /*c_prev*/) {
    return c;
  }
};

struct GRU : GRUCell<false> {
  static constexpr const char* kName = "gru";
  static constexpr bool kStep = true;
};
struct GRUProjected : GRUCell<true> {
  static constexpr const char* kName = "gru_projected";
  static constexpr bool kCuda = false, kHasPlain = false;
};

// The GRU as first published, the reset gate before the product: n = tanh(x_n + W_hn (r h)).
// Source: Cho et al., https://arxiv.org/abs/1406.1078
struct GRUBefore : CellDefaults {
  static constexpr const char* kName = "gru_before";
  static constexpr const char* kGateNames = "rzn";
  static constexpr int kGates = 3, kFirst = 2, kSaved = 3, kSavedFirst = 2;  // r, z; n
  static constexpr int kFactors = 1, kCarried = 1;                           // r h; z
  static constexpr bool kPassesH = true, kReadsH = true, kHeads = true, kHasPlain = false;

  template <class O, class V>
  static SK_CELL void forward_first(const V* x, const V* h, const O& o, V h_prev, const V* /*c*/, V* saved, V* q,
                                    V* carried) {
    q[0] = activate<Sigmoid>(o, x[0] + h[0], saved[0]) * recurrent_input(o, h_prev);
    carried[0] = activate<Sigmoid>(o, x[1] + h[1], saved[1]);
  }
  template <class O, class V>
  static SK_CELL V forward_second(const V* x, const V* h, const O& o, V h_prev, const V* carried, V* /*c*/, V* saved) {
    const V n = drop_candidate(o, activate<Tanh>(o, x[0] + h[0], saved[0]));
    return O::Arithmetic::fma(carried[0], h_prev - n, n);
  }
  template <class O, class V>
  static SK_CELL void backward_second(const V* saved, const O& o, V h_prev, const V* /*c*/, const V* /*c_prev*/, V dh,
                                      V* /*dc*/, V* d, V* d_second, V& direct) {
    using T = typename O::Arithmetic::T;
    const auto z = restore<Sigmoid>(o, saved[1]);
    const auto n = restore<Tanh>(o, saved[2]);
    d_second[0] = drop_candidate(o, dh * (T(1) - z.value)) * n.slope;
    d[1] = dh * (h_prev - drop_candidate(o, n.value)) * z.slope;
    direct = dh * z.value;
  }
  template <class O, class V>
  static SK_CELL void backward_first(const V* saved, const O& o, V h_prev, const V* /*c_prev*/, const V* dq, V* /*dc*/,
                                     V* d, V& direct, V* q) {
    const auto r = restore<Sigmoid>(o, saved[0]);
    q[0] = r.value * recurrent_input(o, h_prev);
    d[0] = dq[0] * recurrent_input(o, h_prev) * r.slope;
    direct = O::Arithmetic::fma(recurrent_input(o, dq[0]), r.value, direct);
  }
};

}  // namespace seqkernels
