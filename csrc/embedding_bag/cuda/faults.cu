// Reads the fault that kernels reported for a call.
#include "embedding_bag/cuda/bags.cuh"

namespace seqkernels {

using namespace bags_cuda;

BagFault read_bag_fault(BagFaultWord* fault, const BagForward& bags, void* stream) {
  BagFaultWord word = 0;
  read_back(&word, fault, sizeof(word), stream);
  if (word == 0) return {};
  fill_bytes(fault, 0, sizeof(word), stream);
  const uint64_t found = ~word;
  BagFault result{static_cast<BagFault::Kind>(found >> kFaultBits),
                  static_cast<int64_t>(found & ((uint64_t{1} << kFaultBits) - 1)), 0};
  const Bounds bounds = bounds_of(bags);
  const bool index = result.kind == BagFault::kIndex;
  const bool wide = index ? bags.shape.wide_indices : bags.shape.wide_offsets;
  const void* from = index ? bags.tables[0].indices : bounds.offsets.data;
  if (!index && result.position >= bounds.offsets.count) {
    result.value = bounds.N;
  } else if (wide) {
    read_back(&result.value, static_cast<const int64_t*>(from) + result.position, 8, stream);
  } else {
    int32_t value = 0;
    read_back(&value, static_cast<const int32_t*>(from) + result.position, 4, stream);
    result.value = value;
  }
  return result;
}

}  // namespace seqkernels
