// Additive attention: the argument structs that operators fill and kernels read; includes no torch header.
//
//   scores[b][i][j] = sum_h v[h] tanh(q[b][i][h] + k[b][j][h]), weights = softmax over the visible keys j,
//   out[b][i] = sum_j weights[b][i][j] value[b][j].
// Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015.
//
// Dimensions: B sequences, Tq queries, Tk keys, H hidden units, Dv columns of the values.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

struct AdditiveAttentionArgs {
  DType dtype;
  int64_t B, Tq, Tk, H, Dv;
  const void* q;      // [B, Tq, H] contiguous
  const void* k;      // [B, Tk, H] contiguous
  const void* value;  // [B, Tk, Dv] contiguous
  const void* v;      // [H]
  const bool* mask;   // [B, Tq, Tk], strides mask_b, mask_q, 1; true: visible; or null
  int64_t mask_b, mask_q;
  const int64_t* lengths;  // [B] number of keys, from 0 to Tk; or null
  const void* exp_k;       // [B, Tk, H] of the compute type, as AdditiveAttentionKernels::exp writes it; or null
  void* weights;           // [B, Tq, Tk] of the compute type; an input of backward

  int64_t keys(int64_t b) const { return lengths == nullptr ? Tk : lengths[b]; }
};

struct AdditiveAttentionForwardArgs {
  AdditiveAttentionArgs attention;
  void* out;  // [B, Tq, Dv]
};

struct AdditiveAttentionBackwardArgs {
  AdditiveAttentionArgs attention;
  const void* dout;      // [B, Tq, Dv] contiguous; or null
  const void* dweights;  // [B, Tq, Tk] of the compute type, contiguous; or null
  void *dq, *dk, *dvalue, *dv;
};

struct AdditiveAttentionKernels {
  void (*forward)(const AdditiveAttentionForwardArgs&);
  void (*backward)(const AdditiveAttentionBackwardArgs&);
  // e^(2 k) of rows [n, H]; zeros for a row with an element beyond the bound of the reciprocal form.
  void (*exp)(DType dtype, int64_t n, int64_t H, const void* k, void* to);
};

namespace portable {
AdditiveAttentionKernels additive_attention_kernels();
}
namespace avx2 {
AdditiveAttentionKernels additive_attention_kernels();
}
namespace avx512 {
AdditiveAttentionKernels additive_attention_kernels();
}

}  // namespace seqkernels
