// How a cell's passes become functions: one of each for every type of element.
#pragma once

#include "recurrent/backward.h"
#include "recurrent/forward.h"

namespace seqkernels::SEQKERNELS_ISA {

template <template <class> class Pass, template <class> class Cell, class Args>
void launch(const Args& args) {
  dispatch(args.dtype, [&](auto storage) {
    Pass<Cell<decltype(storage)>> pass(args);
    run_pass(pass);
  });
}

template <template <class> class Cell, template <class> class ForwardPass = Forward,
          template <class> class BackwardPass = Backward>
RecurrentKernels kernels_of() {
  return {launch<ForwardPass, Cell, ForwardArgs>, launch<BackwardPass, Cell, BackwardArgs>};
}

// One file for each, so that they compile side by side.
RecurrentKernels lstm_kernels(bool options);
RecurrentKernels lstm_coupled_kernels();
RecurrentKernels lstm_norm_kernels();
RecurrentKernels lstm_nested_kernels();
RecurrentKernels gru_kernels(bool options);
RecurrentKernels gru_before_kernels();
RecurrentKernels gru_norm_kernels();
RecurrentKernels gru_projected_kernels();
RecurrentKernels mgu_kernels();
RecurrentKernels mgu_before_kernels();
RecurrentKernels rnn_tanh_kernels(bool options);
RecurrentKernels rnn_relu_kernels(bool options);

}  // namespace seqkernels::SEQKERNELS_ISA
