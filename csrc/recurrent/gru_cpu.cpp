// GRU and its variants of one product a step.
#include "recurrent/kernels.h"

namespace seqkernels::SEQKERNELS_ISA {

RecurrentKernels gru_kernels(bool options) { return options ? kernels_of<GRUOptionsCell>() : kernels_of<GRUCell>(); }
RecurrentKernels gru_projected_kernels() { return kernels_of<GRUProjectedCell>(); }
RecurrentKernels mgu_kernels() { return kernels_of<MGUCell>(); }

}  // namespace seqkernels::SEQKERNELS_ISA
