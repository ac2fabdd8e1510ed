// Layer-normalised cells.
#include "recurrent/kernels.h"
#include "recurrent/norm.h"

namespace seqkernels::SEQKERNELS_ISA {

RecurrentKernels lstm_norm_kernels() { return kernels_of<LSTMNormCell, NormForward, NormBackward>(); }
RecurrentKernels gru_norm_kernels() { return kernels_of<GRUNormCell, NormForward, NormBackward>(); }

}  // namespace seqkernels::SEQKERNELS_ISA
