// Operators of connectionist temporal classification on the CPU: checks, allocation, launch.
#include "ctc/ctc.h"

#include <limits>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/isa.h"
#include "common/math.h"
#include "common/registration.h"

namespace seqkernels {

namespace {

CtcKernels kernels() { SEQKERNELS_RETURN_ON_CURRENT_ISA(ctc_kernels); }

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
    a.S = 2 * (padded ? targets.size(1) : longest) + 1;
  }
};

enum Reduction : int64_t { kNone, kMean, kSum };  // numbered as in the op schemas

void check_reduction(const char* op, int64_t reduction) {
  if (reduction < kNone || reduction > kSum) fail(op, ": reduction must be 0, 1 or 2, got ", reduction);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Derivative of the result with respect to the loss of one sequence.
double factor(const CtcArgs& a, int64_t b, int64_t reduction) {
  return reduction == kMean ? 1.0 / (double(max(a.labels[b], int64_t{1})) * double(a.B)) : 1.0;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& log_probs, const Tensor& targets, const Tensor& input_lengths,
                                           const Tensor& target_lengths, int64_t blank, int64_t reduction,
                                           bool zero_infinity) {
  Call call("ctc_loss_forward", log_probs, targets, input_lengths, target_lengths, blank);
  const CtcArgs& a = call.args;
  check_reduction(call.op, reduction);
  const ScalarType wide = compute_type(call.type());
  Tensor losses = allocate_cpu(ScalarType::Double, {a.B}), alpha = allocate_cpu(wide, {a.B, a.T, a.S}),
         loss = allocate_cpu(wide, reduction == kNone ? Shape{a.B} : Shape{});
  double* const of_sequence = static_cast<double*>(losses.mutable_data_ptr());
  kernels().forward({a, alpha.mutable_data_ptr(), of_sequence});
  void* const to = loss.mutable_data_ptr();
  const auto put = [&](int64_t i, double x) {
    if (wide == ScalarType::Double) {
      static_cast<double*>(to)[i] = x;
    } else {
      static_cast<float*>(to)[i] = float(x);
    }
  };
  double sum = reduction == kMean && a.B == 0 ? std::numeric_limits<double>::quiet_NaN() : 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const double x = zero_infinity && of_sequence[b] == kInfinity ? 0 : of_sequence[b];
    if (reduction == kNone) put(b, x);
    sum += x * factor(a, b, reduction);
  }
  if (reduction != kNone) put(0, sum);
  return {loss, losses, alpha};
}

Tensor backward(const Tensor& dloss, const Tensor& log_probs, const Tensor& targets, const Tensor& input_lengths,
                const Tensor& target_lengths, int64_t blank, int64_t reduction, bool zero_infinity,
                const Tensor& losses, const Tensor& alpha) {
  Call call("ctc_loss_backward", log_probs, targets, input_lengths, target_lengths, blank);
  const CtcArgs& a = call.args;
  const Tensor states = checked(call.op, "alpha", alpha, compute_type(call.type()), {a.B, a.T, a.S}, call.log_probs);
  check_reduction(call.op, reduction);
  const Tensor of_sequence = checked(call.op, "losses", losses, ScalarType::Double, {a.B}, call.log_probs);
  const Tensor upstream = checked(call.op, "dloss", dloss, compute_type(call.type()),
                                  reduction == kNone ? Shape{a.B} : Shape{}, call.log_probs);
  std::vector<double> of_losses;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t i = reduction == kNone ? b : 0;
    const void* const from = upstream.const_data_ptr();
    const double x = call.type() == ScalarType::Double ? static_cast<const double*>(from)[i]
                                                       : double(static_cast<const float*>(from)[i]);
    const bool zero = zero_infinity && static_cast<const double*>(of_sequence.const_data_ptr())[b] == kInfinity;
    of_losses.push_back(zero ? 0 : x * factor(a, b, reduction));
  }
  Tensor gradient = allocate_cpu(call.type(), {a.T, a.B, a.C});
  torch::stable::zero_(gradient);
  kernels().backward({a, states.const_data_ptr(), of_losses.data(), gradient.mutable_data_ptr()});
  return gradient;
}

}  // namespace

void implement_ctc(Library& m) {
  m.impl("ctc_loss_forward", TORCH_BOX(&forward));
  m.impl("ctc_loss_backward", TORCH_BOX(&backward));
}

}  // namespace seqkernels
