// Elman networks: h' = tanh(x + h) or relu(x + h), of the pre-activations x and h.
// Source: Elman, "Finding Structure in Time", 1990; relu: Le, Jaitly and Hinton, https://arxiv.org/abs/1504.00941.
#pragma once

#include "recurrent/cells/cell.h"

namespace seqkernels {

template <class Activation>
struct RNNCell : CellDefaults {
  static constexpr const char* kGateNames = "n";
  static constexpr int kGates = 1, kFirst = 1, kSaved = 1;  // the activation
  static constexpr bool kSavesOutput = true, kHeads = true, kStep = true;

  template <class O, class V>
  static SK_CELL V forward(const V* x, const V* h, const O& o, V /*h_prev*/, V* /*c*/, V* saved) {
    using A = typename O::Arithmetic;
    const V pre = x[0] + h[0];
    const V value = Activation::template value<A>(clip_gate(o, pre));
    saved[0] = value;
    if constexpr (O::kAny) {  // tanh has slope 0 at the value 1, relu at the value 0
      const V flat = Activation::template slope<A>(V{});
      saved[0] = pre >= o.gate_clip || pre <= -o.gate_clip ? flat : value;
    }
    return value;
  }

  template <class O, class V>
  static SK_CELL void backward(const V* saved, const O& /*o*/, V /*h_prev*/, const V* /*c*/, const V* /*c_prev*/, V dh,
                               V* /*dc*/, StepGradient<V>& d) {
    d.x[0] = dh * Activation::template slope<typename O::Arithmetic>(saved[0]);
    d.direct = V{};
  }
};

struct RNNTanh : RNNCell<Tanh> {
  static constexpr const char* kName = "rnn_tanh";
};
struct RNNRelu : RNNCell<Relu> {
  static constexpr const char* kName = "rnn_relu";
};

}  // namespace seqkernels
