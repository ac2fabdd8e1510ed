// Sizes of the tiles of attention's CPU kernels.
#pragma once

#include "attention/plan.h"
#include "common/gemm.h"
#include "common/tiles.h"

namespace seqkernels::SEQKERNELS_ISA {

using attention::kChunkKeys;
using attention::kKeys;
using attention::kRows;

}  // namespace seqkernels::SEQKERNELS_ISA
