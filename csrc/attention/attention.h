// Scaled-dot-product attention: the argument structs that operators fill and kernels read; includes no torch header.
//
// Dimensions: B sequences, Hq query heads, Hk key heads (query head h reads key head h / (Hq / Hk)), Tq queries, Tk
// keys, D and Dv columns.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkernels {

// A tensor [B, H, T, D]; strides in elements. With packed rows, the stride between sequences is 0.
struct AttentionTensor {
  void* data;
  int64_t b, h, t, d;
};

enum class MaskKind : int { kNone, kBool, kFloat };
enum class Causal : int { kNone, kUpperLeft, kLowerRight };  // numbered as in the op schemas

// One sequence: the first row in q and k, and the number of rows.
struct AttentionSequence {
  int64_t q_begin, k_begin, q_length, k_length;
};

struct AttentionArgs {
  DType dtype;
  int64_t B, Hq, Hk, D, Dv;
  int64_t Tq, Tk;  // of the tensors; outputs are zero past a sequence's length; unused with packed rows
  bool packed;
  const AttentionSequence* sequences;  // [B]
  AttentionTensor q, k, v, out;
  AttentionTensor out_low;  // what rounding took from out, rounded itself; or null
  void* lse;                // [B, Hq, Tq] of the compute type, strides lse_b, lse_h, 1
  int64_t lse_b, lse_h;

  MaskKind mask_kind;
  AttentionTensor mask;  // [B, Hq, Tq, Tk], stride 0 in broadcast dimensions
  const float* slopes;   // [B, Hq], stride slopes_b, 1; or null
  int64_t slopes_b;
  double scale, softcap;
  Causal causal;
  int64_t window_left, window_right;  // negative: none
  double dropout_p;
  uint64_t seed;

  int64_t group() const { return Hq / Hk; }
};

// Gradients of the output, or, if dweights is set, of the attention weights; the latter have no v.
struct AttentionBackwardArgs {
  AttentionArgs forward;
  AttentionTensor dout;      // [B, Hq, Tq, Dv]
  AttentionTensor dweights;  // [B, Hq, Tq, Tk]
  const void* dlse;          // same layout as lse; or null
  AttentionTensor dq, dk, dv;
  void* dlse_out;  // same layout as lse; used with dweights
  void* dmask;     // contiguous, with shape mask_shape; or null
  int64_t mask_shape[4];
};

// Keys and values that are read in place: of a dtype of their own, in pages, or quantised.
//
// With pages, the tensors k and v of `attention` are [pages, Hk, page_size, D or Dv], and key j of sequence b is row
// j % page_size of page block_table[b][j / page_size]. Columns are contiguous (stride d is 1).
struct DecodeArgs {
  AttentionArgs attention;             // dtype: of q and out; a float mask is of the compute type
  DType key_dtype;                     // unused if quantized
  bool quantized;                      // k and v are int8: a row is its numbers times its scale
  AttentionTensor k_scales, v_scales;  // float32 [B or pages, Hk, Tk or page_size]; d is unused
  const int32_t* block_table;          // [B][table_b], or null
  int64_t table_b, page_size;
};

struct AttentionKernels {
  // weights [B, Hq, Tq, Tk] of the compute type, for at most attention::kKeys keys that are not packed; or null.
  void (*forward)(const AttentionArgs&, void* weights);
  void (*decode)(const DecodeArgs&);                       // the same results as forward; faster with few queries
  void (*weights)(const AttentionArgs&, void* weights);    // [B, Hq, Tq, Tk], zeros on entry
  void (*mean_weights)(const AttentionArgs&, void* mean);  // [B, Tq, Tk] over heads, float32 or float64
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
