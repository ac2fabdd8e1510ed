// Recurrent layers: checks, allocation, launch. Each cell has three ops:
// inference, forward that saves, backward.

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include "common/bytes.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/registration.h"
#include "common/stream.h"
#include "recurrent/ops.h"
#include "recurrent/walk.h"

namespace seqkernels {

#if defined(SEQKERNELS_EMULATE_CUDA)  // the test module has no CPU kernels
RecurrentKernels kernels(CellKind, bool) { return {}; }
#else
RecurrentKernels kernels(CellKind kind, bool options) {
  SEQKERNELS_RETURN_ON_CURRENT_ISA(recurrent_kernels, kind, options);
}
#endif

#if defined(SEQKERNELS_HAVE_CUDA) || defined(SEQKERNELS_EMULATE_CUDA)
bool runs_on_cuda([[maybe_unused]] const Tensor& x) {
#if defined(SEQKERNELS_EMULATE_CUDA)
  return true;  // CPU tensors too: the kernels are emulated
#else
  return x.is_cuda();
#endif
}

namespace {
template <class Args, class Launch>
void run_on_cuda(const std::string& op, CellKind kind, PassKind pass, const Args& args, const CudaLayout& layout,
                 const Tensor& like, bool recompute, Launch launch) {
  const OnDevice device(like);
  const CudaPlan plan = plan_recurrent_cuda(kind, pass, args, layout, recompute, current_cuda_device());
  if (plan.tier == CudaTier::kNone) {
    std::string text;
    for (const std::string& reason : plan.reasons) text += (text.empty() ? "" : "; ") + reason;
    fail(op, ": no CUDA kernel supports these inputs: ", text);
  }
  const Tensor workspace = torch::stable::new_empty(like, Shape{plan.workspace}, ScalarType::Byte);
  launch(kind, args, layout, plan, workspace.mutable_data_ptr(), device.stream);
}
}  // namespace

void run_on_cuda(const std::string& op, CellKind kind, const ForwardArgs& args, const CudaLayout& layout,
                 const Tensor& like) {
  run_on_cuda(op, kind, PassKind::kForward, args, layout, like, false, launch_recurrent_forward);
}
void run_on_cuda(const std::string& op, CellKind kind, const BackwardArgs& args, const CudaLayout& layout,
                 const Tensor& like) {
  const bool recompute = args.saved == nullptr;
  run_on_cuda(op, kind, PassKind::kBackward, args, layout, like, recompute, launch_recurrent_backward);
}
#else
bool runs_on_cuda(const Tensor&) { return false; }
bool allows_tf32() { return false; }
void run_on_cuda(const std::string&, CellKind, const ForwardArgs&, const CudaLayout&, const Tensor&) {}
void run_on_cuda(const std::string&, CellKind, const BackwardArgs&, const CudaLayout&, const Tensor&) {}
#endif

namespace {

constexpr double kNormEps = 1e-5;  // the default, as in torch.nn.LayerNorm

// The options of an op, off by default.
struct OptionOpArgs {
  bool bias, projected, peephole;  // which weights there are
  int64_t heads;
  const std::optional<Tensor>&reset, &zoneout_h, &zoneout_c, &candidate, &variational;
  const std::vector<double>& numbers;  // empty, or cell_clip, gate_clip,
                                       // zoneout_h, zoneout_c, recurrent_dropout, norm_eps
};

// The unchecked inputs of an op.
struct LayerOpArgs {
  const Tensor& x;
  std::array<const std::optional<Tensor>*, kMaxStates> states0;
  const std::vector<Tensor>& weights;
  const std::optional<Tensor>&batch_sizes, &lengths;
  bool bidirectional;
  const OptionOpArgs& variant;
};

// A weight: its name in messages, its members in the argument structs, its
// shape.
struct WeightSlot {
  const char* name;
  const void* Weights::* value;
  void* WeightGradients::* gradient;
  Shape shape;
};

// The checked inputs of a layer. Owns everything that the kernel arguments
// point to.
struct LayerInputs {
  const std::string op;
  const CellKind kind;
  const CellShape cell = shape_of(kind);
  Tensor x;
  std::array<std::optional<Tensor>, kMaxStates> states0;
  std::vector<Tensor> weights, masks;
  std::optional<Tensor> lengths;  // on the device
  std::vector<WeightSlot> slots;  // of one direction
  bool packed;
  bool cuda;  // run by the CUDA launchers
  CudaLayout layout{};
  WalkArrays arrays;
  std::vector<uint8_t> reset;
  Shape outer;  // [T, B] or [N]: the leading dimensions of x and y

  LayerInputs(const std::string& op, CellKind kind, const LayerOpArgs& given, RecurrentArgs& args)
      : op(op), kind(kind), x(given.x), packed(given.batch_sizes.has_value()) {
    args.dtype = dtype_of(op, "x", x);
    args.directions = given.bidirectional ? 2 : 1;
    args.heads = given.variant.heads;
    cuda = runs_on_cuda(x);
    if (!cuda) check_cpu(op, "x", x);
    if (packed && given.lengths) fail(op, ": lengths must be absent where batch_sizes is given, got both");
    if (x.dim() != (packed ? 2 : 3)) {
      fail(op, ": x must have ", packed ? "2 dimensions [N, D]" : "3 dimensions [T, B, D]", ", got ",
           show(shape_of(x)));
    }
    args.D = x.size(-1 + x.dim());
    if (args.D > 1 && x.numel() > 0 && x.stride(x.dim() - 1) != 1) x = torch::stable::contiguous(x);
    take_weights(given.weights, given.variant, args);
    if (packed) {
      arrays.of_packed(op, *given.batch_sizes, x, !cuda, args.walk);
    } else if (!cuda) {
      arrays.of_padded(op, given.lengths, x, args.walk);
    } else {  // lengths stay on the device, where the kernels clamp them to [0, T]
      args.walk.T = x.size(0);
      args.walk.B = x.size(1);
      args.walk.N = args.walk.T * args.walk.B;
      if (given.lengths) {
        lengths = checked(op, "lengths", *given.lengths, ScalarType::Long, {args.walk.B}, x);
        layout.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
      }
    }
    if (cuda) {
      layout.packed = packed;
      layout.x_step = x.stride(0);
      layout.x_across = packed ? 0 : x.stride(1);
      layout.tf32 = allows_tf32();
    }
    outer = shape_of(x);
    outer.pop_back();
    for (int64_t i = 0; i < cell.states; ++i) {
      if (!*given.states0[i]) continue;
      const std::string name = std::string(1, cell.state_names[i]) + "0";
      states0[i] = checked(op, name.c_str(), **given.states0[i], x.scalar_type(), state_shape(args, i), x);
      (i == 0 ? args.h0 : args.c0[i - 1]) = states0[i]->const_data_ptr();
    }
    args.x = x.const_data_ptr();
    arrays.point(args.walk);
    take_options(given.variant, args);
    args.saved_width = saved_width(cell, args.H, args.options.any);
    if (!cuda) args.plan = plan_recurrent(args, kind, thread_count());
  }

  // Of state `which`: 0 is h, the others are the cells.
  Shape state_shape(const RecurrentArgs& args, int64_t which) const {
    return {args.directions, args.walk.B, which == 0 ? args.P : args.H};
  }
  // Of state `which` at every step: y, or a cell laid out like it.
  Shape output_shape(const RecurrentArgs& args, int64_t which) const {
    Shape shape = outer;
    shape.push_back(args.directions * (which == 0 ? args.P : args.H));
    return shape;
  }
  // One row for each row of y; the rows of real tokens come first.
  Shape saved_shape(const RecurrentArgs& args) const { return {args.directions, saved_rows(), args.saved_width}; }
  int64_t saved_rows() const { return std::accumulate(outer.begin(), outer.end(), int64_t{1}, std::multiplies<>()); }
  // Whether padding rows must be zeroed here; the CUDA launchers zero them.
  bool padding_exists(const Walk& walk) const { return !cuda && !packed && walk.N < walk.T * walk.B; }

 private:
  void take_weights(const std::vector<Tensor>& given, const OptionOpArgs& variant, RecurrentArgs& args) {
    const bool bias = variant.bias, projected = variant.projected, peephole = variant.peephole;
    const bool nested = cell.inner_gates > 0;
    if (peephole && cell.peepholes == 0) fail(op, ": peephole must be false for this cell, got true");
    if (projected && cell.projection == Projection::kNever) {
      fail(op, ": projected must be false for this cell, got true");
    }
    if (!projected && cell.projection == Projection::kAlways) {
      fail(op, ": projected must be true for this cell, got false");
    }
    if (args.heads < 1 || (args.heads > 1 && !cell.heads)) {
      fail(op, ": heads must be ", cell.heads ? "positive" : "1 for this cell", ", got ", args.heads);
    }
    if (projected && args.heads > 1) fail(op, ": heads must be 1 where there is a projection, got ", args.heads);
    const int64_t each = 2 + 2 * bias + projected + peephole + 2 * (cell.norm_groups > 0) + 2 * cell.norm_c +
                         (nested ? 2 + 2 * bias : 0);
    if (static_cast<int64_t>(given.size()) != each * args.directions) {
      fail(op, ": weights must hold ", expected_weights(variant), " for each of ", args.directions, " directions, got ",
           given.size(), " tensors");
    }
    const Tensor& w_hh = given[1];
    const std::string G_by = (cell.gates > 1 ? std::to_string(cell.gates) : "") + "H, ";
    if (w_hh.dim() != 2 || w_hh.size(0) % cell.gates != 0 || w_hh.size(0) == 0 || w_hh.size(1) == 0) {
      fail(op, ": weight_hh must have shape [", G_by, projected ? "P" : "H", "], got ", show(shape_of(w_hh)));
    }
    check_size(op, "the columns of x", args.D);
    check_size(op, "the rows of weight_hh", w_hh.size(0));
    check_size(op, "the columns of weight_hh", w_hh.size(1));
    check_size(op, "heads", args.heads);
    const int64_t G = w_hh.size(0), H = G / cell.gates, P = projected ? w_hh.size(1) : H;
    args.H = H;
    args.P = P;
    if (H % args.heads != 0) fail(op, ": heads must divide H = ", H, ", got ", args.heads);
    if (!projected && w_hh.size(1) * args.heads != H) {
      fail(op, ": weight_hh must have shape [", G_by, args.heads > 1 ? "H / heads" : "H",
           "] = ", show({G, H / args.heads}), ", got ", show(shape_of(w_hh)));
    }
    using W = Weights;
    using D = WeightGradients;
    slots = {{"weight_ih", &W::w_ih, &D::w_ih, {G, args.D}}, {"weight_hh", &W::w_hh, &D::w_hh, {G, P / args.heads}}};
    const auto add = [&](WeightSlot slot) { slots.push_back(std::move(slot)); };
    if (bias) {
      add({"bias_ih", &W::b_ih, &D::b_ih, {G}});
      add({"bias_hh", &W::b_hh, &D::b_hh, {G}});
    }
    if (projected) add({"weight_hr", &W::w_hr, &D::w_hr, {P, H}});
    if (peephole) add({"weight_ph", &W::peephole, &D::peephole, {cell.peepholes * H}});
    if (cell.joint_norm) {
      add({"norm_weight", &W::norm_weight, &D::norm_weight, {G}});
      add({"norm_bias", &W::norm_bias, &D::norm_bias, {G}});
    } else if (cell.norm_groups > 0) {
      add({"gain_ih", &W::gain_ih, &D::gain_ih, {G}});
      add({"gain_hh", &W::gain_hh, &D::gain_hh, {G}});
    }
    if (cell.norm_c) {
      add({"gain_c", &W::gain_c, &D::gain_c, {H}});
      add({"bias_c", &W::bias_c, &D::bias_c, {H}});
    }
    if (nested) {
      add({"weight_inner_ih", &W::inner_ih, &D::inner_ih, {4 * H, H}});
      add({"weight_inner_hh", &W::inner_hh, &D::inner_hh, {4 * H, H}});
      if (bias) {
        add({"bias_inner_ih", &W::inner_b_ih, &D::inner_b_ih, {4 * H}});
        add({"bias_inner_hh", &W::inner_b_hh, &D::inner_b_hh, {4 * H}});
      }
    }
    weights.reserve(given.size());
    for (int64_t d = 0; d < args.directions; ++d) {
      args.weights[d] = {};
      for (const WeightSlot& slot : slots) {
        weights.push_back(checked(op, slot.name, given[weights.size()], x.scalar_type(), slot.shape, x));
        args.weights[d].*slot.value = weights.back().const_data_ptr();
      }
    }
  }

  std::string expected_weights(const OptionOpArgs& variant) const {
    std::string text = "weight_ih, weight_hh";
    if (variant.bias) text += ", bias_ih, bias_hh";
    if (variant.projected) text += ", weight_hr";
    if (variant.peephole) text += ", weight_ph";
    if (cell.norm_groups > 0) text += cell.joint_norm ? ", norm_weight, norm_bias" : ", gain_ih, gain_hh";
    if (cell.norm_c) text += ", gain_c, bias_c";
    if (cell.inner_gates > 0) text += ", weight_inner_ih, weight_inner_hh";
    if (cell.inner_gates > 0 && variant.bias) text += ", bias_inner_ih, bias_inner_hh";
    return text;
  }

  void take_options(const OptionOpArgs& variant, RecurrentArgs& args) {
    LayerOptions& o = args.options;
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    o = {};
    o.cell_clip = o.gate_clip = kInfinity;
    o.candidate_scale = 1;
    o.norm_eps = kNormEps;
    if (!variant.numbers.empty()) {
      if (variant.numbers.size() != 6) {
        fail(op,
             ": numbers must be empty or hold cell_clip, gate_clip, zoneout_h, "
             "zoneout_c, recurrent_dropout, norm_eps, got ",
             variant.numbers.size(), " numbers");
      }
      const double* n = variant.numbers.data();
      for (int i = 0; i < 2; ++i) {
        if (!(n[i] > 0)) fail(op, ": ", i == 0 ? "cell_clip" : "gate_clip", " must be positive, got ", n[i]);
      }
      constexpr const char* kRates[] = {"zoneout_h", "zoneout_c", "recurrent_dropout"};
      for (int i = 0; i < 3; ++i) {
        if (!(n[2 + i] >= 0 && n[2 + i] < 1)) fail(op, ": ", kRates[i], " must lie in [0, 1), got ", n[2 + i]);
      }
      o.cell_clip = n[0];
      o.gate_clip = n[1];
      o.zoneout_h_rate = n[2];
      o.zoneout_c_rate = n[3];
      o.candidate_scale = 1 / (1 - n[4]);
      if (!(n[5] >= 0) || n[5] == kInfinity) fail(op, ": norm_eps must be finite and at least 0, got ", n[5]);
      o.norm_eps = n[5];
    }
    masks.reserve(6);
    const auto take = [&](const char* name, const std::optional<Tensor>& mask, ScalarType dtype, const Shape& shape) {
      if (!mask) return static_cast<const void*>(nullptr);
      masks.push_back(checked(op, name, *mask, dtype, shape, x));
      return masks.back().const_data_ptr();
    };
    const Shape like_cells = output_shape(args, 1);
    const auto bytes = [&](const char* name, const std::optional<Tensor>& mask) {
      return static_cast<const uint8_t*>(take(name, mask, ScalarType::Byte, like_cells));
    };
    o.zoneout_h = bytes("zoneout_h", variant.zoneout_h);
    o.zoneout_c = bytes("zoneout_c", variant.zoneout_c);
    o.candidate = bytes("candidate", variant.candidate);
    o.variational = take("variational", variant.variational, x.scalar_type(), state_shape(args, 0));
    if (variant.reset) {
      const Tensor given = checked(op, "reset", *variant.reset, ScalarType::Bool, outer, x);
      const uint8_t* from = static_cast<const uint8_t*>(given.const_data_ptr());
      if (cuda) {
        masks.push_back(given);
        o.reset = from;
      } else {
        reset.resize(args.walk.N);
        for (int64_t n = 0; n < args.walk.N; ++n) reset[n] = from[arrays.rows[n]];
        o.reset = reset.data();
      }
    }
    if (!cell.cell_options && (o.zoneout_c != nullptr || o.zoneout_c_rate > 0 || o.cell_clip < kInfinity)) {
      fail(op, ": cell_clip and zoneout_c must be absent for this cell");
    }
    if (cell.norm_groups == 0 && o.norm_eps != kNormEps) {
      fail(op, ": norm_eps must be ", kNormEps, " for this cell, got ", o.norm_eps);
    }
    if (!cell.gate_clip && o.gate_clip < kInfinity) fail(op, ": gate_clip must be absent for this cell");
    const bool projected = args.weights[0].w_hr != nullptr;
    if (projected && (o.zoneout_h != nullptr || o.zoneout_h_rate > 0)) {
      fail(op, ": zoneout_h must be absent where there is a projection");
    }
    o.any = variant.peephole || variant.reset || !variant.numbers.empty() || !masks.empty();
  }
};

// Zeroes the rows of `saved` beyond the real tokens.
void zero_unused(const Tensor& saved, const RecurrentArgs& args) {
  if (saved.numel() == 0) return;  // no memory, not even for zero bytes
  const int64_t row = saved.size(2) * static_cast<int64_t>(saved.element_size());
  char* data = static_cast<char*>(saved.mutable_data_ptr());
  for (int64_t d = 0; d < args.directions; ++d) {
    zero_bytes(data + (d * saved.size(1) + args.walk.N) * row, (saved.size(1) - args.walk.N) * row);
  }
}

enum class Keep { kNothing, kForBackward, kStates };  // kStates: backward recomputes the rest

struct LayerOutputs {
  std::vector<Tensor> tensors;  // y, last states[, saved, the cells at every step]
};

LayerOutputs forward_layer(CellKind kind, Keep keep, const LayerOpArgs& given) {
  ForwardArgs args{};
  const std::string op = std::string(shape_of(kind).name) + (keep == Keep::kNothing ? "" : "_forward");
  const LayerInputs in(op, kind, given, args);
  LayerOutputs out;
  out.tensors.reserve(2 * kMaxStates + 1);
  const auto make = [&](const Shape& shape, bool padded) {
    out.tensors.push_back(padded && in.padding_exists(args.walk) ? zeros_like_dtype(in.x, shape)
                                                                 : empty_like_dtype(in.x, shape));
    return out.tensors.back().mutable_data_ptr();
  };
  args.y = make(in.output_shape(args, 0), true);
  args.h_n = make(in.state_shape(args, 0), false);
  for (int64_t k = 0; k < in.cell.cells; ++k) args.c_n[k] = make(in.state_shape(args, 1 + k), false);
  if (keep != Keep::kNothing) {
    args.saved_rows = in.saved_rows();
    Shape shape = in.saved_shape(args);
    if (keep == Keep::kStates) shape[2] = 0;
    void* const saved = make(shape, false);
    if (keep == Keep::kForBackward) args.saved = saved;
    if (in.padding_exists(args.walk)) zero_unused(out.tensors.back(), args);
    for (int64_t k = 0; k < in.cell.cells; ++k) args.cells[k] = make(in.output_shape(args, 1 + k), true);
  }
  if (in.cuda) {
    args.saved_rows = args.walk.N;
    run_on_cuda(op, kind, args, in.layout, in.x);
    return out;
  }
  kernels(kind, args.options.any).forward(args);
  return out;
}

// Recomputes what forward would have saved from the states at every step: each
// token becomes a sequence of one step that starts from the states before it,
// so all tokens share one product, with the same sums and the same bits.
void recompute(const LayerInputs& in, const BackwardArgs& args, char* saved) {
  constexpr int64_t kTokens = 1024;  // per call
  const Walk& walk = args.walk;
  const int64_t element = in.x.element_size();
  const auto copy = [element](std::vector<char>& to, int64_t row, const char* from, int64_t width) {
    if (from == nullptr) {
      zero_bytes(to.data() + row * width * element, width * element);
    } else {
      copy_bytes(to.data() + row * width * element, from, width * element);
    }
  };
  std::vector<int64_t> steps(walk.N), identity(kTokens);
  std::iota(identity.begin(), identity.end(), 0);
  for (int64_t t = 0; t < walk.T; ++t) {
    for (int64_t n = walk.offsets[t]; n < walk.offsets[t + 1]; ++n) steps[n] = t;
  }
  std::vector<char> states[kMaxStates], variational;
  for (int64_t first = 0; first < walk.N; first += kTokens) {
    const int64_t count = std::min(kTokens, walk.N - first), sizes[] = {count}, offsets[] = {0, count};
    ForwardArgs again{};
    static_cast<RecurrentArgs&>(again) = args;
    again.walk = {1, count, count, sizes, offsets, identity.data(), walk.rows + first, walk.x_offsets + first};
    again.options.reset = nullptr;
    for (int64_t i = 0; i < in.cell.states; ++i) {
      const char* const initial = static_cast<const char*>(i == 0 ? args.h0 : args.c0[i - 1]);
      const char* const every = static_cast<const char*>(i == 0 ? args.y : args.cells[i - 1]);
      const int64_t width = i == 0 ? args.P : args.H;
      states[i].resize(args.directions * count * width * element);
      for (int64_t d = 0; d < args.directions; ++d) {
        for (int64_t k = 0; k < count; ++k) {
          const int64_t t = steps[first + k], j = first + k - walk.offsets[t];
          int64_t before;
          const char* from = nullptr;
          switch (previous_row(args, d, t, j, before)) {
            case Previous::kRow:
              from = every + (walk.rows[before] * args.directions + d) * width * element;
              break;
            case Previous::kInitial:
              if (initial != nullptr) from = initial + (d * walk.B + walk.sequence[j]) * width * element;
              break;
            case Previous::kReset:
              break;
          }
          copy(states[i], d * count + k, from, width);
        }
      }
      (i == 0 ? again.h0 : again.c0[i - 1]) = states[i].data();
    }
    if (args.options.variational != nullptr) {
      variational.resize(args.directions * count * args.P * element);
      for (int64_t d = 0; d < args.directions; ++d) {
        for (int64_t k = 0; k < count; ++k) {
          const int64_t j = first + k - walk.offsets[steps[first + k]];
          const char* from = static_cast<const char*>(args.options.variational);
          copy(variational, d * count + k, from + (d * walk.B + walk.sequence[j]) * args.P * element, args.P);
        }
      }
      again.options.variational = variational.data();
    }
    again.plan = plan_recurrent(again, in.kind, thread_count());
    again.saved = saved + first * args.saved_width * element;
    kernels(in.kind, args.options.any).forward(again);
  }
}

struct LayerGradients {
  Tensor dx;
  std::vector<Tensor> dstates, dw;
};

LayerGradients backward_layer(CellKind kind, const LayerOpArgs& given,
                              const std::array<const std::optional<Tensor>*, 2 * kMaxStates>& upstream,
                              const std::array<const Tensor*, kMaxStates + 1>& kept, bool need_dx, bool need_dw) {
  const std::string op = std::string(shape_of(kind).name) + "_backward";
  BackwardArgs args{};
  const LayerInputs in(op, kind, given, args);
  const int64_t states = in.cell.states;
  const ScalarType dtype = in.x.scalar_type();
  std::vector<Tensor> alive;
  const auto take = [&](const std::string& name, const Tensor& t, const Shape& shape) {
    alive.push_back(checked(op, name.c_str(), t, dtype, shape, in.x));
    return alive.back().const_data_ptr();
  };
  const auto maybe = [&](const std::string& name, const std::optional<Tensor>* t, const Shape& shape) -> const void* {
    return t == nullptr || !*t ? nullptr : take(name, **t, shape);
  };
  args.dy = maybe("dy", upstream[0], in.output_shape(args, 0));
  const auto name = [&](const char* before, int64_t i, const char* after) {
    return std::string(before) + in.cell.state_names[i] + after;
  };
  args.dh_n = maybe("dh_n", upstream[1], in.state_shape(args, 0));
  args.y = take("y", *kept[0], in.output_shape(args, 0));
  for (int64_t i = 1; i < states; ++i) {
    args.dc_n[i - 1] = maybe(name("d", i, "_n"), upstream[1 + i], in.state_shape(args, i));
    args.dcells[i - 1] = maybe(name("d", i, "_steps"), upstream[kMaxStates + i], in.output_shape(args, i));
    args.cells[i - 1] = take(name("", i, "_steps"), *kept[1 + i], in.output_shape(args, i));
  }
  args.saved_rows = in.saved_rows();
  const bool again = kept[1]->dim() == 3 && kept[1]->size(2) == 0 && args.saved_width > 0;
  if (again && in.cuda) {
    args.saved = nullptr;  // recomputed by the launcher
  } else if (again) {
    alive.push_back(empty_like_dtype(in.x, in.saved_shape(args)));
    recompute(in, args, static_cast<char*>(alive.back().mutable_data_ptr()));
    args.saved = alive.back().const_data_ptr();
  } else {
    args.saved = take("saved", *kept[1], in.saved_shape(args));
  }

  const Shape none{0};
  LayerGradients out;
  out.dx = !need_dx                       ? empty_like_dtype(in.x, none)
           : in.padding_exists(args.walk) ? zeros_like_dtype(in.x, shape_of(in.x))
                                          : empty_like_dtype(in.x, shape_of(in.x));
  args.dx = need_dx ? out.dx.mutable_data_ptr() : nullptr;
  for (int64_t i = 0; i < states; ++i) {
    out.dstates.push_back(empty_like_dtype(in.x, in.states0[i] ? in.state_shape(args, i) : none));
    (i == 0 ? args.dh0 : args.dc0[i - 1]) = in.states0[i] ? out.dstates.back().mutable_data_ptr() : nullptr;
  }
  args.weights_wanted = need_dw;
  if (need_dw) {
    out.dw.reserve(in.weights.size());
    for (int64_t d = 0; d < args.directions; ++d) {
      args.dw[d] = {};
      for (const WeightSlot& slot : in.slots) {
        out.dw.push_back(empty_like_dtype(in.x, slot.shape));
        args.dw[d].*slot.gradient = out.dw.back().mutable_data_ptr();
      }
    }
  }
  if (in.cuda) {
    run_on_cuda(op, kind, args, in.layout, in.x);
    return out;
  }
  kernels(kind, args.options.any).backward(args);
  return out;
}

// ---- the ops of a kind. I: an index for each state; J: one for each cell ----

template <CellKind kKind, class States, class Memories>
struct OpsOf;

template <CellKind kKind, size_t... I, size_t... J>
struct OpsOf<kKind, std::index_sequence<I...>, std::index_sequence<J...>> {
  using Maybe = const std::optional<Tensor>&;
  using States = std::tuple<Tensor, Repeat<Tensor, I>...>;
  using Saved = std::tuple<Tensor, Repeat<Tensor, I>..., Tensor, Repeat<Tensor, J>...>;
  using Gradients = std::tuple<Tensor, Repeat<Tensor, I>..., std::vector<Tensor>>;
  static constexpr size_t kStates = sizeof...(I);

  static States infer(const Tensor& x, const Repeat<std::optional<Tensor>, I>&... states0,
                      const std::vector<Tensor>& weights, Maybe batch_sizes, Maybe lengths, bool bidirectional,
                      bool bias, bool projected, bool peephole, int64_t heads, Maybe reset, Maybe zoneout_h,
                      Maybe zoneout_c, Maybe candidate, Maybe variational, const std::vector<double>& numbers) {
    const OptionOpArgs variant{bias,      projected, peephole,  heads,       reset,
                               zoneout_h, zoneout_c, candidate, variational, numbers};
    const LayerOpArgs given{x, {&states0...}, weights, batch_sizes, lengths, bidirectional, variant};
    const auto out = forward_layer(kKind, Keep::kNothing, given).tensors;
    return {out[0], out[1 + I]...};
  }

  static Saved forward(const Tensor& x, const Repeat<std::optional<Tensor>, I>&... states0,
                       const std::vector<Tensor>& weights, Maybe batch_sizes, Maybe lengths, bool bidirectional,
                       bool bias, bool projected, bool peephole, int64_t heads, Maybe reset, Maybe zoneout_h,
                       Maybe zoneout_c, Maybe candidate, Maybe variational, const std::vector<double>& numbers,
                       bool recompute) {
    const OptionOpArgs variant{bias,      projected, peephole,  heads,       reset,
                               zoneout_h, zoneout_c, candidate, variational, numbers};
    const LayerOpArgs given{x, {&states0...}, weights, batch_sizes, lengths, bidirectional, variant};
    const auto out = forward_layer(kKind, recompute ? Keep::kStates : Keep::kForBackward, given).tensors;
    return {out[0], out[1 + I]..., out[1 + kStates], out[2 + kStates + J]...};
  }

  static Gradients backward(Maybe dy, const Repeat<std::optional<Tensor>, I>&... dstates, const Tensor& x,
                            const Repeat<std::optional<Tensor>, I>&... states0, const std::vector<Tensor>& weights,
                            Maybe batch_sizes, Maybe lengths, bool bidirectional, const Tensor& y, const Tensor& saved,
                            const Repeat<Tensor, J>&... memories, bool need_dx, bool need_dw, bool bias, bool projected,
                            bool peephole, int64_t heads, Maybe reset, Maybe zoneout_h, Maybe zoneout_c,
                            Maybe candidate, Maybe variational, const std::vector<double>& numbers,
                            const Repeat<std::optional<Tensor>, J>&... dmemories) {
    const OptionOpArgs variant{bias,      projected, peephole,  heads,       reset,
                               zoneout_h, zoneout_c, candidate, variational, numbers};
    const LayerOpArgs given{x, {&states0...}, weights, batch_sizes, lengths, bidirectional, variant};
    std::array<const std::optional<Tensor>*, 2 * kMaxStates> upstream{&dy};
    ((upstream[1 + I] = &dstates), ...);
    ((upstream[1 + kMaxStates + J] = &dmemories), ...);
    const auto out = backward_layer(kKind, given, upstream, {&y, &saved, &memories...}, need_dx, need_dw);
    return {out.dx, out.dstates[I]..., out.dw};
  }
};

template <CellKind kKind>
void implement(Library& m) {
  constexpr CellShape kShape = shape_of(kKind);
  using Ops = OpsOf<kKind, std::make_index_sequence<kShape.states>, std::make_index_sequence<kShape.states - 1>>;
  const std::string name = kShape.name;
  m.impl(name.c_str(), TORCH_BOX(&Ops::infer));
  m.impl((name + "_forward").c_str(), TORCH_BOX(&Ops::forward));
  m.impl((name + "_backward").c_str(), TORCH_BOX(&Ops::backward));
}

template <size_t... K>
void implement_all(Library& m, std::index_sequence<K...>) {
  (implement<kCellKinds[K]>(m), ...);
}

}  // namespace

void implement_layers(Library& m) { implement_all(m, std::make_index_sequence<std::size(kCellKinds)>()); }

}  // namespace seqkernels
