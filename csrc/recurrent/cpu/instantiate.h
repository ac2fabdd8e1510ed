// How a cell's passes become functions: one for each storage type. Included by
// the file that CMake writes for a cell.
#pragma once

#include <type_traits>

#include "recurrent/cpu/backward.h"
#include "recurrent/cpu/forward.h"
#include "recurrent/cpu/kernels.h"
#include "recurrent/cpu/norm.h"

namespace seqkernels::SEQKERNELS_ISA {

template <template <class> class Pass, class C, With kWith, class Args>
void launch(const Args& args) {
  constexpr double kForwards = std::is_same_v<Args, ForwardArgs> ? 1 : 2.5;
  dispatch(args.dtype, [&](auto storage) {
    Pass<CellOn<C, decltype(storage), kWith>> pass(args);
    run_pass(pass, kForwards);
  });
}

template <class C, With kWith>
RecurrentKernels kernels_with() {
  if constexpr (C::kNormGroups > 0) {
    return {launch<NormForward, C, kWith, ForwardArgs>, launch<NormBackward, C, kWith, BackwardArgs>};
  } else {
    return {launch<Forward, C, kWith, ForwardArgs>, launch<Backward, C, kWith, BackwardArgs>};
  }
}

template <class C>
RecurrentKernels kernels_of(With with) {
  if constexpr (C::kHasPlain) {
    if (with == With::kNoOptions) return kernels_with<C, With::kNoOptions>();
  }
  static_cast<void>(with);
  return kernels_with<C, With::kOptions>();
}

}  // namespace seqkernels::SEQKERNELS_ISA

#define SEQKERNELS_INSTANTIATE(Cell)                \
  namespace seqkernels::SEQKERNELS_ISA {            \
  template RecurrentKernels kernels_of<Cell>(With); \
  }
