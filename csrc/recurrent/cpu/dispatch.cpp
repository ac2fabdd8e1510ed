// The CPU kernels of a kind of cell.
#include "recurrent/cpu/kernels.h"

namespace seqkernels::SEQKERNELS_ISA {

RecurrentKernels recurrent_kernels(CellKind kind, bool options) {
  return with_cell(
      kind, [options](auto cell) { return kernels_of<decltype(cell)>(options ? With::kOptions : With::kNoOptions); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
