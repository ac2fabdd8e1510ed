// The CPU kernels of one cell. Each cell is instantiated in a file of its own,
// which CMake writes from cells/list.h, so that cells compile in parallel.
#pragma once

#include "recurrent/cpu/arithmetic.h"
#include "recurrent/recurrent.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class C>
RecurrentKernels kernels_of(With with);

}  // namespace seqkernels::SEQKERNELS_ISA
