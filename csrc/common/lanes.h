// Reductions over the lanes of a vector.
#pragma once

#include "common/simd.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class T>
SEQKERNELS_INLINE T sum_of_lanes(Native<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

}  // namespace seqkernels::SEQKERNELS_ISA
