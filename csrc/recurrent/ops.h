// What the op files of recurrent layers and cells share.
#pragma once

#include <cstddef>

#include "recurrent/recurrent.h"

namespace seqkernels {

// The kernels of the instruction set in use. Defined in recurrent.cpp.
RecurrentKernels kernels(CellKind kind, bool options);

// T, as often as a pack has indices.
template <class T, size_t>
using Repeat = T;

}  // namespace seqkernels
