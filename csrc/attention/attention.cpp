// Attention operators on the CPU: checks, allocation, launch. On a GPU, Triton implements the same operators.
#include "attention/attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/plan.h"
#include "common/allocate.h"
#include "common/isa.h"
#include "common/math.h"
#include "common/memory.h"
#include "common/registration.h"

namespace seqkernels {

namespace {

using OptionalTensor = const std::optional<Tensor>&;

AttentionKernels kernels() { SEQKERNELS_RETURN_ON_CURRENT_ISA(attention_kernels); }

// Allocates [B, H, T, D] with the memory layout of x [B, H, T, *].
Tensor allocate_like(const Tensor& x, int64_t D) {
  return allocate_cpu(x.scalar_type(), {x.size(0), x.size(1), x.size(2), D}, x.stride(1) < x.stride(2));
}
void fill_zero(const Tensor& t) { torch::stable::zero_(const_cast<Tensor&>(t)); }

// Arguments of all ops besides q, k and v.
struct AttentionOpArgs {
  OptionalTensor mask, slopes, q_lengths, k_lengths, cu_q, cu_k;
  int64_t max_q, max_k;
  double scale;
  int64_t causal, window_left, window_right;
  double softcap, dropout_p;
  OptionalTensor seed;
};

// The checked inputs of an op.
struct Call {
  const char* const op;
  AttentionArgs args{};
  std::vector<AttentionSequence> sequences;
  std::vector<Tensor> copies;  // keeps copies alive

  explicit Call(const char* op) : op(op) {}
  Call(const char* op, const Tensor& q, const Tensor& k, const Tensor* v, const AttentionOpArgs& inputs) : op(op) {
    AttentionArgs& a = args;
    a.dtype = dtype_of(op, "q", q);
    a.q = tensor("q", q, q);
    a.k = tensor("k", k, q);
    if (v != nullptr) a.v = tensor("v", *v, q);
    const int64_t batch = q.size(0);
    a.B = batch;
    a.Hq = q.size(1);
    a.Tq = q.size(2);
    a.D = q.size(3);
    a.Hk = k.size(1);
    a.Tk = k.size(2);
    a.Dv = v != nullptr ? v->size(3) : 0;
    if (k.size(0) != batch || k.size(3) != a.D || a.Hk < 1 || a.Hq % a.Hk != 0) {
      fail(op, ": k must have shape [B, Hk, Tk, D] = [", batch, ", a divisor of ", a.Hq, ", Tk, ", a.D, "], got ",
           show(shape_of(k)));
    }
    if (v != nullptr && (v->size(0) != batch || v->size(1) != a.Hk || v->size(2) != a.Tk)) {
      fail(op, ": v must have shape [B, Hk, Tk, Dv] = [", batch, ", ", a.Hk, ", ", a.Tk, ", Dv], got ",
           show(shape_of(*v)));
    }
    set_options(q, inputs);
  }

  // Everything besides q, k and v.
  void set_options(const Tensor& q, const AttentionOpArgs& inputs) {
    AttentionArgs& a = args;
    if (inputs.causal < 0 || inputs.causal > 2) {
      fail(op, ": causal must be 0 (none), 1 (upper left) or 2 (lower right), got ", inputs.causal);
    }
    if (!(inputs.softcap >= 0) || std::isinf(inputs.softcap)) {
      fail(op, ": softcap must be finite and not negative, got ", inputs.softcap);
    }
    if (!(inputs.dropout_p >= 0 && inputs.dropout_p <= 1)) {
      fail(op, ": dropout_p must be between 0 and 1, got ", inputs.dropout_p);
    }
    a.scale = inputs.scale;
    a.softcap = inputs.softcap;
    a.causal = Causal(inputs.causal);
    constexpr int64_t kUnbounded = int64_t{1} << 40;  // beyond any length
    a.window_left = std::min(inputs.window_left, kUnbounded);
    a.window_right = std::min(inputs.window_right, kUnbounded);
    a.dropout_p = inputs.dropout_p;
    if (a.dropout_p > 0) {
      if (!inputs.seed) fail(op, ": seed must be given with dropout, got None");
      const Tensor& seed = *inputs.seed;
      check_device(op, "seed", seed, q);
      check_dtype(op, "seed", seed, ScalarType::Long);
      if (seed.numel() != 1) fail(op, ": seed must have one element, got ", show(shape_of(seed)));
      a.seed = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
    }
    set_sequences(q, inputs);
    set_mask(q, inputs.mask);
    if (inputs.slopes) {
      Tensor slopes = *inputs.slopes;
      check_device(op, "alibi_slopes", slopes, q);
      check_dtype(op, "alibi_slopes", slopes, ScalarType::Float);
      const Shape shape = shape_of(slopes);
      if (shape != Shape{a.Hq} && shape != Shape{a.B, a.Hq}) {
        fail(op, ": alibi_slopes must have shape [Hq] or [B, Hq] = [", a.B, ", ", a.Hq, "], got ", show(shape));
      }
      if (!slopes.is_contiguous()) slopes = torch::stable::contiguous(slopes);
      copies.push_back(slopes);
      a.slopes = static_cast<const float*>(slopes.const_data_ptr());
      a.slopes_b = shape.size() == 2 ? a.Hq : 0;
    }
  }

  AttentionTensor tensor(const char* name, const Tensor& t, const Tensor& q) const {
    check_device(op, name, t, q);
    check_dtype(op, name, t, q.scalar_type());
    if (t.dim() != 4) fail(op, ": ", name, " must have 4 dimensions, got ", show(shape_of(t)));
    return view(t);
  }
  static AttentionTensor view(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }
  // Checks a tensor that has the shape of an output.
  AttentionTensor checked_output(const char* name, const Tensor& t, const Tensor& q, const Shape& shape) const {
    check_device(op, name, t, q);
    check_dtype(op, name, t, q.scalar_type());
    check_shape(op, name, t, shape);
    return view(t);
  }

  std::vector<int64_t> integers(const char* name, const Tensor& t, const Tensor& q) const {
    check_device(op, name, t, q);
    const ScalarType type = t.scalar_type();
    if (type != ScalarType::Int && type != ScalarType::Long) {
      fail(op, ": ", name, " must be int32 or int64, got ", dtype_name(type));
    }
    if (t.dim() != 1) fail(op, ": ", name, " must have 1 dimension, got ", show(shape_of(t)));
    std::vector<int64_t> values(size_t(t.size(0)));
    const int64_t stride = t.stride(0);
    for (int64_t i = 0; i < t.size(0); ++i) {
      values[size_t(i)] = type == ScalarType::Long ? static_cast<const int64_t*>(t.const_data_ptr())[i * stride]
                                                   : static_cast<const int32_t*>(t.const_data_ptr())[i * stride];
    }
    return values;
  }
  std::vector<int64_t> bounds(const char* name, OptionalTensor inputs, const Tensor& q, int64_t N, int64_t longest,
                              const char* longest_name) const {
    const std::vector<int64_t> cu = integers(name, *inputs, q);
    if (cu.empty() || cu[0] != 0 || cu.back() != N) {
      fail(op, ": ", name, " must begin with 0 and end with ", N, ", the number of rows, got ",
           cu.empty() ? std::string("none") : "[" + std::to_string(cu[0]) + ", .., " + std::to_string(cu.back()) + "]");
    }
    for (size_t i = 1; i < cu.size(); ++i) {
      if (cu[i] < cu[i - 1]) fail(op, ": ", name, " must not decrease, got ", cu[i - 1], " before ", cu[i]);
      if (cu[i] - cu[i - 1] > longest) {
        fail(op, ": ", longest_name, " must be at least the longest sequence's length, ", cu[i] - cu[i - 1], ", got ",
             longest);
      }
    }
    return cu;
  }
  std::vector<int64_t> lengths(const char* name, OptionalTensor inputs, const Tensor& q, int64_t T) const {
    if (!inputs) return std::vector<int64_t>(size_t(args.B), T);
    std::vector<int64_t> all = integers(name, *inputs, q);
    if (int64_t(all.size()) != args.B) {
      fail(op, ": ", name, " must have shape [B] = [", args.B, "], got ", show(shape_of(*inputs)));
    }
    for (const int64_t n : all) {
      if (n < 0 || n > T) fail(op, ": ", name, " must be between 0 and ", T, ", got ", n);
    }
    return all;
  }

  void set_sequences(const Tensor& q, const AttentionOpArgs& inputs) {
    AttentionArgs& a = args;
    if (inputs.cu_q || inputs.cu_k) {
      if (!inputs.cu_q || !inputs.cu_k) fail(op, ": cu_q and cu_k must be given together");
      if (inputs.q_lengths || inputs.k_lengths || inputs.mask) {
        fail(op, ": q_lengths, k_lengths and attn_mask must be absent where rows are packed");
      }
      if (a.B != 1) fail(op, ": q must have shape [1, Hq, N, D] where rows are packed, got ", show(shape_of(q)));
      const std::vector<int64_t> cu_q = bounds("cu_q", inputs.cu_q, q, a.Tq, inputs.max_q, "max_q"),
                                 cu_k = bounds("cu_k", inputs.cu_k, q, a.Tk, inputs.max_k, "max_k");
      if (cu_q.size() != cu_k.size()) {
        fail(op, ": cu_k must have as many elements as cu_q, ", cu_q.size(), ", got ", cu_k.size());
      }
      a.packed = true;
      a.B = int64_t(cu_q.size()) - 1;
      for (AttentionTensor* t : {&a.q, &a.k, &a.v}) t->b = 0;
      for (size_t i = 0; i + 1 < cu_q.size(); ++i) {
        sequences.push_back({cu_q[i], cu_k[i], cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]});
      }
    } else if (!inputs.q_lengths && !inputs.k_lengths) {
      sequences.assign(size_t(a.B), {0, 0, a.Tq, a.Tk});
    } else {
      const std::vector<int64_t> query_lengths = lengths("q_lengths", inputs.q_lengths, q, a.Tq),
                                 key_lengths = lengths("k_lengths", inputs.k_lengths, q, a.Tk);
      for (size_t i = 0; i < query_lengths.size(); ++i) sequences.push_back({0, 0, query_lengths[i], key_lengths[i]});
    }
    a.sequences = sequences.data();
    a.lse_h = a.Tq;
    a.lse_b = a.packed ? 0 : a.Hq * a.Tq;
  }

  void set_mask(const Tensor& q, OptionalTensor inputs) {
    if (!inputs) return;
    const Tensor& mask = *inputs;
    check_device(op, "attn_mask", mask, q);
    const bool is_bool = mask.scalar_type() == ScalarType::Bool;
    if (!is_bool) check_dtype(op, "attn_mask", mask, q.scalar_type());
    const int64_t full[] = {args.B, args.Hq, args.Tq, args.Tk};
    bool fits = mask.dim() == 4;
    for (int64_t i = 0; fits && i < 4; ++i) fits = mask.size(i) == full[i] || mask.size(i) == 1;
    if (!fits) {
      fail(op, ": attn_mask must have shape [", args.B, " or 1, ", args.Hq, " or 1, ", args.Tq, " or 1, ", args.Tk,
           " or 1], got ", show(shape_of(mask)));
    }
    args.mask_kind = is_bool ? MaskKind::kBool : MaskKind::kFloat;
    args.mask = view(mask);
    int64_t* const strides[] = {&args.mask.b, &args.mask.h, &args.mask.t, &args.mask.d};
    for (int64_t i = 0; i < 4; ++i) {
      if (mask.size(i) == 1 && full[i] != 1) *strides[i] = 0;
    }
  }

  ScalarType compute_type() const { return args.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }
  Shape lse_shape(const Tensor& q) const { return {q.size(0), q.size(1), q.size(2)}; }
  // lse or its gradient, as kernels read it.
  const void* checked_lse(const char* name, const Tensor& t, const Tensor& q) {
    copies.push_back(checked(op, name, t, compute_type(), lse_shape(q), q));
    return copies.back().const_data_ptr();
  }
  // An output as kernels write it. Packed rows have no stride between sequences.
  AttentionTensor output(const Tensor& t) const {
    AttentionTensor v = view(t);
    if (args.packed) v.b = 0;
    return v;
  }
};

// Copies a float mask of a half type to float32, which the kernel for few queries reads.
template <class S>
std::vector<float> widened(AttentionTensor& mask, const AttentionArgs& a) {
  const auto size = [](int64_t stride, int64_t n) { return stride == 0 ? 1 : n; };
  const int64_t B = size(mask.b, a.B), H = size(mask.h, a.Hq), Tq = size(mask.t, a.Tq), Tk = size(mask.d, a.Tk);
  std::vector<float> values;
  values.reserve(size_t(B * H * Tq * Tk));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t i = 0; i < Tq; ++i) {
        const S* row = static_cast<const S*>(mask.data) + b * mask.b + h * mask.h + i * mask.t;
        for (int64_t j = 0; j < Tk; ++j) values.push_back(float(row[j * mask.d]));
      }
    }
  }
  const auto stride = [](int64_t n, int64_t of) { return n == 1 ? 0 : of; };
  mask = {values.data(), stride(B, H * Tq * Tk), stride(H, Tq * Tk), stride(Tq, Tk), stride(Tk, 1)};
  return values;
}
std::vector<float> widened_mask(AttentionArgs& a) {
  if (a.mask_kind != MaskKind::kFloat) return {};
  if (a.dtype == DType::kBFloat16) return widened<torch::headeronly::BFloat16>(a.mask, a);
  if (a.dtype == DType::kFloat16) return widened<torch::headeronly::Half>(a.mask, a);
  return {};
}

#define SEQKERNELS_ATTENTION_PARAMETERS                                                                                \
  OptionalTensor mask, OptionalTensor slopes, OptionalTensor q_lengths, OptionalTensor k_lengths, OptionalTensor cu_q, \
      OptionalTensor cu_k, int64_t max_q, int64_t max_k, double scale, int64_t causal, int64_t window_left,            \
      int64_t window_right, double softcap, double dropout_p, OptionalTensor seed
#define SEQKERNELS_ATTENTION_INPUTS                                                                                  \
  AttentionOpArgs {                                                                                                  \
    mask, slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k, scale, causal, window_left, window_right, softcap, \
        dropout_p, seed                                                                                              \
  }

// Runs the forward pass; few queries take the kernel that reads keys and values in place. weights: as in
// AttentionKernels::forward.
void run_forward(const Call& call, void* weights) {
  const AttentionArgs& a = call.args;
  int64_t queries = 0;
  for (const AttentionSequence& s : call.sequences) queries = std::max(queries, s.q_length);
  const bool in_place = weights == nullptr && attention::few_queries(queries, a.group()) && a.D > 0 && a.Dv > 0 &&
                        a.k.d == 1 && a.v.d == 1;
  if (!in_place) return kernels().forward(a, weights);
  DecodeArgs args{};
  args.attention = a;
  args.key_dtype = a.dtype;
  const std::vector<float> mask = widened_mask(args.attention);
  kernels().decode(args);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                           SEQKERNELS_ATTENTION_PARAMETERS, bool keep_low) {
  Call call("attention_forward", q, k, &v, SEQKERNELS_ATTENTION_INPUTS);
  Tensor out = allocate_like(q, call.args.Dv), lse = allocate_cpu(call.compute_type(), call.lse_shape(q));
  call.args.out = call.output(out);
  call.args.lse = lse.mutable_data_ptr();
  const bool half = call.args.dtype != DType::kFloat32 && call.args.dtype != DType::kFloat64;
  Tensor low = keep_low && half ? allocate_like(q, call.args.Dv) : allocate_cpu(q.scalar_type(), {0});
  if (keep_low && half) call.args.out_low = call.output(low);
  run_forward(call, nullptr);
  return {out, lse, low};
}

// Inference without options: few arguments and one result, which a call with few queries takes long to convert.
Tensor dense(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor mask, OptionalTensor k_lengths,
             double scale, int64_t causal) {
  const std::optional<Tensor> none;
  Call call("attention_dense", q, k, &v,
            AttentionOpArgs{mask, none, none, k_lengths, none, none, 0, 0, scale, causal, -1, -1, 0, 0, none});
  const AttentionArgs& a = call.args;
  const Memory lse(size_t(a.B * a.Hq * a.Tq) * sizeof(double) + 1);
  Tensor out = allocate_like(q, a.Dv);
  call.args.out = call.output(out);
  call.args.lse = lse.get();
  run_forward(call, nullptr);
  return out;
}

// Attention to a cache: keys and values [B, Hk, Tk, ..], or [pages, Hk, page_size, ..] with a block table.
struct DecodeCall : Call {
  DecodeArgs cache{};

  DecodeCall(const Tensor& q, const Tensor& keys, const Tensor& values, OptionalTensor key_scales,
             OptionalTensor value_scales, OptionalTensor block_table, const AttentionOpArgs& inputs)
      : Call("attention_decode") {
    AttentionArgs& a = args;
    a.dtype = dtype_of(op, "q", q);
    a.q = tensor("q", q, q);
    cache.quantized = keys.scalar_type() == ScalarType::Char;
    if (!cache.quantized) cache.key_dtype = dtype_of(op, "keys", keys);
    const bool wide = a.dtype == DType::kFloat64;
    if (wide != (!cache.quantized && cache.key_dtype == DType::kFloat64)) {
      fail(op, ": keys must ", wide ? "" : "not ", "be float64 where q is ", dtype_name(q.scalar_type()), ", got ",
           dtype_name(keys.scalar_type()));
    }
    a.k = stored("keys", keys, keys.scalar_type(), q);
    a.v = stored("values", values, keys.scalar_type(), q);
    a.B = q.size(0);
    a.Hq = q.size(1);
    a.Tq = q.size(2);
    a.D = q.size(3);
    a.Hk = keys.size(1);
    a.Dv = values.size(3);
    if (a.D < 1 || a.Dv < 1) fail(op, ": q and values must have columns, got ", a.D, " and ", a.Dv);
    const bool paged = block_table.has_value();
    if ((!paged && keys.size(0) != a.B) || keys.size(3) != a.D || a.Hk < 1 || a.Hq % a.Hk != 0) {
      fail(op, ": keys must have shape [", paged ? "pages" : "B", ", Hk, ", paged ? "page_size" : "Tk", ", D] = [",
           paged ? std::string("pages") : std::to_string(a.B), ", a divisor of ", a.Hq, ", ",
           paged ? "page_size" : "Tk", ", ", a.D, "], got ", show(shape_of(keys)));
    }
    const Shape rows{keys.size(0), keys.size(1), keys.size(2)};
    if (Shape{values.size(0), values.size(1), values.size(2)} != rows) {
      fail(op, ": values must have as many rows and heads as keys, ", show(rows), ", got ", show(shape_of(values)));
    }
    cache.k_scales = scales("key_scales", key_scales, rows, q);
    cache.v_scales = scales("value_scales", value_scales, rows, q);
    a.Tk = keys.size(2);
    if (paged) {
      if (!inputs.k_lengths) fail(op, ": k_lengths must be given with block_table, got None");
      const Tensor& table = *block_table;
      check_device(op, "block_table", table, q);
      check_dtype(op, "block_table", table, ScalarType::Int);
      if (table.dim() != 2 || table.size(0) != a.B) {
        fail(op, ": block_table must have shape [B, pages of a sequence] = [", a.B, ", ..], got ",
             show(shape_of(table)));
      }
      copies.push_back(table.is_contiguous() ? table : torch::stable::contiguous(table));
      cache.block_table = static_cast<const int32_t*>(copies.back().const_data_ptr());
      cache.table_b = table.size(1);
      cache.page_size = keys.size(2);
      if (cache.page_size < 1) fail(op, ": keys must have rows in a page, got ", show(shape_of(keys)));
      a.Tk = cache.table_b * cache.page_size;
      // A mask has the columns of the longest sequence rather than of whole pages.
      if (inputs.mask && inputs.mask->dim() == 4 && inputs.mask->size(3) != 1) {
        a.Tk = std::min(a.Tk, inputs.mask->size(3));
      }
    }
    set_options(q, inputs);
    if (paged) check_pages(keys.size(0));
    cache.attention = args;
  }

  // keys or values: read in place, with contiguous columns.
  AttentionTensor stored(const char* name, const Tensor& t, ScalarType dtype, const Tensor& q) const {
    check_device(op, name, t, q);
    check_dtype(op, name, t, dtype);
    if (t.dim() != 4) fail(op, ": ", name, " must have 4 dimensions, got ", show(shape_of(t)));
    if (t.size(3) > 1 && t.stride(3) != 1)
      fail(op, ": ", name, " must have contiguous columns, got stride ", t.stride(3));
    AttentionTensor v = view(t);
    v.d = 1;
    return v;
  }
  AttentionTensor scales(const char* name, OptionalTensor t, const Shape& shape, const Tensor& q) const {
    if (t.has_value() != cache.quantized) {
      fail(op, ": ", name, " must be ", cache.quantized ? "given with" : "absent without", " int8 keys");
    }
    if (!t) return {};
    check_device(op, name, *t, q);
    check_dtype(op, name, *t, ScalarType::Float);
    check_shape(op, name, *t, shape);
    return {const_cast<void*>(t->const_data_ptr()), t->stride(0), t->stride(1), t->stride(2), 0};
  }
  void check_pages(int64_t pages) const {
    for (int64_t b = 0; b < args.B; ++b) {
      const int64_t used = ceil_div(sequences[size_t(b)].k_length, cache.page_size);
      for (int64_t i = 0; i < used; ++i) {
        const int32_t page = cache.block_table[b * cache.table_b + i];
        if (page < 0 || page >= pages) {
          fail(op, ": block_table must be at least 0 and less than ", pages, ", the number of pages, got ", page);
        }
      }
    }
  }
};

Tensor decode(const Tensor& q, const Tensor& keys, const Tensor& values, OptionalTensor key_scales,
              OptionalTensor value_scales, OptionalTensor block_table, OptionalTensor mask, OptionalTensor slopes,
              OptionalTensor q_lengths, OptionalTensor k_lengths, double scale, int64_t causal, int64_t window_left,
              int64_t window_right, double softcap) {
  const std::optional<Tensor> none;
  DecodeCall call(q, keys, values, key_scales, value_scales, block_table,
                  AttentionOpArgs{mask, slopes, q_lengths, k_lengths, none, none, 0, 0, scale, causal, window_left,
                                  window_right, softcap, 0, none});
  AttentionArgs& a = call.cache.attention;
  const Memory lse(size_t(a.B * a.Hq * a.Tq) * sizeof(double) + 1);
  Tensor out = allocate_like(q, a.Dv);
  a.out = call.output(out);
  a.lse = lse.get();
  const std::vector<float> widened = widened_mask(a);
  kernels().decode(call.cache);
  return out;
}

Tensor weights(const Tensor& q, const Tensor& k, SEQKERNELS_ATTENTION_PARAMETERS, const Tensor& lse) {
  Call call("attention_weights", q, k, nullptr, SEQKERNELS_ATTENTION_INPUTS);
  if (call.args.packed) fail(call.op, ": cu_q and cu_k must be absent");
  call.args.lse = const_cast<void*>(call.checked_lse("lse", lse, q));
  Tensor out = allocate_cpu(q.scalar_type(), {q.size(0), q.size(1), q.size(2), k.size(2)});
  fill_zero(out);
  kernels().weights(call.args, out.mutable_data_ptr());
  return out;
}

// Allocates the gradient of the mask, filled with zeros; an empty tensor if it is not needed.
Tensor mask_gradient(const Call& call, AttentionBackwardArgs& args, const Tensor& q, OptionalTensor mask, bool need) {
  if (!need) return allocate_cpu(q.scalar_type(), {0});
  if (!mask || call.args.mask_kind != MaskKind::kFloat) {
    fail(call.op, ": need_dmask must be False where there is no float attn_mask, got True");
  }
  const Shape shape = shape_of(*mask);
  Tensor dmask = allocate_cpu(q.scalar_type(), shape);
  fill_zero(dmask);
  args.dmask = dmask.mutable_data_ptr();
  for (size_t i = 0; i < 4; ++i) args.mask_shape[i] = shape[i];
  return dmask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, OptionalTensor dlse, const Tensor& q,
                                                    const Tensor& k, const Tensor& v, SEQKERNELS_ATTENTION_PARAMETERS,
                                                    const Tensor& out, const Tensor& lse, bool need_dmask,
                                                    OptionalTensor out_low) {
  Call call("attention_backward", q, k, &v, SEQKERNELS_ATTENTION_INPUTS);
  const Shape shape{q.size(0), q.size(1), q.size(2), call.args.Dv};
  AttentionBackwardArgs args{};
  const auto packed = [&](AttentionTensor t) {
    if (call.args.packed) t.b = 0;
    return t;
  };
  call.args.out = packed(call.checked_output("out", out, q, shape));
  if (out_low && out_low->numel() > 0) call.args.out_low = packed(call.checked_output("out_low", *out_low, q, shape));
  call.args.lse = const_cast<void*>(call.checked_lse("lse", lse, q));
  args.dout = packed(call.checked_output("dout", dout, q, shape));
  if (dlse) args.dlse = call.checked_lse("dlse", *dlse, q);
  Tensor dq = allocate_like(q, call.args.D), dk = allocate_like(k, call.args.D), dv = allocate_like(v, call.args.Dv);
  args.dq = call.output(dq);
  args.dk = call.output(dk);
  args.dv = call.output(dv);
  Tensor dmask = mask_gradient(call, args, q, mask, need_dmask);
  args.forward = call.args;
  kernels().backward(args);
  return {dq, dk, dv, dmask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weights_backward(const Tensor& dweights, const Tensor& q, const Tensor& k,
                                                            SEQKERNELS_ATTENTION_PARAMETERS, const Tensor& lse,
                                                            bool need_dmask) {
  Call call("attention_weights_backward", q, k, nullptr, SEQKERNELS_ATTENTION_INPUTS);
  if (call.args.packed) fail(call.op, ": cu_q and cu_k must be absent");
  AttentionBackwardArgs args{};
  call.args.lse = const_cast<void*>(call.checked_lse("lse", lse, q));
  args.dweights = call.checked_output("dweights", dweights, q, {q.size(0), q.size(1), q.size(2), k.size(2)});
  Tensor dq = allocate_like(q, call.args.D), dk = allocate_like(k, call.args.D),
         dlse = allocate_cpu(call.compute_type(), call.lse_shape(q));
  args.dq = call.output(dq);
  args.dk = call.output(dk);
  args.dlse_out = dlse.mutable_data_ptr();
  Tensor dmask = mask_gradient(call, args, q, mask, need_dmask);
  args.forward = call.args;
  kernels().backward(args);
  return {dq, dk, dlse, dmask};
}

// The ops of multi-head attention read projections [B, T, E], or [T, B, E] without batch_first, whose E columns are H
// heads of D: q is [.., 3E] with queries, keys and values, or q is [.., E] and kv is [.., 2E].
struct MultiheadCall : Call {
  const bool batch_first;
  std::vector<uint8_t> visible;  // [B, S], the padding mask where it is not equivalent to lengths

  MultiheadCall(const char* op, const Tensor& q, OptionalTensor kv, int64_t heads, bool batch_first,
                OptionalTensor padding, const AttentionOpArgs& inputs)
      : Call(op), batch_first(batch_first) {
    AttentionArgs& a = args;
    a.dtype = dtype_of(op, "q", q);
    const int64_t parts = kv ? 1 : 3;
    constexpr int64_t kMostHeads = int64_t{1} << 31;  // their product with `parts` cannot overflow
    if (heads > kMostHeads) fail(op, ": heads must be at most ", kMostHeads, ", got ", heads);
    if (q.dim() != 3 || heads < 1 || q.size(2) % (parts * heads) != 0) {
      fail(op, ": q must have 3 dimensions and a multiple of ", parts * std::max<int64_t>(heads, 1), " columns, got ",
           show(shape_of(q)));
    }
    const int64_t E = q.size(2) / parts, batch = batch_first ? 0 : 1;
    const Tensor& keys = kv ? *kv : q;
    if (kv) {
      check_device(op, "kv", keys, q);
      check_dtype(op, "kv", keys, q.scalar_type());
      if (keys.dim() != 3 || keys.size(batch) != q.size(batch) || keys.size(2) != 2 * E) {
        fail(op, ": kv must have the batch of q, ", q.size(batch), ", and ", 2 * E, " columns, got ",
             show(shape_of(keys)));
      }
    }
    a.B = q.size(batch);
    a.Hq = a.Hk = heads;
    a.D = a.Dv = E / heads;
    a.Tq = q.size(1 - batch);
    a.Tk = keys.size(1 - batch);
    a.q = heads_of(q, 0);
    a.k = heads_of(keys, kv ? 0 : 1);
    a.v = heads_of(keys, kv ? 1 : 2);
    set_options(q, inputs);
    if (padding) set_padding(*padding, q);
  }

  // Part `part` of E columns, as [B, H, T, D].
  AttentionTensor heads_of(const Tensor& t, int64_t part) const {
    const size_t size = args.dtype == DType::kFloat64 ? 8 : args.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t column = t.stride(2), b = t.stride(batch_first ? 0 : 1), row = t.stride(batch_first ? 1 : 0);
    char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    if (part != 0) data += part * args.Hq * args.D * column * int64_t(size);
    return {data, b, args.D * column, row, column};
  }

  // padding: bool [B, S], True: masked. Masks that are equivalent to lengths become lengths.
  void set_padding(const Tensor& padding, const Tensor& q) {
    AttentionArgs& a = args;
    check_device(op, "padding", padding, q);
    check_dtype(op, "padding", padding, ScalarType::Bool);
    check_shape(op, "padding", padding, {a.B, a.Tk});
    if (a.mask_kind != MaskKind::kNone) fail(op, ": attn_mask must be absent with padding");
    const uint8_t* data = static_cast<const uint8_t*>(padding.const_data_ptr());
    const int64_t row = padding.stride(0), column = padding.stride(1);
    bool lengths = a.causal != Causal::kLowerRight;  // which counts positions from the last key
    for (int64_t b = 0; b < a.B && lengths; ++b) {
      int64_t n = 0, j;
      while (n < a.Tk && data[b * row + n * column] == 0) ++n;
      for (j = n; j < a.Tk && data[b * row + j * column] != 0; ++j) {
      }
      lengths = j == a.Tk;
      sequences[size_t(b)].k_length = n;
    }
    if (lengths) return;
    visible.resize(size_t(a.B * a.Tk));
    for (int64_t b = 0; b < a.B; ++b) {
      sequences[size_t(b)].k_length = a.Tk;
      for (int64_t j = 0; j < a.Tk; ++j) visible[size_t(b * a.Tk + j)] = data[b * row + j * column] == 0;
    }
    a.mask_kind = MaskKind::kBool;
    a.mask = {visible.data(), a.Tk, 0, 0, 1};
  }

  Shape shape_of_output() const {
    const int64_t E = args.Hq * args.D;
    return batch_first ? Shape{args.B, args.Tq, E} : Shape{args.Tq, args.B, E};
  }
};

#define SEQKERNELS_MULTIHEAD_PARAMETERS                                                        \
  const Tensor &q, OptionalTensor kv, int64_t heads, bool batch_first, OptionalTensor padding, \
      OptionalTensor attn_mask, double scale, int64_t causal, double dropout_p, OptionalTensor seed
#define SEQKERNELS_MULTIHEAD_CALL(name)         \
  const std::optional<Tensor> none;             \
  MultiheadCall call(                           \
      name, q, kv, heads, batch_first, padding, \
      AttentionOpArgs{attn_mask, none, none, none, none, none, 0, 0, scale, causal, -1, -1, 0, dropout_p, seed})

enum class Weights : int { kNone, kMean, kHeads };  // numbered as in the op schema

// mean [B, n] of weights [B, H, n].
template <class T>
void mean_of_heads(const T* weights, int64_t B, int64_t H, int64_t n, T* mean) {
  for (int64_t b = 0; b < B; ++b, weights += H * n, mean += n) {
    std::copy_n(weights, n, mean);
    for (int64_t h = 1; h < H; ++h) {
      for (int64_t i = 0; i < n; ++i) mean[i] += weights[h * n + i];
    }
    for (int64_t i = 0; i < n; ++i) mean[i] /= T(H);
  }
}

std::tuple<Tensor, Tensor, Tensor> multihead_forward(SEQKERNELS_MULTIHEAD_PARAMETERS, int64_t need_weights) {
  SEQKERNELS_MULTIHEAD_CALL("multihead_attention_forward");
  const AttentionArgs& a = call.args;
  if (a.dtype != DType::kFloat32 && a.dtype != DType::kFloat64) {
    fail(call.op, ": q must be float32 or float64, got ", dtype_name(q.scalar_type()));
  }
  if (need_weights < 0 || need_weights > 2) {
    fail(call.op, ": need_weights must be 0 (none), 1 (mean) or 2 (of each head), got ", need_weights);
  }
  Tensor out = allocate_cpu(q.scalar_type(), call.shape_of_output());
  Tensor lse = allocate_cpu(q.scalar_type(), {a.B, a.Hq, a.Tq});
  call.args.out = call.heads_of(out, 0);
  call.args.lse = lse.mutable_data_ptr();
  const Weights kind = Weights(need_weights);
  Tensor weights = allocate_cpu(q.scalar_type(), kind == Weights::kNone   ? Shape{0}
                                                 : kind == Weights::kMean ? Shape{a.B, a.Tq, a.Tk}
                                                                          : Shape{a.B, a.Hq, a.Tq, a.Tk});
  void* const data = weights.mutable_data_ptr();
  // The weights of one block of keys are those of the forward pass; of more, they are computed again.
  const bool one_block = kind != Weights::kNone && a.Tk <= attention::kKeys;
  if (one_block && kind == Weights::kMean) {
    const int64_t n = a.Tq * a.Tk;
    const Memory heads(size_t(a.B * a.Hq * n) * sizeof(double) + 1);
    run_forward(call, heads.get());
    if (a.dtype == DType::kFloat64) {
      mean_of_heads(reinterpret_cast<const double*>(heads.get()), a.B, a.Hq, n, static_cast<double*>(data));
    } else {
      mean_of_heads(reinterpret_cast<const float*>(heads.get()), a.B, a.Hq, n, static_cast<float*>(data));
    }
    return {out, lse, weights};
  }
  run_forward(call, one_block ? data : nullptr);
  if (one_block || kind == Weights::kNone) return {out, lse, weights};
  if (kind == Weights::kHeads) {
    fill_zero(weights);
    kernels().weights(a, data);
  } else {
    kernels().mean_weights(a, data);
  }
  return {out, lse, weights};
}

std::tuple<Tensor, Tensor> multihead_backward(const Tensor& dout, SEQKERNELS_MULTIHEAD_PARAMETERS, const Tensor& out,
                                              const Tensor& lse) {
  SEQKERNELS_MULTIHEAD_CALL("multihead_attention_backward");
  const AttentionArgs& a = call.args;
  AttentionBackwardArgs args{};
  for (const auto& [name, t] : {std::pair<const char*, const Tensor*>{"dout", &dout}, {"out", &out}}) {
    check_device(call.op, name, *t, q);
    check_dtype(call.op, name, *t, q.scalar_type());
    check_shape(call.op, name, *t, call.shape_of_output());
  }
  const Tensor kept = checked(call.op, "lse", lse, call.compute_type(), {a.B, a.Hq, a.Tq}, q);
  call.args.out = call.heads_of(out, 0);
  call.args.lse = const_cast<void*>(kept.const_data_ptr());
  args.dout = call.heads_of(dout, 0);
  const auto like = [&](const Tensor& t) { return allocate_cpu(t.scalar_type(), shape_of(t)); };
  Tensor dq = like(q), dkv = kv ? like(*kv) : allocate_cpu(q.scalar_type(), {0});
  const Tensor& keys = kv ? dkv : dq;
  args.dq = call.heads_of(dq, 0);
  args.dk = call.heads_of(keys, kv ? 0 : 1);
  args.dv = call.heads_of(keys, kv ? 1 : 2);
  args.forward = call.args;
  kernels().backward(args);
  return {dq, dkv};
}

}  // namespace

void implement_attention(Library& m) {
  m.impl("multihead_attention_forward", TORCH_BOX(&multihead_forward));
  m.impl("multihead_attention_backward", TORCH_BOX(&multihead_backward));
  m.impl("attention_dense", TORCH_BOX(&dense));
  m.impl("attention_decode", TORCH_BOX(&decode));
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
  m.impl("attention_weights", TORCH_BOX(&weights));
  m.impl("attention_weights_backward", TORCH_BOX(&weights_backward));
}

}  // namespace seqkernels
