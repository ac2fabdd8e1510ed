// Scaled-dot-product attention. The structs that operators fill and kernels read; free of torch.
//
// Dimensions: B sequences, Hq heads of queries, Hk of keys (head h reads keys h / (Hq / Hk)), Tq queries, Tk keys, D
// and Dv columns.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

// A tensor [B, H, T, D]; strides in elements. Packed rows have a stride of 0 from sequence to sequence.
struct AttentionTensor {
  void* data;
  int64_t b, h, t, d;
};

enum class MaskKind : int { kNone, kBool, kFloat };
enum class Causal : int { kNone, kUpperLeft, kLowerRight };  // as ops take it

// One sequence: where its rows begin in q and k, and how many exist.
struct AttentionSequence {
  int64_t q_begin, k_begin, q_length, k_length;
};

struct AttentionArgs {
  DType dtype;
  int64_t B, Hq, Hk, D, Dv;
  int64_t Tq, Tk;  // of the tensors: what lies between a length and these is zero; of packed rows not looked at
  bool packed;
  const AttentionSequence* sequences;  // [B]
  AttentionTensor q, k, v, out;
  void* lse;  // [B, Hq, Tq] of the compute type, strides lse_b, lse_h, 1
  int64_t lse_b, lse_h;

  MaskKind mask_kind;
  AttentionTensor mask;  // [B, Hq, Tq, Tk], stride 0 where it is broadcast
  const float* slopes;   // [B, Hq], stride slopes_b, 1; or null
  int64_t slopes_b;
  double scale, softcap;
  Causal causal;
  int64_t window_left, window_right;  // below 0: none
  double dropout_p;
  uint64_t seed;

  int64_t group() const { return Hq / Hk; }
};

// Gradients. Either those of the output or, where dweights is given, those of the weights: then there is no v.
struct AttentionBackwardArgs {
  AttentionArgs forward;
  AttentionTensor dout;      // [B, Hq, Tq, Dv]
  AttentionTensor dweights;  // [B, Hq, Tq, Tk]
  const void* dlse;          // as lse, or null
  AttentionTensor dq, dk, dv;
  void* dlse_out;  // as lse, where dweights is given
  void* dmask;     // contiguous, of the mask's shape: [mask_shape]; or null
  int64_t mask_shape[4];
};

struct AttentionKernels {
  void (*forward)(const AttentionArgs&);
  void (*weights)(const AttentionArgs&, void* weights);  // [B, Hq, Tq, Tk], zero where it is not written
  void (*backward)(const AttentionBackwardArgs&);
};

namespace portable {
AttentionKernels attention_kernels();
}
namespace avx2 {
AttentionKernels attention_kernels();
}
namespace avx512 {
AttentionKernels attention_kernels();
}

}  // namespace seqkernels
