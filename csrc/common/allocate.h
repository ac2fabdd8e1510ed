// Allocates tensors through torch's C interface, which takes half the time of new_empty: new_empty looks its operator
// up by name. Includes torch's stable ABI: not for kernels.
#pragma once

#include "common/check.h"

namespace seqkernels {

inline int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float32();
  }
}

struct DevicePlace {
  int32_t type, index;
  DevicePlace(int32_t of_type, int32_t of_index) : type(of_type), index(of_index) {}
  explicit DevicePlace(AtenTensorHandle t) {
    aoti_torch_get_device_type(t, &type);
    aoti_torch_get_device_index(t, &index);
  }
  static DevicePlace cpu() { return DevicePlace(aoti_torch_device_type_cpu(), 0); }
  bool operator!=(const DevicePlace& other) const { return type != other.type || index != other.index; }
};

// Returns an uninitialised tensor. `dtype` is a value of dtype_code.
inline Tensor allocate(DevicePlace place, int32_t dtype, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, place.type, place.index, &handle));
  return Tensor(handle);
}
// Returns a contiguous [rows, columns] tensor, or [columns] if rows is negative.
inline Tensor allocate(DevicePlace place, int32_t dtype, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  const int skip = rows < 0;
  return allocate(place, dtype, 2 - skip, sizes + skip, strides + skip);
}

// Returns an uninitialised contiguous tensor on the CPU. `transposed`: [B, H, T, D] is stored as [B, T, H, D].
inline Tensor allocate_cpu(ScalarType type, const Shape& sizes, bool transposed = false) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    if (__builtin_mul_overflow(stride, sizes[i] > 0 ? sizes[i] : 1, &stride)) {
      fail("the result must have fewer than 2^63 elements, got ", show(sizes));
    }
  }
  if (transposed) {
    strides[2] = sizes[1] * strides[2];
    strides[1] = sizes[3] > 0 ? sizes[3] : 1;
  }
  static const DevicePlace cpu = DevicePlace::cpu();
  return allocate(cpu, dtype_code(type), int64_t(sizes.size()), sizes.data(), strides.data());
}

// The type in which kernels compute: that of the tensor, or float32 for half types.
inline ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

}  // namespace seqkernels
