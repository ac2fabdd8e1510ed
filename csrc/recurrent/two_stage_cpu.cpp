// Cells of two products a step.
#include "recurrent/kernels.h"

namespace seqkernels::SEQKERNELS_ISA {

RecurrentKernels gru_before_kernels() { return kernels_of<GRUBeforeCell>(); }
RecurrentKernels mgu_before_kernels() { return kernels_of<MGUBeforeCell>(); }
RecurrentKernels lstm_nested_kernels() { return kernels_of<LSTMNestedCell>(); }

}  // namespace seqkernels::SEQKERNELS_ISA
