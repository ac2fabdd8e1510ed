// Shared by the op files of recurrent layers and cells.
#pragma once

#include <cstddef>
#include <string>

#include "common/check.h"
#include "recurrent/cuda/launch.h"
#include "recurrent/recurrent.h"

namespace seqkernels {

// The kernels of the instruction set in use. Defined in recurrent.cpp.
RecurrentKernels kernels(CellKind kind, bool options);

// Whether ops on x run on the CUDA launchers, and the call.
bool runs_on_cuda(const Tensor& x);
void run_on_cuda(const std::string& op, CellKind kind, const ForwardArgs& args, const CudaLayout& layout,
                 const Tensor& like);
void run_on_cuda(const std::string& op, CellKind kind, const BackwardArgs& args, const CudaLayout& layout,
                 const Tensor& like);

// Products of sizes up to this one fit int64_t. Larger tensors exist: empty and expanded ones.
constexpr int64_t kLargestSize = int64_t{1} << 40;
inline void check_size(const std::string& op, const char* name, int64_t size) {
  if (size > kLargestSize) fail(op, ": ", name, " must be at most ", kLargestSize, ", got ", size);
}

// T for each index of a pack.
template <class T, size_t>
using Repeat = T;

}  // namespace seqkernels
