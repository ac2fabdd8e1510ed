// Library names for operator registration: torch.ops.seqkernels, or torch.ops.seqkernels_emulated in the test module
// that runs the CUDA kernels on a CPU (tests/cuda_on_cpu). In that module the CPU implementation of an operator
// launches its CUDA kernels.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(SEQKERNELS_EMULATE_CUDA)
#define SEQKERNELS_OPS(m) STABLE_TORCH_LIBRARY(seqkernels_emulated, m)
#define SEQKERNELS_OPS_ON(key, m) STABLE_TORCH_LIBRARY_IMPL(seqkernels_emulated, key, m)
#define SEQKERNELS_MODULE _emulated
#else
#define SEQKERNELS_OPS(m) STABLE_TORCH_LIBRARY(seqkernels, m)
#define SEQKERNELS_OPS_ON(key, m) STABLE_TORCH_LIBRARY_IMPL(seqkernels, key, m)
#define SEQKERNELS_MODULE _C
#endif
