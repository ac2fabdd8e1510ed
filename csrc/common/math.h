// Integer arithmetic on sizes. Always inlined, so that code compiled for one instruction set never calls a copy
// compiled for another.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SK_MATH __host__ __device__ __forceinline__ constexpr
#else
#define SK_MATH inline __attribute__((always_inline)) constexpr
#endif

namespace seqkernels {

SK_MATH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SK_MATH int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
SK_MATH int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
SK_MATH int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
// Start of part i when [0, total) is split into n nearly equal parts.
SK_MATH int64_t part(int64_t total, int64_t n, int64_t i) { return total * i / n; }

}  // namespace seqkernels
