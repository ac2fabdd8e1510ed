// Storage types of the kernels and the type each computes in. Free of torch types.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace seqkernels {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Half types are stored as such and computed in float.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Half> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// Calls f with a value of the storage type: the one place where a runtime dtype becomes a type.
template <class F>
inline auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
  }
  throw std::logic_error("unknown dtype");
}

}  // namespace seqkernels
