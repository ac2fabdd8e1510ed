// memset to 0 and memcpy for tensors that may be empty: these have null pointers, which the functions of C do not
// allow. Always inlined, so that code compiled for one instruction set never calls a copy compiled for another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace seqkernels {

inline __attribute__((always_inline)) void zero_bytes(void* to, int64_t n) {
  if (n > 0) __builtin_memset(to, 0, static_cast<size_t>(n));
}
inline __attribute__((always_inline)) void copy_bytes(void* to, const void* from, int64_t n) {
  if (n > 0) __builtin_memcpy(to, from, static_cast<size_t>(n));
}

}  // namespace seqkernels
