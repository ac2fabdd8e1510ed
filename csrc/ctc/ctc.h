// Connectionist temporal classification: the argument structs that operators fill and kernels read; includes no torch
// header.
//
// A target l_0 .. l_L-1 is extended with blanks to the S = 2 L + 1 states blank, l_0, blank, l_1, .., blank. The loss
// is -log of the sum of prod_t p[t][state_t] over the paths of states that start in one of the first two states, end in
// one of the last two, and at each step stay, move by one, or move by two over a blank between different labels. Graves
// et al., "Connectionist Temporal Classification", 2006.
//
// Dimensions: B sequences, T steps, C classes, S states of the longest target, or of the columns of padded targets.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

struct CtcArgs {
  DType dtype;
  int64_t B, T, C, S;
  const void* log_probs;  // [T, B, C], strides probs_t, probs_b, 1
  int64_t probs_t, probs_b;
  const int64_t* targets;         // labels of sequence b from targets + starts[b]
  const int64_t* starts;          // [B]
  const int64_t *steps, *labels;  // [B] input and target lengths
  int64_t blank;

  int64_t states(int64_t b) const { return 2 * labels[b] + 1; }
};

struct CtcForwardArgs {
  CtcArgs ctc;
  void* alpha;   // [B, T, S] of the compute type: log of the sums over the paths to a state, less their maximum
  double* loss;  // [B]
};

struct CtcBackwardArgs {
  CtcArgs ctc;
  const void* alpha;
  const double* dloss;  // [B]; a sequence with 0 gets a zero gradient
  void* dlog_probs;     // [T, B, C] contiguous, zeros on entry
};

struct CtcKernels {
  void (*forward)(const CtcForwardArgs&);
  void (*backward)(const CtcBackwardArgs&);
};

namespace portable {
CtcKernels ctc_kernels();
}
namespace avx2 {
CtcKernels ctc_kernels();
}
namespace avx512 {
CtcKernels ctc_kernels();
}

}  // namespace seqkernels
