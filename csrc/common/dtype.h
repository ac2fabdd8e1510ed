// Storage types of the kernels and the type each one computes in. Includes no torch header.
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

// The compute type of a storage type: half types compute in float, the others in themselves.
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

// Calls f with a value of the storage type. The only place that turns a runtime dtype into a compile-time type.
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
