// Where the ops of this binary are registered: torch.ops.seqkernels, or, in the test module that runs the CUDA kernels
// on a CPU (tests/cuda_on_cpu), torch.ops.seqkernels_emulated. There the CPU implementation of an op is its CUDA one.
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
