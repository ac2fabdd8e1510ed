// Selection of the instruction set of the CPU kernels: the best one that is built and supported by the processor,
// unless the environment variable SEQKERNELS_ISA or set_isa names another.
#pragma once

#include <string>
#include <vector>

namespace seqkernels {

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
std::vector<Isa> usable_isas();  // built and supported by this processor; the best one last
Isa current_isa();
bool has_vnni(Isa isa);                // whether the processor has dot products of int8 beside this instruction set
Isa set_isa(const std::string& name);  // returns the previous one; throws std::invalid_argument

}  // namespace seqkernels

// Returns function(args...) of the namespace of the current instruction set; every such namespace must define it:
// SEQKERNELS_RETURN_ON_CURRENT_ISA(recurrent_kernels, kind, options).
#ifdef SEQKERNELS_HAVE_AVX512
#define SEQKERNELS_IF_AVX512(function, ...) \
  if (current_isa() == Isa::kAvx512) return avx512::function(__VA_ARGS__)
#else
#define SEQKERNELS_IF_AVX512(function, ...) static_cast<void>(0)
#endif
#ifdef SEQKERNELS_HAVE_AVX2
#define SEQKERNELS_IF_AVX2(function, ...) \
  if (current_isa() == Isa::kAvx2) return avx2::function(__VA_ARGS__)
#else
#define SEQKERNELS_IF_AVX2(function, ...) static_cast<void>(0)
#endif
#define SEQKERNELS_RETURN_ON_CURRENT_ISA(function, ...) \
  SEQKERNELS_IF_AVX512(function, __VA_ARGS__);          \
  SEQKERNELS_IF_AVX2(function, __VA_ARGS__);            \
  return portable::function(__VA_ARGS__)
