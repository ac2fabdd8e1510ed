// Checks of tensors that arrive through torch.ops, shared by the operators' host files. Includes torch's stable ABI:
// not for kernels.
//
// Errors read "<op>: <argument> must <condition>, got <value>".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/dtype.h"

namespace seqkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string show(const Shape& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}
inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline DType dtype_of(std::string_view op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(t.scalar_type()));
  }
}

inline void check_cpu(std::string_view op, std::string_view name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, ": ", name, " must be on the CPU, got a tensor on another device");
}
inline void check_dtype(std::string_view op, std::string_view name, const Tensor& t, ScalarType wanted) {
  if (t.scalar_type() != wanted) {
    fail(op, ": ", name, " must be ", dtype_name(wanted), ", got ", dtype_name(t.scalar_type()));
  }
}
inline void check_shape(std::string_view op, std::string_view name, const Tensor& t, const Shape& wanted) {
  if (shape_of(t) != wanted) fail(op, ": ", name, " must have shape ", show(wanted), ", got ", show(shape_of(t)));
}
// Requires `t` to be on the device of `like`.
inline void check_device(std::string_view op, std::string_view name, const Tensor& t, const Tensor& like) {
  if (t.is_cpu() != like.is_cpu() || (!t.is_cpu() && t.get_device_index() != like.get_device_index())) {
    if (like.is_cpu()) check_cpu(op, name, t);
    fail(op, ": ", name, " must be on the device of the other tensors, got a tensor on another");
  }
}
// Returns the tensor as kernels read it: on the device of `like`, with this dtype and shape, copied if not contiguous.
inline Tensor checked(std::string_view op, std::string_view name, const Tensor& t, ScalarType dtype, const Shape& shape,
                      const Tensor& like) {
  check_device(op, name, t, like);
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, shape);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor empty_like_dtype(const Tensor& like, const Shape& shape) { return torch::stable::new_empty(like, shape); }
inline Tensor zeros_like_dtype(const Tensor& like, const Shape& shape) { return torch::stable::new_zeros(like, shape); }

}  // namespace seqkernels
