// The device and stream on which torch runs the work of a tensor. Includes torch's stable ABI: not for kernels.
#pragma once

#include "common/check.h"
#if defined(SEQKERNELS_HAVE_CUDA) && !defined(SEQKERNELS_EMULATE_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace seqkernels {

#if defined(SEQKERNELS_HAVE_CUDA) && !defined(SEQKERNELS_EMULATE_CUDA)
struct OnDevice {
  const torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
};
#else
struct OnDevice {  // emulation: there is no device to select
  void* const stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};
#endif

}  // namespace seqkernels
