// Operators of additive attention on the CPU: checks, allocation, launch.
#include "additive_attention/additive_attention.h"

#include <tuple>

#include "common/allocate.h"
#include "common/isa.h"
#include "common/registration.h"

namespace seqkernels {

namespace {

using OptionalTensor = const std::optional<Tensor>&;

AdditiveAttentionKernels kernels() { SEQKERNELS_RETURN_ON_CURRENT_ISA(additive_attention_kernels); }

// The checked inputs of an op.
struct Call {
  const char* const op;
  const ScalarType type;
  AdditiveAttentionArgs args{};
  Tensor q, k, value, v;
  std::optional<Tensor> mask, lengths, exp_k;  // keep copies alive

  Call(const char* name, const Tensor& query, const Tensor& key, const Tensor& values, const Tensor& weights_v,
       OptionalTensor visible, OptionalTensor key_lengths, OptionalTensor key_exp)
      : op(name), type(query.scalar_type()), q(query), k(key), value(values), v(weights_v) {
    AdditiveAttentionArgs& a = args;
    a.dtype = dtype_of(op, "query", q);
    check_cpu(op, "query", q);
    for (const auto& [argument, t] : {std::pair{"query", &q}, {"key", &k}, {"value", &value}}) {
      if (t->dim() != 3) fail(op, ": ", argument, " must have 3 dimensions, got ", show(shape_of(*t)));
    }
    a.B = q.size(0);
    a.Tq = q.size(1);
    a.H = q.size(2);
    a.Tk = k.size(1);
    a.Dv = value.size(2);
    q = checked(op, "query", q, type, {a.B, a.Tq, a.H}, q);
    k = checked(op, "key", k, type, {a.B, a.Tk, a.H}, q);
    value = checked(op, "value", value, type, {a.B, a.Tk, a.Dv}, q);
    v = checked(op, "v", v, type, {a.H}, q);
    a.q = q.const_data_ptr();
    a.k = k.const_data_ptr();
    a.value = value.const_data_ptr();
    a.v = v.const_data_ptr();
    if (visible) set_mask(*visible);
    if (key_lengths) {
      lengths = checked(op, "lengths", *key_lengths, ScalarType::Long, {a.B}, q);
      a.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
      for (int64_t b = 0; b < a.B; ++b) {
        if (a.lengths[b] < 0 || a.lengths[b] > a.Tk) {
          fail(op, ": lengths must be between 0 and ", a.Tk, ", got ", a.lengths[b]);
        }
      }
    }
    if (key_exp) {
      exp_k = checked(op, "key_exp", *key_exp, compute_type(type), {a.B, a.Tk, a.H}, q);
      a.exp_k = exp_k->const_data_ptr();
    }
  }

 private:
  void set_mask(const Tensor& t) {
    AdditiveAttentionArgs& a = args;
    check_device(op, "mask", t, q);
    check_dtype(op, "mask", t, ScalarType::Bool);
    const bool fits = t.dim() == 3 && (t.size(0) == a.B || t.size(0) == 1) && (t.size(1) == a.Tq || t.size(1) == 1) &&
                      t.size(2) == a.Tk;
    if (!fits) {
      fail(op, ": mask must have shape [", a.B, " or 1, ", a.Tq, " or 1, ", a.Tk, "], got ", show(shape_of(t)));
    }
    mask = a.Tk > 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t;
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_b = mask->size(0) > 1 ? mask->stride(0) : 0;
    a.mask_q = mask->size(1) > 1 ? mask->stride(1) : 0;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& v,
                                   OptionalTensor mask, OptionalTensor lengths, OptionalTensor key_exp) {
  Call call("additive_attention_forward", query, key, value, v, mask, lengths, key_exp);
  AdditiveAttentionArgs& a = call.args;
  Tensor out = allocate_cpu(call.type, {a.B, a.Tq, a.Dv}),
         weights = allocate_cpu(compute_type(call.type), {a.B, a.Tq, a.Tk});
  a.weights = weights.mutable_data_ptr();
  kernels().forward({a, out.mutable_data_ptr()});
  return {out, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(OptionalTensor dout, OptionalTensor dweights, const Tensor& query,
                                                    const Tensor& key, const Tensor& value, const Tensor& v,
                                                    OptionalTensor lengths, OptionalTensor key_exp,
                                                    const Tensor& weights) {
  Call call("additive_attention_backward", query, key, value, v, std::nullopt, lengths, key_exp);
  AdditiveAttentionArgs& a = call.args;
  const ScalarType wide = compute_type(call.type);
  const Tensor saved = checked(call.op, "weights", weights, wide, {a.B, a.Tq, a.Tk}, call.q);
  a.weights = const_cast<void*>(saved.const_data_ptr());
  std::optional<Tensor> of_out, of_weights;
  if (dout) of_out = checked(call.op, "dout", *dout, call.type, {a.B, a.Tq, a.Dv}, call.q);
  if (dweights) of_weights = checked(call.op, "dweights", *dweights, wide, {a.B, a.Tq, a.Tk}, call.q);
  Tensor dq = allocate_cpu(call.type, {a.B, a.Tq, a.H}), dk = allocate_cpu(call.type, {a.B, a.Tk, a.H}),
         dvalue = allocate_cpu(call.type, {a.B, a.Tk, a.Dv}), dv = empty_like_dtype(call.v, {a.H});
  kernels().backward({a, of_out ? of_out->const_data_ptr() : nullptr,
                      of_weights ? of_weights->const_data_ptr() : nullptr, dq.mutable_data_ptr(), dk.mutable_data_ptr(),
                      dvalue.mutable_data_ptr(), dv.mutable_data_ptr()});
  return {dq, dk, dvalue, dv};
}

Tensor key_exp(const Tensor& key) {
  const char* const op = "additive_attention_key_exp";
  const DType dtype = dtype_of(op, "key", key);
  check_cpu(op, "key", key);
  if (key.dim() != 3) fail(op, ": key must have 3 dimensions, got ", show(shape_of(key)));
  const int64_t B = key.size(0), Tk = key.size(1), H = key.size(2);
  const Tensor rows = key.is_contiguous() ? key : torch::stable::contiguous(key);
  Tensor to = allocate_cpu(compute_type(key.scalar_type()), {B, Tk, H});
  kernels().exp(dtype, B * Tk, H, rows.const_data_ptr(), to.mutable_data_ptr());
  return to;
}

}  // namespace

void implement_additive_attention(Library& m) {
  m.impl("additive_attention_forward", TORCH_BOX(&forward));
  m.impl("additive_attention_backward", TORCH_BOX(&backward));
  m.impl("additive_attention_key_exp", TORCH_BOX(&key_exp));
}

}  // namespace seqkernels
