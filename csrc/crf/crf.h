// Linear-chain conditional random fields: the argument structs that operators fill and kernels read; includes no torch
// header.
//
// Dimensions: B sequences, T steps, K tags. The score of a path y of a sequence with steps t_0 < .. < t_n-1 is
//   start[y_0] + sum_s emissions[t_s][y_s] + sum_{s > 0} transitions[t_s][y_s-1][y_s] + end[y_n-1],
// log Z the logarithm of the sum of e^score over all paths. Steps that a mask excludes are skipped.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

struct CrfArgs {
  DType dtype;
  int64_t B, T, K;
  const void* emissions;  // [B, T, K], strides emissions_b, emissions_t, 1
  int64_t emissions_b, emissions_t;
  const void* transitions;  // [B, T, K, K] from, to; strides transitions_b, transitions_t (0: shared), K, 1
  int64_t transitions_b, transitions_t;
  const void *start, *end;       // [K]; or null
  const int64_t *steps, *first;  // the steps of sequence b are steps[first[b]] .. steps[first[b + 1] - 1]
  const int64_t* tags;           // [B, T], strides tags_b, tags_t; or null
  int64_t tags_b, tags_t;

  int64_t count(int64_t b) const { return first[b + 1] - first[b]; }
};

struct CrfForwardArgs {
  CrfArgs crf;
  void* alpha;    // [B, T, K] of the compute type: log of the sums over the paths to a tag, less their maximum
  double* log_z;  // [B]
  double* score;  // [B] of the tags; zeros without tags
};

struct CrfBackwardArgs {
  CrfArgs crf;
  const void* alpha;
  const double *dlog_z, *dscore;  // [B]
  void* demissions;               // [B, T, K] contiguous, zeros on entry
  void* dtransitions;   // [1 or B, 1 or T, K, K] contiguous, zeros on entry, as the strides of transitions; or null
  void *dstart, *dend;  // [K]; or null
};

struct CrfViterbiArgs {
  CrfArgs crf;
  int64_t paths;   // number of best paths per sequence
  int64_t* tags;   // [B, paths, T], -1 on entry
  double* scores;  // [B, paths]; -inf for paths that do not exist
};

struct CrfKernels {
  void (*forward)(const CrfForwardArgs&);
  void (*backward)(const CrfBackwardArgs&);
  void (*viterbi)(const CrfViterbiArgs&);
};

namespace portable {
CrfKernels crf_kernels();
}
namespace avx2 {
CrfKernels crf_kernels();
}
namespace avx512 {
CrfKernels crf_kernels();
}

}  // namespace seqkernels
