// Names for registration: torch.ops.<namespace> of the operators and the Python module. The namespace is seqkernels, or
//   seqkernels_emulated in the test module that runs the CUDA kernels on a CPU (tests/cuda_on_cpu). In that module the
//   CPU implementation of an operator launches its CUDA kernels;
//   a name of its own in a kernel of the Hugging Face Hub, which may be loaded beside other versions (cmake/hub.cmake).
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace seqkernels {

extern uint64_t schemas;  // hash of the schemas of all ops; library.cpp

// Each registers the implementations of an operator. library.cpp calls them, the only file that depends on the
// namespace.
using Library = torch::stable::detail::StableLibrary;
void implement_layers(Library& m);    // recurrent/recurrent.cpp
void implement_cells(Library& m);     // recurrent/cell.cpp
void implement_prepared(Library& m);  // recurrent/prepared.cpp
void implement_embedding_bag(Library& m);
void implement_attention(Library& m);
void implement_additive_attention(Library& m);
void implement_crf(Library& m);
void implement_ctc(Library& m);

}  // namespace seqkernels

#if defined(SEQKERNELS_EMULATE_CUDA)
#define SEQKERNELS_NAMESPACE seqkernels_emulated
#define SEQKERNELS_MODULE _emulated
#else
#ifndef SEQKERNELS_NAMESPACE
#define SEQKERNELS_NAMESPACE seqkernels
#endif
#define SEQKERNELS_MODULE _C
#endif

// The macros of torch join their arguments to names, so arguments that are macros are expanded first.
#define SEQKERNELS_OPS_IN(ops, m) STABLE_TORCH_LIBRARY(ops, m)
#define SEQKERNELS_OPS_IN_ON(ops, key, m) STABLE_TORCH_LIBRARY_IMPL(ops, key, m)
#define SEQKERNELS_OPS(m) SEQKERNELS_OPS_IN(SEQKERNELS_NAMESPACE, m)
#define SEQKERNELS_OPS_ON(key, m) SEQKERNELS_OPS_IN_ON(SEQKERNELS_NAMESPACE, key, m)
