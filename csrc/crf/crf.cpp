// Operators of conditional random fields on the CPU: checks, allocation, launch.
#include "crf/crf.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/allocate.h"
#include "common/isa.h"
#include "common/registration.h"

namespace seqkernels {

namespace {

using OptionalTensor = const std::optional<Tensor>&;

CrfKernels kernels() { SEQKERNELS_RETURN_ON_CURRENT_ISA(crf_kernels); }

Tensor zeros_cpu(ScalarType type, const Shape& sizes) {
  Tensor t = allocate_cpu(type, sizes);
  torch::stable::zero_(t);
  return t;
}

// The checked inputs of an op.
struct Call {
  const char* const op;
  CrfArgs args{};
  std::vector<int64_t> steps, first;
  std::vector<Tensor> copies;  // keeps copies alive

  Call(const char* name, const Tensor& emissions, const Tensor& transitions, OptionalTensor start, OptionalTensor end,
       OptionalTensor lengths, OptionalTensor mask, OptionalTensor tags)
      : op(name) {
    CrfArgs& a = args;
    a.dtype = dtype_of(op, "emissions", emissions);
    check_cpu(op, "emissions", emissions);
    if (emissions.dim() != 3) fail(op, ": emissions must have 3 dimensions, got ", show(shape_of(emissions)));
    a.B = emissions.size(0);
    a.T = emissions.size(1);
    a.K = emissions.size(2);
    if (a.K < 1) fail(op, ": emissions must have at least 1 tag, got ", show(shape_of(emissions)));
    Tensor e = a.K > 1 && emissions.stride(2) != 1 ? torch::stable::contiguous(emissions) : emissions;
    copies.push_back(e);
    a.emissions = e.const_data_ptr();
    a.emissions_b = e.stride(0);
    a.emissions_t = e.stride(1);
    set_transitions(transitions, emissions);
    a.start = vector("start_transitions", start, emissions);
    a.end = vector("end_transitions", end, emissions);
    set_steps(emissions, lengths, mask);
    if (tags) set_tags(emissions, *tags);
  }

  Shape transitions_shape() const {
    return {args.transitions_b != 0 ? args.B : 1, args.transitions_t != 0 ? args.T : 1, args.K, args.K};
  }

 private:
  void set_transitions(const Tensor& t, const Tensor& emissions) {
    CrfArgs& a = args;
    check_device(op, "transitions", t, emissions);
    check_dtype(op, "transitions", t, emissions.scalar_type());
    const bool fits = t.dim() == 4 && (t.size(0) == a.B || t.size(0) == 1) && (t.size(1) == a.T || t.size(1) == 1) &&
                      t.size(2) == a.K && t.size(3) == a.K;
    if (!fits) {
      fail(op, ": transitions must have shape [", a.B, " or 1, ", a.T, " or 1, ", a.K, ", ", a.K, "], got ",
           show(shape_of(t)));
    }
    const Tensor m = t.is_contiguous() ? t : torch::stable::contiguous(t);
    copies.push_back(m);
    a.transitions = m.const_data_ptr();
    a.transitions_t = m.size(1) > 1 ? a.K * a.K : 0;
    a.transitions_b = m.size(0) > 1 ? m.size(1) * a.K * a.K : 0;
  }
  const void* vector(const char* name, OptionalTensor t, const Tensor& emissions) {
    if (!t) return nullptr;
    copies.push_back(checked(op, name, *t, emissions.scalar_type(), {args.K}, emissions));
    return copies.back().const_data_ptr();
  }
  void set_steps(const Tensor& emissions, OptionalTensor lengths, OptionalTensor mask) {
    CrfArgs& a = args;
    if (lengths && mask) fail(op, ": lengths and mask must not be given together");
    first.push_back(0);
    const int64_t* length = nullptr;
    const bool* visible = nullptr;
    if (lengths) {
      copies.push_back(checked(op, "lengths", *lengths, ScalarType::Long, {a.B}, emissions));
      length = static_cast<const int64_t*>(copies.back().const_data_ptr());
    }
    if (mask) {
      copies.push_back(checked(op, "mask", *mask, ScalarType::Bool, {a.B, a.T}, emissions));
      visible = static_cast<const bool*>(copies.back().const_data_ptr());
    }
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t n = length == nullptr ? a.T : length[b];
      if (n < 0 || n > a.T) fail(op, ": lengths must be between 0 and ", a.T, ", got ", n);
      for (int64_t t = 0; t < n; ++t) {
        if (visible == nullptr || visible[b * a.T + t]) steps.push_back(t);
      }
      first.push_back(int64_t(steps.size()));
    }
    a.steps = steps.data();
    a.first = first.data();
  }
  void set_tags(const Tensor& emissions, const Tensor& tags) {
    CrfArgs& a = args;
    check_device(op, "tags", tags, emissions);
    check_dtype(op, "tags", tags, ScalarType::Long);
    check_shape(op, "tags", tags, {a.B, a.T});
    a.tags = static_cast<const int64_t*>(tags.const_data_ptr());
    a.tags_b = tags.stride(0);
    a.tags_t = tags.stride(1);
    for (int64_t b = 0; b < a.B; ++b) {
      for (int64_t s = first[size_t(b)]; s < first[size_t(b) + 1]; ++s) {
        const int64_t tag = a.tags[b * a.tags_b + steps[size_t(s)] * a.tags_t];
        if (tag < 0 || tag >= a.K) {
          fail(op, ": tags must be between 0 and ", a.K - 1, ", got ", tag, " at step ", steps[size_t(s)],
               " of sequence ", b);
        }
      }
    }
  }
};

#define SEQKERNELS_CRF_PARAMETERS                                                               \
  const Tensor &emissions, const Tensor &transitions, OptionalTensor start, OptionalTensor end, \
      OptionalTensor lengths, OptionalTensor mask

std::tuple<Tensor, Tensor, Tensor> forward(SEQKERNELS_CRF_PARAMETERS, OptionalTensor tags) {
  Call call("crf_forward", emissions, transitions, start, end, lengths, mask, tags);
  const CrfArgs& a = call.args;
  Tensor log_z = allocate_cpu(ScalarType::Double, {a.B}), score = allocate_cpu(ScalarType::Double, {a.B});
  Tensor alpha = zeros_cpu(compute_type(emissions.scalar_type()), {a.B, a.T, a.K});
  CrfForwardArgs args{a, alpha.mutable_data_ptr(), static_cast<double*>(log_z.mutable_data_ptr()),
                      static_cast<double*>(score.mutable_data_ptr())};
  kernels().forward(args);
  return {log_z, score, alpha};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dlog_z, const Tensor& dscore,
                                                    SEQKERNELS_CRF_PARAMETERS, OptionalTensor tags,
                                                    const Tensor& alpha) {
  Call call("crf_backward", emissions, transitions, start, end, lengths, mask, tags);
  const CrfArgs& a = call.args;
  const ScalarType type = emissions.scalar_type();
  const Tensor states = checked(call.op, "alpha", alpha, compute_type(type), {a.B, a.T, a.K}, emissions);
  const Tensor of_z = checked(call.op, "dlog_z", dlog_z, ScalarType::Double, {a.B}, emissions);
  const Tensor of_score = checked(call.op, "dscore", dscore, ScalarType::Double, {a.B}, emissions);
  Tensor demissions = zeros_cpu(type, {a.B, a.T, a.K}), dtransitions = zeros_cpu(type, shape_of(transitions)),
         dstart = zeros_cpu(type, {start ? a.K : 0}), dend = zeros_cpu(type, {end ? a.K : 0});
  CrfBackwardArgs args{};
  args.crf = a;
  args.alpha = states.const_data_ptr();
  args.dlog_z = static_cast<const double*>(of_z.const_data_ptr());
  args.dscore = static_cast<const double*>(of_score.const_data_ptr());
  args.demissions = demissions.mutable_data_ptr();
  args.dtransitions = dtransitions.mutable_data_ptr();
  if (start) args.dstart = dstart.mutable_data_ptr();
  if (end) args.dend = dend.mutable_data_ptr();
  kernels().backward(args);
  return {demissions, dtransitions, dstart, dend};
}

std::tuple<Tensor, Tensor> viterbi(SEQKERNELS_CRF_PARAMETERS, int64_t paths) {
  Call call("crf_viterbi", emissions, transitions, start, end, lengths, mask, std::nullopt);
  const CrfArgs& a = call.args;
  if (paths < 1) fail(call.op, ": paths must be at least 1, got ", paths);
  if (paths > ((int64_t{1} << 31) - 1) / std::max<int64_t>(a.K, 1))
    fail(call.op, ": paths must be fewer, got ", paths, " of ", a.K, " tags");
  Tensor tags = allocate_cpu(ScalarType::Long, {a.B, paths, a.T}),
         scores = allocate_cpu(ScalarType::Double, {a.B, paths});
  int64_t* to = static_cast<int64_t*>(tags.mutable_data_ptr());
  for (int64_t i = 0; i < a.B * paths * a.T; ++i) to[i] = -1;
  CrfViterbiArgs args{a, paths, to, static_cast<double*>(scores.mutable_data_ptr())};
  kernels().viterbi(args);
  return {tags, scores};
}

}  // namespace

void implement_crf(Library& m) {
  m.impl("crf_forward", TORCH_BOX(&forward));
  m.impl("crf_backward", TORCH_BOX(&backward));
  m.impl("crf_viterbi", TORCH_BOX(&viterbi));
}

}  // namespace seqkernels
