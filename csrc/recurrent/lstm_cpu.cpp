// LSTM and its variants.
#include "recurrent/kernels.h"

namespace seqkernels::SEQKERNELS_ISA {

RecurrentKernels lstm_kernels(bool options) { return options ? kernels_of<LSTMOptionsCell>() : kernels_of<LSTMCell>(); }
RecurrentKernels lstm_coupled_kernels() { return kernels_of<LSTMCoupledCell>(); }

}  // namespace seqkernels::SEQKERNELS_ISA
