// Operators of connectionist temporal classification on the CPU: checks, allocation, launch.
#include "ctc/ctc.h"

#include <tuple>

#include "common/allocate.h"
#include "common/isa.h"
#include "common/math.h"
#include "common/registration.h"

namespace seqkernels {

namespace {

CtcKernels kernels() { SEQKERNELS_RETURN_ON_CURRENT_ISA(ctc_kernels); }

ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// The checked inputs of an op.
struct Call {
  const char* const op;
  CtcArgs args{};
  Tensor log_probs, targets, steps, labels;  // keep copies alive
  std::vector<int64_t> starts;

  Call(const char* name, const Tensor& probabilities, const Tensor& of_targets, const Tensor& input_lengths,
       const Tensor& target_lengths, int64_t blank)
      : op(name), log_probs(probabilities), targets(of_targets), steps(input_lengths), labels(target_lengths) {
    CtcArgs& a = args;
    a.dtype = dtype_of(op, "log_probs", log_probs);
    check_cpu(op, "log_probs", log_probs);
    if (log_probs.dim() != 3) fail(op, ": log_probs must have 3 dimensions, got ", show(shape_of(log_probs)));
    a.T = log_probs.size(0);
    a.B = log_probs.size(1);
    a.C = log_probs.size(2);
    if (blank < 0 || blank >= a.C) fail(op, ": blank must be between 0 and ", a.C - 1, ", got ", blank);
    a.blank = blank;
    if (a.C > 1 && log_probs.stride(2) != 1) log_probs = torch::stable::contiguous(log_probs);
    a.log_probs = log_probs.const_data_ptr();
    a.probs_t = log_probs.stride(0);
    a.probs_b = log_probs.stride(1);
    steps = checked(op, "input_lengths", steps, ScalarType::Long, {a.B}, log_probs);
    labels = checked(op, "target_lengths", labels, ScalarType::Long, {a.B}, log_probs);
    a.steps = static_cast<const int64_t*>(steps.const_data_ptr());
    a.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    check_device(op, "targets", targets, log_probs);
    check_dtype(op, "targets", targets, ScalarType::Long);
    if (targets.dim() != 1 && !(targets.dim() == 2 && targets.size(0) == a.B)) {
      fail(op, ": targets must have shape [sum of target_lengths] or [", a.B, ", S], got ", show(shape_of(targets)));
    }
    if (!targets.is_contiguous()) targets = torch::stable::contiguous(targets);
    a.targets = static_cast<const int64_t*>(targets.const_data_ptr());
    set_targets();
  }

  ScalarType type() const { return log_probs.scalar_type(); }

 private:
  void set_targets() {
    CtcArgs& a = args;
    const bool padded = targets.dim() == 2;
    int64_t longest = 0, total = 0;
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t n = a.steps[b], count = a.labels[b], most = padded ? targets.size(1) : targets.size(0) - total;
      if (n < 0 || n > a.T) fail(op, ": input_lengths must be between 0 and ", a.T, ", got ", n);
      if (count < 0 || count > most) {
        fail(op, ": target_lengths must be between 0 and ", padded ? "the columns of" : "the rest of", " targets, ",
             most, ", got ", count);
      }
      starts.push_back(padded ? b * targets.size(1) : total);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t label = a.targets[starts.back() + i];
        if (label < 0 || label >= a.C) {
          fail(op, ": targets must be between 0 and ", a.C - 1, ", got ", label, " in sequence ", b);
        }
      }
      total += count;
      longest = max(longest, count);
    }
    if (!padded && total != targets.size(0)) {
      fail(op, ": targets must have as many labels as the sum of target_lengths, ", total, ", got ", targets.size(0));
    }
    a.starts = starts.data();
    a.S = 2 * longest + 1;
  }
};

Tensor allocate_cpu(ScalarType type, const Shape& sizes) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= max(sizes[i], int64_t{1});
  }
  return allocate(DevicePlace::cpu(), dtype_code(type), int64_t(sizes.size()), sizes.data(), strides.data());
}

std::tuple<Tensor, Tensor> forward(const Tensor& log_probs, const Tensor& targets, const Tensor& input_lengths,
                                   const Tensor& target_lengths, int64_t blank) {
  Call call("ctc_loss_forward", log_probs, targets, input_lengths, target_lengths, blank);
  const CtcArgs& a = call.args;
  Tensor loss = allocate_cpu(ScalarType::Double, {a.B}),
         alpha = allocate_cpu(compute_type(call.type()), {a.B, a.T, a.S});
  kernels().forward({a, alpha.mutable_data_ptr(), static_cast<double*>(loss.mutable_data_ptr())});
  return {loss, alpha};
}

Tensor backward(const Tensor& dloss, const Tensor& log_probs, const Tensor& targets, const Tensor& input_lengths,
                const Tensor& target_lengths, int64_t blank, const Tensor& alpha) {
  Call call("ctc_loss_backward", log_probs, targets, input_lengths, target_lengths, blank);
  const CtcArgs& a = call.args;
  const Tensor states = checked(call.op, "alpha", alpha, compute_type(call.type()), {a.B, a.T, a.S}, call.log_probs);
  const Tensor upstream = checked(call.op, "dloss", dloss, ScalarType::Double, {a.B}, call.log_probs);
  Tensor gradient = allocate_cpu(call.type(), {a.T, a.B, a.C});
  torch::stable::zero_(gradient);
  kernels().backward(
      {a, states.const_data_ptr(), static_cast<const double*>(upstream.const_data_ptr()), gradient.mutable_data_ptr()});
  return gradient;
}

}  // namespace

SEQKERNELS_OPS_ON(CPU, m) {
  m.impl("ctc_loss_forward", TORCH_BOX(&forward));
  m.impl("ctc_loss_backward", TORCH_BOX(&backward));
}

}  // namespace seqkernels
