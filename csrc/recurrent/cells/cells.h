// The cells of recurrent layers on vectors of hidden units. A cell says what it keeps and does one step each way; the
// time loop, the packed walk, the products and the threads are the same for all.
//
//   kGates      columns of W_ih per hidden unit
//   First       the gates whose product with h is made first; kUnits vectors of units share a panel, so that kUnits *
//               kGates vectors come of one register tile
//   Second      of a cell with two products in a row: the gates of the second, which is with what the first stage left
//   kSaved      vectors per unit kept for backward, beside y (and c)
//   kStates     h; h and c; h, c and s
//   kSeparate   the gradients of the two products differ: backward fills dx and dh, else dx alone serves both
//   kDirect     h_prev also reaches h without a product: backward gives that share of its gradient
//   kProjects   h may be a projection of what the cell returns
//
// forward: x and h are the two products with their biases; returns the new h. States are rounded to what is stored, so
// a chunk that starts from stored states goes on with the same bits. backward: dh, dc, ds are gradients of this step's
// states; dc and ds become those of the states before.
//
// Options (Extra) enter as arithmetic that is neutral where one is off; a cell on NoExtra has none of it.
#pragma once

#include "recurrent/cpu/layer.h"

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

struct Sigmoid {
  template <class T>
  static SEQKERNELS_INLINE Native<T> value(Native<T> x) {
    return sigmoid<T>(x);
  }
  template <class T>
  static SEQKERNELS_INLINE Native<T> slope(Native<T> y) {
    return sigmoid_slope<T>(y);
  }
  template <class V>
  static SEQKERNELS_INLINE V limit(const Extra<V>& e, V side) {
    return side > 0 ? e.sigmoid_high : e.sigmoid_low;
  }
};
struct Tanh {
  template <class T>
  static SEQKERNELS_INLINE Native<T> value(Native<T> x) {
    return tanh<T>(x);
  }
  template <class T>
  static SEQKERNELS_INLINE Native<T> slope(Native<T> y) {
    return tanh_slope<T>(y);
  }
  template <class V>
  static SEQKERNELS_INLINE V limit(const Extra<V>& e, V side) {
    return side > 0 ? e.tanh_high : -e.tanh_high;
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

template <class V>
SEQKERNELS_INLINE V limited(V x, V limit) {  // NaN stays NaN
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// A sigmoid or tanh and how its value is kept for backward: one at the limit of gate_clip, where no gradient passes, as
// 2 or -2, which say which limit.
template <class Activation, class T>
SEQKERNELS_INLINE Native<T> activate(const NoExtra&, Native<T> x, Native<T>& kept) {
  return kept = Activation::template value<T>(x);
}
template <class Activation, class T>
SEQKERNELS_INLINE Native<T> activate(const Extra<Native<T>>& e, Native<T> x, Native<T>& kept) {
  const Native<T> value = Activation::template value<T>(limited(x, e.gate_clip));
  kept = x >= e.gate_clip ? broadcast(T(2)) : x <= -e.gate_clip ? broadcast(T(-2)) : value;
  return value;
}
// Its value and slope from what was kept.
template <class V>
struct Kept {
  V value, slope;
};
template <class Activation, class T>
SEQKERNELS_INLINE Kept<Native<T>> reopen(const NoExtra&, Native<T> kept) {
  return {kept, Activation::template slope<T>(kept)};
}
template <class Activation, class T>
SEQKERNELS_INLINE Kept<Native<T>> reopen(const Extra<Native<T>>& e, Native<T> kept) {
  const auto at_limit = kept * kept > T(2);
  return {at_limit ? Activation::limit(e, kept) : kept, at_limit ? Native<T>{} : Activation::template slope<T>(kept)};
}

// The other options, each nothing in a plain layer.
template <class V>
SEQKERNELS_INLINE V candidate(const NoExtra&, V g) {
  return g;
}
template <class V>
SEQKERNELS_INLINE V candidate(const Extra<V>& e, V g) {
  return g * e.candidate;
}
template <class V>
SEQKERNELS_INLINE V fed(const NoExtra&, V h) {
  return h;
}
template <class V>
SEQKERNELS_INLINE V fed(const Extra<V>& e, V h) {
  return h * e.fed;
}
template <class V>
SEQKERNELS_INLINE V peephole(const NoExtra&, int, V, V x) {
  return x;
}
template <class V>
SEQKERNELS_INLINE V peephole(const Extra<V>& e, int k, V c, V x) {
  return fma(e.peephole[k], c, x);
}
template <class V>
SEQKERNELS_INLINE V clip_cell(const NoExtra&, V c) {
  return c;
}
template <class V>
SEQKERNELS_INLINE V clip_cell(const Extra<V>& e, V c) {
  return limited(c, e.cell_clip);
}

template <class V>
SEQKERNELS_INLINE V through_clip(const Extra<V>& e, V unclipped, V d) {  // NaN stays NaN
  d = unclipped >= e.cell_clip ? V{} : d;
  return unclipped <= -e.cell_clip ? V{} : d;
}
// The c that h was made of, from the c that was kept: the same, unless zoneout may have held it back.
template <class S, class V>
SEQKERNELS_INLINE V before_zoneout(const Extra<V>& e, V c, V unclipped) {
  return e.zoneout_c == V{} ? c : rounded<S>(clip_cell(e, unclipped));
}

template <class V>
struct StepGradient {
  V x[4], h[4];   // of the pre-activations, as the two products see them
  V direct;       // of h_prev, not by way of a product
  V peephole[3];  // what this token adds to those
};

template <class S, class Extras_>
struct CellBase {
  using Storage = S;
  using T = Compute<S>;
  using V = Native<T>;
  using Extras = typename Extras_::template Of<V>;
  using E = Extras;
  static constexpr bool kOptions = Extras_::kOptions;
  static constexpr bool kSeparate = false, kDirect = kOptions, kProjects = false, kTwoStages = false, kNorm = false;
  static constexpr bool kReadsH = false;  // backward reads the h that a step started from
  static constexpr bool kSecondIsInner = false;
  static constexpr int kPeepholes = 0;
};
struct Plain {
  static constexpr bool kOptions = false;
  template <class V>
  using Of = NoExtra;
};
struct WithOptions {
  static constexpr bool kOptions = true;
  template <class V>
  using Of = Extra<V>;
};

// Gates [kGate, kGate + kGates) of W_ih and W_hh.
template <int kGate_, int kGates_, int kUnits_>
struct StageOf {
  static constexpr int kGate = kGate_, kGates = kGates_, kUnits = kUnits_;
};

// What keeps the last h or c (zoneout), and the share of a gradient that goes on.
template <class S, class V>
SEQKERNELS_INLINE V zoned(V keep, V before, V now) {
  return rounded<S>(fma(keep, before - now, now));
}

// c = sigmoid(f) c' + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c); gates i, f, g, o.
// Source: Hochreiter and Schmidhuber, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000; peepholes: Gers and
// Schmidhuber, 2000; coupled, f = 1 - i and gates i, g, o: Greff et al., https://arxiv.org/abs/1503.04069.
template <class S, class Extras_, bool kCoupled>
struct LSTMCellOf : CellBase<S, Extras_> {
  using Base = CellBase<S, Extras_>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = kCoupled ? 3 : 4, kSaved = kGates, kStates = 2, kPeepholes = kGates - 1;
  static constexpr bool kProjects = true;
  static constexpr int kF = 1, kG = kCoupled ? 1 : 2, kO = kCoupled ? 2 : 3;  // i is gate 0
  using First = StageOf<0, kGates, 1>;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, const E& e, V /*h_prev*/, V& c, V* saved) {
    const V i = activate<Sigmoid, T>(e, peephole(e, 0, c, x[0] + h[0]), saved[0]);
    V f;
    if constexpr (kCoupled) {
      f = T(1) - i;
    } else {
      f = activate<Sigmoid, T>(e, peephole(e, 1, c, x[kF] + h[kF]), saved[kF]);
    }
    const V g = candidate(e, activate<Tanh, T>(e, x[kG] + h[kG], saved[kG]));
    const V now = rounded<S>(clip_cell(e, fma(f, c, i * g)));
    const V o = activate<Sigmoid, T>(e, peephole(e, kPeepholes - 1, now, x[kO] + h[kO]), saved[kO]);
    if constexpr (Base::kOptions) {
      c = zoned<S>(e.zoneout_c, c, now);
    } else {
      c = now;
    }
    return o * tanh<T>(now);
  }

  static SEQKERNELS_INLINE void backward(const V* saved, const E& e, V /*h*/, V /*h_prev*/, V c, V c_prev, V dh, V& dc,
                                         StepGradient<V>& d) {
    const auto i = reopen<Sigmoid, T>(e, saved[0]), o = reopen<Sigmoid, T>(e, saved[kO]);
    Kept<V> f;
    if constexpr (kCoupled) {
      f.value = T(1) - i.value;
    } else {
      f = reopen<Sigmoid, T>(e, saved[kF]);
    }
    const auto g = reopen<Tanh, T>(e, saved[kG]);
    V dc_prev = {};
    V now = c, unclipped;
    if constexpr (Base::kOptions) {
      unclipped = fma(f.value, c_prev, i.value * candidate(e, g.value));
      now = before_zoneout<S>(e, c, unclipped);
      dc_prev = dc * e.zoneout_c;
      dc = dc - dc_prev;
    }
    const V tanh_c = tanh<T>(now);
    d.x[kO] = dh * tanh_c * o.slope;
    dc = fma(dh * o.value, tanh_slope<T>(tanh_c), dc);
    if constexpr (Base::kOptions) {
      dc = fma(d.x[kO], e.peephole[kPeepholes - 1], dc);
      d.peephole[kPeepholes - 1] = d.x[kO] * now;
      dc = through_clip(e, unclipped, dc);
    }
    if constexpr (kCoupled) {
      d.x[0] = dc * (candidate(e, g.value) - c_prev) * i.slope;
    } else {
      d.x[0] = dc * candidate(e, g.value) * i.slope;
      d.x[kF] = dc * c_prev * f.slope;
    }
    d.x[kG] = candidate(e, dc * i.value) * g.slope;
    dc = dc * f.value;
    if constexpr (Base::kOptions) {
      for (int k = 0; k < kPeepholes - 1; ++k) {
        dc = fma(d.x[k], e.peephole[k], dc);
        d.peephole[k] = d.x[k] * c_prev;
      }
      dc = dc + dc_prev;
      d.direct = V{};
    }
  }

  // What was projected.
  static SEQKERNELS_INLINE V output(const V* saved, const E& e, V c, V c_prev) {
    if constexpr (Base::kOptions) {
      const V i = reopen<Sigmoid, T>(e, saved[0]).value, g = candidate(e, reopen<Tanh, T>(e, saved[kG]).value);
      const V f = kCoupled ? T(1) - i : reopen<Sigmoid, T>(e, saved[kF]).value;
      c = before_zoneout<S>(e, c, fma(f, c_prev, i * g));
    }
    return reopen<Sigmoid, T>(e, saved[kO]).value * tanh<T>(c);
  }
};
template <class S>
using LSTMCell = LSTMCellOf<S, Plain, false>;
template <class S>
using LSTMOptionsCell = LSTMCellOf<S, WithOptions, false>;
template <class S>
using LSTMCoupledCell = LSTMCellOf<S, WithOptions, true>;

// h = (1 - z) n + z h',  r = sigmoid(.), z = sigmoid(.), n = tanh(x_n + r h_n): torch's GRU, the reset gate after the
// product. Source: Cho et al., 2014; this variant: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
// Projected: h is a projection of c = (1 - z) n + z c', as in Sak, Senior and Beaufays,
// https://arxiv.org/abs/1402.1128.
template <class S, class Extras_, bool kProjected>
struct GRUCellOf : CellBase<S, Extras_> {
  using Base = CellBase<S, Extras_>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = 3, kSaved = 4, kStates = kProjected ? 2 : 1;  // r, z, n and h_n, which r multiplied
  static constexpr bool kSeparate = true, kDirect = true, kProjects = kProjected;
  static constexpr bool kReadsH = !kProjected;
  using First = StageOf<0, 3, 1>;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, const E& e, V h_prev, V& c, V* saved) {
    const V r = activate<Sigmoid, T>(e, x[0] + h[0], saved[0]);
    const V z = activate<Sigmoid, T>(e, x[1] + h[1], saved[1]);
    const V n = candidate(e, activate<Tanh, T>(e, fma(r, h[2], x[2]), saved[2]));
    saved[3] = h[2];
    if constexpr (kProjected) return c = rounded<S>(fma(z, c - n, n));
    return fma(z, h_prev - n, n);
  }

  static SEQKERNELS_INLINE void backward(const V* saved, const E& e, V /*h*/, V h_prev, V /*c*/, V c_prev, V dh, V& dc,
                                         StepGradient<V>& d) {
    const auto r = reopen<Sigmoid, T>(e, saved[0]), z = reopen<Sigmoid, T>(e, saved[1]);
    const auto n = reopen<Tanh, T>(e, saved[2]);
    const V before = kProjected ? c_prev : h_prev;
    if constexpr (kProjected) dh = dh + dc;
    d.x[2] = candidate(e, dh * (T(1) - z.value)) * n.slope;
    d.x[1] = dh * (before - candidate(e, n.value)) * z.slope;
    d.x[0] = d.x[2] * saved[3] * r.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1];
    d.h[2] = d.x[2] * r.value;
    if constexpr (kProjected) {
      dc = dh * z.value;
      d.direct = V{};
    } else {
      d.direct = dh * z.value;
    }
  }

  static SEQKERNELS_INLINE V output(const V* /*saved*/, const E& /*e*/, V c, V /*c_prev*/) { return c; }
};
template <class S>
using GRUCell = GRUCellOf<S, Plain, false>;
template <class S>
using GRUOptionsCell = GRUCellOf<S, WithOptions, false>;
template <class S>
using GRUProjectedCell = GRUCellOf<S, WithOptions, true>;

// h = (1 - f) h' + f n,  f = sigmoid(.), n = tanh(x_n + f h_n): the minimal gated unit with its gate after the product.
// Source: Zhou et al., https://arxiv.org/abs/1603.09420
template <class S>
struct MGUCell : CellBase<S, WithOptions> {
  using Base = CellBase<S, WithOptions>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = 2, kSaved = 3, kStates = 1;  // f, n and h_n, which f multiplied
  static constexpr bool kSeparate = true, kReadsH = true;
  using First = StageOf<0, 2, 2>;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, const E& e, V h_prev, V& /*c*/, V* saved) {
    const V f = activate<Sigmoid, T>(e, x[0] + h[0], saved[0]);
    const V n = candidate(e, activate<Tanh, T>(e, fma(f, h[1], x[1]), saved[1]));
    saved[2] = h[1];
    return fma(f, n - h_prev, h_prev);
  }

  static SEQKERNELS_INLINE void backward(const V* saved, const E& e, V /*h*/, V h_prev, V /*c*/, V /*c_prev*/, V dh,
                                         V& /*dc*/, StepGradient<V>& d) {
    const auto f = reopen<Sigmoid, T>(e, saved[0]);
    const auto n = reopen<Tanh, T>(e, saved[1]);
    d.x[1] = candidate(e, dh * f.value) * n.slope;
    d.x[0] = fma(d.x[1], saved[2], dh * (candidate(e, n.value) - h_prev)) * f.slope;
    d.h[0] = d.x[0];
    d.h[1] = d.x[1] * f.value;
    d.direct = dh * (T(1) - f.value);
  }
};

// h = tanh(.) or relu(.). Source: Elman, "Finding Structure in Time", 1990.
template <class S, class Activation, class Extras_>
struct RNNCellOf : CellBase<S, Extras_> {
  using Base = CellBase<S, Extras_>;
  using typename Base::E, typename Base::T, typename Base::V;
  // y tells all, unless options hide it.
  static constexpr int kGates = 1, kSaved = Base::kOptions ? 1 : 0, kStates = 1;
  using First = StageOf<0, 1, 4>;

  static SEQKERNELS_INLINE V forward(const V* x, const V* h, const E& e, V /*h_prev*/, V& /*c*/, V* saved) {
    const V pre = x[0] + h[0];
    if constexpr (Base::kOptions) {
      const V value = Activation::template value<T>(limited(pre, e.gate_clip));
      // A slope of zero is that of 1 for tanh, and of 0 for relu.
      const V flat = broadcast(T(Activation::template slope<T>(V{})[0]));
      saved[0] = pre >= e.gate_clip || pre <= -e.gate_clip ? flat : value;
      return value;
    } else {
      return Activation::template value<T>(pre);
    }
  }

  static SEQKERNELS_INLINE void backward(const V* saved, const E& /*e*/, V h, V /*h_prev*/, V /*c*/, V /*c_prev*/, V dh,
                                         V& /*dc*/, StepGradient<V>& d) {
    d.x[0] = dh * Activation::template slope<T>(Base::kOptions ? saved[0] : h);
    d.direct = V{};
  }
};
template <class S>
using RNNTanhCell = RNNCellOf<S, Tanh, Plain>;
template <class S>
using RNNReluCell = RNNCellOf<S, Relu, Plain>;
template <class S>
using RNNTanhOptionsCell = RNNCellOf<S, Tanh, WithOptions>;
template <class S>
using RNNReluOptionsCell = RNNCellOf<S, Relu, WithOptions>;

// ---- cells of two products: the second is with what the first stage leaves, q ----
//
//   kFactors         vectors q per unit, each with weights of its own
//   kCarried         vectors that the second stage needs of the first
//   kSavedFirst      of kSaved, those that the first stage makes
//   kSecondIsInner   the second stage has its own gates and weights (inner_*) and no share of the input

// h = (1 - z) n + z h',  n = tanh(x_n + W_hn (r h')): the GRU as it was first written.
// Source: Cho et al., https://arxiv.org/abs/1406.1078
template <class S>
struct GRUBeforeCell : CellBase<S, WithOptions> {
  using Base = CellBase<S, WithOptions>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = 3, kSaved = 3, kSavedFirst = 2, kStates = 1;  // r, z; n
  static constexpr int kFactors = 1, kCarried = 1;                            // z
  static constexpr bool kTwoStages = true, kSecondIsInner = false, kReadsH = true;
  using First = StageOf<0, 2, 2>;
  using Second = StageOf<2, 1, 4>;

  static SEQKERNELS_INLINE void first(const V* x, const V* h, const E& e, V h_prev, V /*c*/, V* saved, V* q,
                                      V* carried) {
    q[0] = activate<Sigmoid, T>(e, x[0] + h[0], saved[0]) * fed(e, h_prev);
    carried[0] = activate<Sigmoid, T>(e, x[1] + h[1], saved[1]);
  }
  static SEQKERNELS_INLINE V second(const V* x, const V* h, const E& e, V h_prev, const V* carried, V& /*c*/, V& /*s*/,
                                    V* saved) {
    const V n = candidate(e, activate<Tanh, T>(e, x[0] + h[0], saved[0]));
    return fma(carried[0], h_prev - n, n);
  }
  // d: gradients of the first stage's gates as far as they are known here; d_second: of the second stage's.
  static SEQKERNELS_INLINE void backward_second(const V* saved, const E& e, V h_prev, V /*c*/, V /*s*/, V /*s_prev*/,
                                                V dh, V& /*dc*/, V& /*ds*/, V* d, V* d_second, V& direct) {
    const auto z = reopen<Sigmoid, T>(e, saved[1]);
    const auto n = reopen<Tanh, T>(e, saved[2]);
    d_second[0] = candidate(e, dh * (T(1) - z.value)) * n.slope;
    d[1] = dh * (h_prev - candidate(e, n.value)) * z.slope;
    direct = dh * z.value;
  }
  static SEQKERNELS_INLINE void backward_first(const V* saved, const E& e, V h_prev, V /*c_prev*/, const V* dq,
                                               V& /*dc*/, V* d, V& direct, V* q) {
    const auto r = reopen<Sigmoid, T>(e, saved[0]);
    q[0] = r.value * fed(e, h_prev);
    d[0] = dq[0] * fed(e, h_prev) * r.slope;
    direct = fma(fed(e, dq[0]), r.value, direct);
  }
};

// h = (1 - f) h' + f n,  n = tanh(x_n + W_hn (f h')). Source: Zhou et al., https://arxiv.org/abs/1603.09420
template <class S>
struct MGUBeforeCell : CellBase<S, WithOptions> {
  using Base = CellBase<S, WithOptions>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = 2, kSaved = 2, kSavedFirst = 1, kStates = 1;  // f; n
  static constexpr int kFactors = 1, kCarried = 1;                            // f
  static constexpr bool kTwoStages = true, kSecondIsInner = false, kReadsH = true;
  using First = StageOf<0, 1, 4>;
  using Second = StageOf<1, 1, 4>;

  static SEQKERNELS_INLINE void first(const V* x, const V* h, const E& e, V h_prev, V /*c*/, V* saved, V* q,
                                      V* carried) {
    carried[0] = activate<Sigmoid, T>(e, x[0] + h[0], saved[0]);
    q[0] = carried[0] * fed(e, h_prev);
  }
  static SEQKERNELS_INLINE V second(const V* x, const V* h, const E& e, V h_prev, const V* carried, V& /*c*/, V& /*s*/,
                                    V* saved) {
    const V n = candidate(e, activate<Tanh, T>(e, x[0] + h[0], saved[0]));
    return fma(carried[0], n - h_prev, h_prev);
  }
  // d[0] is f's gradient by way of h alone; what comes by way of q is added later.
  static SEQKERNELS_INLINE void backward_second(const V* saved, const E& e, V h_prev, V /*c*/, V /*s*/, V /*s_prev*/,
                                                V dh, V& /*dc*/, V& /*ds*/, V* d, V* d_second, V& direct) {
    const auto f = reopen<Sigmoid, T>(e, saved[0]);
    const auto n = reopen<Tanh, T>(e, saved[1]);
    d_second[0] = candidate(e, dh * f.value) * n.slope;
    d[0] = dh * (candidate(e, n.value) - h_prev) * f.slope;
    direct = dh * (T(1) - f.value);
  }
  static SEQKERNELS_INLINE void backward_first(const V* saved, const E& e, V h_prev, V /*c_prev*/, const V* dq,
                                               V& /*dc*/, V* d, V& direct, V* q) {
    const auto f = reopen<Sigmoid, T>(e, saved[0]);
    q[0] = f.value * fed(e, h_prev);
    d[0] = fma(dq[0] * fed(e, h_prev), f.slope, d[0]);
    direct = fma(fed(e, dq[0]), f.value, direct);
  }
};

// An LSTM whose c is the output of another LSTM: of a = i tanh(g) as its input and b = f c' as its h.
// Source: Moniz and Krueger, https://arxiv.org/abs/1801.10308
template <class S>
struct LSTMNestedCell : CellBase<S, WithOptions> {
  using Base = CellBase<S, WithOptions>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = 4, kSaved = 8, kSavedFirst = 4, kStates = 3;  // i, f, g, o; the inner i, f, g, o
  static constexpr int kFactors = 2, kCarried = 1;                            // o
  static constexpr bool kTwoStages = true, kSecondIsInner = true;
  using First = StageOf<0, 4, 1>;
  using Second = StageOf<0, 4, 1>;

  static SEQKERNELS_INLINE void first(const V* x, const V* h, const E& e, V /*h_prev*/, V c, V* saved, V* q,
                                      V* carried) {
    const V i = activate<Sigmoid, T>(e, x[0] + h[0], saved[0]), f = activate<Sigmoid, T>(e, x[1] + h[1], saved[1]);
    q[0] = i * candidate(e, activate<Tanh, T>(e, x[2] + h[2], saved[2]));
    q[1] = f * c;
    carried[0] = activate<Sigmoid, T>(e, x[3] + h[3], saved[3]);
  }
  static SEQKERNELS_INLINE V second(const V* /*x*/, const V* h, const E& /*e*/, V /*h_prev*/, const V* carried, V& c,
                                    V& s, V* saved) {
    saved[0] = sigmoid<T>(h[0]);
    saved[1] = sigmoid<T>(h[1]);
    saved[2] = tanh<T>(h[2]);
    saved[3] = sigmoid<T>(h[3]);
    s = rounded<S>(fma(saved[1], s, saved[0] * saved[2]));
    c = rounded<S>(saved[3] * tanh<T>(s));
    return carried[0] * tanh<T>(c);
  }
  static SEQKERNELS_INLINE void backward_second(const V* saved, const E& e, V /*h_prev*/, V c, V s, V s_prev, V dh,
                                                V& dc, V& ds, V* d, V* d_second, V& direct) {
    const V *inner = saved + 4, tanh_c = tanh<T>(c), tanh_s = tanh<T>(s);
    const auto o = reopen<Sigmoid, T>(e, saved[3]);
    d[3] = dh * tanh_c * o.slope;
    dc = fma(dh * o.value, tanh_slope<T>(tanh_c), dc);
    d_second[3] = dc * tanh_s * sigmoid_slope<T>(inner[3]);
    ds = fma(dc * inner[3], tanh_slope<T>(tanh_s), ds);
    d_second[0] = ds * inner[2] * sigmoid_slope<T>(inner[0]);
    d_second[1] = ds * s_prev * sigmoid_slope<T>(inner[1]);
    d_second[2] = ds * inner[0] * tanh_slope<T>(inner[2]);
    ds = ds * inner[1];
    direct = V{};
  }
  static SEQKERNELS_INLINE void backward_first(const V* saved, const E& e, V /*h_prev*/, V c_prev, const V* dq, V& dc,
                                               V* d, V& /*direct*/, V* q) {
    const auto i = reopen<Sigmoid, T>(e, saved[0]), f = reopen<Sigmoid, T>(e, saved[1]);
    const auto g = reopen<Tanh, T>(e, saved[2]);
    q[0] = i.value * candidate(e, g.value);
    q[1] = f.value * c_prev;
    d[0] = dq[0] * candidate(e, g.value) * i.slope;
    d[1] = dq[1] * c_prev * f.slope;
    d[2] = candidate(e, dq[0] * i.value) * g.slope;
    dc = dq[1] * f.value;
  }
};

// ---- cells whose two products are normalised over all units (layer normalisation) ----
// Source: Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450
//
//   kGroups     sets of gates that are normalised together; group_of(gate)
//   kValues     of kSaved, those that the cell keeps; the normalised shares of x and of h follow
//   kNormC      c is normalised on its way to h: forward stops at c and o, and backward starts from the gradient of c

// An LSTM with h = o tanh(norm(c)).
template <class S>
struct LSTMNormCell : CellBase<S, WithOptions> {
  using Base = CellBase<S, WithOptions>;
  using typename Base::E, typename Base::T, typename Base::V;
  static constexpr int kGates = 4, kSaved = 12, kValues = 4, kStates = 2, kGroups = 1;
  static constexpr bool kSeparate = true, kNorm = true, kNormC = true;
  using First = StageOf<0, 4, 1>;
  static constexpr int group_of(int /*gate*/) { return 0; }

  // Returns c, before zoneout; saved: i, f, g, o.
  static SEQKERNELS_INLINE V forward(const V* x, const V* h, const E& e, V /*h_prev*/, V& c, V* saved) {
    const V i = activate<Sigmoid, T>(e, x[0] + h[0], saved[0]), f = activate<Sigmoid, T>(e, x[1] + h[1], saved[1]);
    const V g = candidate(e, activate<Tanh, T>(e, x[2] + h[2], saved[2]));
    activate<Sigmoid, T>(e, x[3] + h[3], saved[3]);
    return rounded<S>(clip_cell(e, fma(f, c, i * g)));
  }
  static SEQKERNELS_INLINE V unclipped(const V* saved, const E& e, V c_prev) {
    const V i = reopen<Sigmoid, T>(e, saved[0]).value, f = reopen<Sigmoid, T>(e, saved[1]).value;
    return fma(f, c_prev, i * candidate(e, reopen<Tanh, T>(e, saved[2]).value));
  }
  // dc: gradient of c before zoneout; becomes that of c_prev by way of f. d[3] is there already.
  static SEQKERNELS_INLINE void backward(const V* saved, const E& e, V c_prev, V& dc, V* d) {
    const auto i = reopen<Sigmoid, T>(e, saved[0]), f = reopen<Sigmoid, T>(e, saved[1]);
    const auto g = reopen<Tanh, T>(e, saved[2]);
    const V whole = unclipped(saved, e, c_prev);
    dc = through_clip(e, whole, dc);
    d[0] = dc * candidate(e, g.value) * i.slope;
    d[1] = dc * c_prev * f.slope;
    d[2] = candidate(e, dc * i.value) * g.slope;
    dc = dc * f.value;
  }
};

// torch's GRU; gates r and z are normalised together, n for itself.
template <class S>
struct GRUNormCell : GRUOptionsCell<S> {
  static constexpr int kSaved = 9, kValues = 3, kGroups = 2;
  static constexpr bool kNorm = true, kNormC = false;
  static constexpr int group_of(int gate) { return gate == 2; }
};

}  // namespace seqkernels::SEQKERNELS_ISA
