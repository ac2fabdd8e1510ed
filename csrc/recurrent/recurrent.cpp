// Recurrent layers: checks, allocation, launch. Each cell has three ops: inference, forward that saves, backward.
#include "recurrent/recurrent.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace seqkernels {

namespace {

constexpr const char* name_of(CellKind kind) {
  switch (kind) {
    case CellKind::kLSTM:
      return "lstm";
    case CellKind::kGRU:
      return "gru";
    case CellKind::kRNNTanh:
      return "rnn_tanh";
    case CellKind::kRNNRelu:
      return "rnn_relu";
  }
  return "";
}

RecurrentKernels kernels(CellKind kind) {
  switch (current_isa()) {
#ifdef SEQKERNELS_HAVE_AVX512
    case Isa::kAvx512:
      return avx512::recurrent_kernels(kind);
#endif
#ifdef SEQKERNELS_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::recurrent_kernels(kind);
#endif
    default:
      return portable::recurrent_kernels(kind);
  }
}

// The checked inputs of a layer, and what they point to: alive as long as the arguments of a kernel.
struct LayerInputs {
  const std::string op;
  const CellShape cell;
  Tensor x;
  std::optional<Tensor> h0, c0;
  std::vector<Tensor> weights;
  bool packed;
  std::vector<int64_t> batch_sizes, offsets, sequence, rows, x_offsets;
  Shape outer;  // [T, B] or [N]: the leading dimensions of x and y

  LayerInputs(const std::string& op, CellKind kind, const Tensor& x_in, const std::optional<Tensor>& h0_in,
              const std::optional<Tensor>& c0_in, const std::vector<Tensor>& weights_in,
              const std::optional<Tensor>& sizes, const std::optional<Tensor>& lengths, bool bidirectional,
              RecurrentArgs& args)
      : op(op), cell(shape_of(kind)), x(x_in), packed(sizes.has_value()) {
    args.dtype = dtype_of(op, "x", x);
    args.directions = bidirectional ? 2 : 1;
    check_cpu(op, "x", x);
    if (packed && lengths) fail(op, ": lengths must be absent where batch_sizes is given, got both");
    if (x.dim() != (packed ? 2 : 3)) {
      fail(op, ": x must have ", packed ? "2 dimensions [N, D]" : "3 dimensions [T, B, D]", ", got ",
           show(shape_of(x)));
    }
    args.D = x.size(-1 + x.dim());
    if (args.D > 1 && x.numel() > 0 && x.stride(x.dim() - 1) != 1) x = torch::stable::contiguous(x);
    take_weights(weights_in, args);
    if (packed) {
      take_batch_sizes(*sizes, args.walk);
    } else {
      take_padded(lengths, args.walk);
    }
    outer = shape_of(x);
    outer.pop_back();
    if (h0_in) h0 = checked(op, "h0", *h0_in, x.scalar_type(), {args.directions, args.walk.B, args.P});
    if (c0_in) c0 = checked(op, "c0", *c0_in, x.scalar_type(), {args.directions, args.walk.B, args.H});
    args.x = x.const_data_ptr();
    args.h0 = h0 ? h0->const_data_ptr() : nullptr;
    args.c0 = c0 ? c0->const_data_ptr() : nullptr;
    args.walk.batch_sizes = batch_sizes.data();
    args.walk.offsets = offsets.data();
    args.walk.sequence = sequence.data();
    args.walk.rows = rows.data();
    args.walk.x_offsets = x_offsets.data();
    args.plan = plan_recurrent(args, cell.gates, thread_count());
  }

  int64_t weights_each(int64_t directions) const { return static_cast<int64_t>(weights.size()) / directions; }

  Shape y_shape(const RecurrentArgs& args) const {
    Shape shape = outer;
    shape.push_back(args.directions * args.P);
    return shape;
  }
  // Rows of a padded batch that no sequence has must read as zero.
  bool padding_exists(const Walk& walk) const { return !packed && walk.N < walk.T * walk.B; }

 private:
  void take_weights(const std::vector<Tensor>& given, RecurrentArgs& args) {
    const int64_t each = static_cast<int64_t>(given.size()) / args.directions;
    if (each < 2 || each > 5 || each * args.directions != static_cast<int64_t>(given.size())) {
      fail(op, ": weights must hold w_ih, w_hh[, b_ih, b_hh][, w_hr] for each of ", args.directions,
           " directions, got ", given.size(), " tensors");
    }
    const bool bias = each >= 4, projected = each == 3 || each == 5;
    if (projected && !cell.has_c)
      fail(op, ": weights must not hold a projection, got ", each, " tensors per direction");
    const Tensor& w_hh = given[1];
    const std::string G_by = (cell.gates > 1 ? std::to_string(cell.gates) : "") + "H, ";
    if (w_hh.dim() != 2 || w_hh.size(0) % cell.gates != 0 || w_hh.size(0) == 0 || w_hh.size(1) == 0) {
      fail(op, ": weight_hh must have shape [", G_by, projected ? "P" : "H", "], got ", show(shape_of(w_hh)));
    }
    args.H = w_hh.size(0) / cell.gates;
    args.P = w_hh.size(1);
    const int64_t G = cell.gates * args.H;
    if (!projected && args.P != args.H) {
      fail(op, ": weight_hh must have shape [", G_by, "H] = ", show({G, args.H}), ", got ", show(shape_of(w_hh)));
    }
    weights.reserve(given.size());
    for (int64_t d = 0; d < args.directions; ++d) {
      const auto take = [&](const char* name, const Shape& shape) -> const void* {
        weights.push_back(checked(op, name, given[weights.size()], x.scalar_type(), shape));
        return weights.back().const_data_ptr();
      };
      Weights& w = args.weights[d];
      w = {};
      w.w_ih = take("weight_ih", {G, args.D});
      w.w_hh = take("weight_hh", {G, args.P});
      if (bias) {
        w.b_ih = take("bias_ih", {G});
        w.b_hh = take("bias_hh", {G});
      }
      if (projected) w.w_hr = take("weight_hr", {args.P, args.H});
    }
  }

  void take_batch_sizes(const Tensor& sizes, Walk& walk) {
    check_cpu(op, "batch_sizes", sizes);
    check_dtype(op, "batch_sizes", sizes, ScalarType::Long);
    if (sizes.dim() != 1) fail(op, ": batch_sizes must have 1 dimension, got ", show(shape_of(sizes)));
    const Tensor contiguous = sizes.is_contiguous() ? sizes : torch::stable::contiguous(sizes);
    const int64_t* from = static_cast<const int64_t*>(contiguous.const_data_ptr());
    walk.T = sizes.size(0);
    walk.N = x.size(0);
    batch_sizes.assign(from, from + walk.T);
    walk.B = walk.T > 0 ? from[0] : 0;
    for (int64_t t = 0; t < walk.T; ++t) {
      if (from[t] < 1 || (t > 0 && from[t] > from[t - 1])) {
        fail(op, ": batch_sizes must be positive and non-increasing, got ", from[t], " at step ", t,
             t > 0 ? " after " + std::to_string(from[t - 1]) : std::string());
      }
      // Checked as it grows, so that no sum of huge entries overflows.
      if (from[t] > walk.N) fail(op, ": batch_sizes must sum to the rows of x, ", walk.N, ", got ", from[t], " in one");
    }
    fill_offsets(walk);
    if (offsets.back() != walk.N) {
      fail(op, ": batch_sizes must sum to the rows of x, ", walk.N, ", got ", offsets.back());
    }
    sequence.resize(walk.B);
    std::iota(sequence.begin(), sequence.end(), 0);
    rows.resize(walk.N);
    std::iota(rows.begin(), rows.end(), 0);
    x_offsets.resize(walk.N);
    for (int64_t n = 0; n < walk.N; ++n) x_offsets[n] = n * x.stride(0);
  }

  void take_padded(const std::optional<Tensor>& given, Walk& walk) {
    walk.T = x.size(0);
    walk.B = x.size(1);
    sequence.resize(walk.B);
    std::iota(sequence.begin(), sequence.end(), 0);
    if (!given) {
      batch_sizes.assign(walk.T, walk.B);
    } else {
      const Tensor lengths = checked(op, "lengths", *given, ScalarType::Long, {walk.B});
      const int64_t* length = static_cast<const int64_t*>(lengths.const_data_ptr());
      batch_sizes.assign(walk.T, 0);
      for (int64_t b = 0; b < walk.B; ++b) {
        if (length[b] < 0 || length[b] > walk.T) {
          fail(op, ": lengths must lie in [0, T] = [0, ", walk.T, "], got ", length[b], " at ", b);
        }
        if (length[b] > 0) ++batch_sizes[length[b] - 1];
      }
      for (int64_t t = walk.T - 2; t >= 0; --t) batch_sizes[t] += batch_sizes[t + 1];
      std::stable_sort(sequence.begin(), sequence.end(),
                       [length](int64_t a, int64_t b) { return length[a] > length[b]; });
    }
    fill_offsets(walk);
    walk.N = offsets.back();
    rows.resize(walk.N);
    x_offsets.resize(walk.N);
    const int64_t step = x.stride(0), across = x.stride(1);
    for (int64_t t = 0; t < walk.T; ++t) {
      for (int64_t j = 0; j < batch_sizes[t]; ++j) {
        rows[offsets[t] + j] = t * walk.B + sequence[j];
        x_offsets[offsets[t] + j] = t * step + sequence[j] * across;
      }
    }
  }

  void fill_offsets(const Walk& walk) {
    offsets.resize(walk.T + 1);
    offsets[0] = 0;
    for (int64_t t = 0; t < walk.T; ++t) offsets[t + 1] = offsets[t] + batch_sizes[t];
  }
};

struct LayerOutputs {
  Tensor y, h_n;
  std::optional<Tensor> c_n, saved, cells;
};

// Room for what backward needs: one row for each row of y, of which the real tokens' come first.
Shape saved_shape(const LayerInputs& in, const RecurrentArgs& args, int64_t width) {
  return {args.directions, std::accumulate(in.outer.begin(), in.outer.end(), int64_t{1}, std::multiplies<>()), width};
}

// What no real token fills reads as zero: a value, whatever the allocator left there.
void zero_unused(const Tensor& saved, const RecurrentArgs& args) {
  const int64_t row = saved.size(2) * static_cast<int64_t>(saved.element_size());
  char* data = static_cast<char*>(saved.mutable_data_ptr());
  for (int64_t d = 0; d < args.directions; ++d) {
    std::memset(data + (d * saved.size(1) + args.walk.N) * row, 0, (saved.size(1) - args.walk.N) * row);
  }
}

enum class Keep { kNothing, kForBackward };

LayerOutputs forward_layer(CellKind kind, Keep keep, const Tensor& x, const std::optional<Tensor>& h0,
                           const std::optional<Tensor>& c0, const std::vector<Tensor>& weights,
                           const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                           bool bidirectional) {
  ForwardArgs args{};
  const std::string op = std::string(name_of(kind)) + (keep == Keep::kNothing ? "" : "_forward");
  const LayerInputs in(op, kind, x, h0, c0, weights, batch_sizes, lengths, bidirectional, args);
  const Shape y_shape = in.y_shape(args), h_shape{args.directions, args.walk.B, args.P},
              c_shape{args.directions, args.walk.B, args.H};
  LayerOutputs out{in.padding_exists(args.walk) ? zeros_like_dtype(in.x, y_shape) : empty_like_dtype(in.x, y_shape),
                   empty_like_dtype(in.x, h_shape),
                   {},
                   {},
                   {}};
  const auto make = [&](std::optional<Tensor>& tensor, const Shape& shape) {
    tensor = empty_like_dtype(in.x, shape);
    return tensor->mutable_data_ptr();
  };
  args.y = out.y.mutable_data_ptr();
  args.h_n = out.h_n.mutable_data_ptr();
  if (in.cell.has_c) args.c_n = make(out.c_n, c_shape);
  if (keep == Keep::kForBackward) {
    args.saved = make(out.saved, saved_shape(in, args, in.cell.saved * args.H));
    if (in.cell.has_c) args.cells = make(out.cells, saved_shape(in, args, args.H));
    args.saved_rows = out.saved->size(1);
    if (in.padding_exists(args.walk)) {
      zero_unused(*out.saved, args);
      if (out.cells) zero_unused(*out.cells, args);
    }
  }
  kernels(kind).forward(args);
  return out;
}

struct LayerGradients {
  Tensor dx, dh0, dc0;
  std::vector<Tensor> dw;
};

LayerGradients backward_layer(CellKind kind, const std::optional<Tensor>& dy, const std::optional<Tensor>& dh_n,
                              const std::optional<Tensor>& dc_n, const Tensor& x, const std::optional<Tensor>& h0,
                              const std::optional<Tensor>& c0, const std::vector<Tensor>& weights,
                              const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                              bool bidirectional, const Tensor& y, const Tensor& saved,
                              const std::optional<Tensor>& cells, bool need_dx, bool need_dw) {
  const std::string op = std::string(name_of(kind)) + "_backward";
  BackwardArgs args{};
  const LayerInputs in(op, kind, x, h0, c0, weights, batch_sizes, lengths, bidirectional, args);
  const ScalarType dtype = in.x.scalar_type();
  const Shape h_shape{args.directions, args.walk.B, args.P}, c_shape{args.directions, args.walk.B, args.H};
  std::vector<Tensor> kept;
  const auto take = [&](const char* name, const std::optional<Tensor>& t, const Shape& shape) -> const void* {
    if (!t) return nullptr;
    kept.push_back(checked(op, name, *t, dtype, shape));
    return kept.back().const_data_ptr();
  };
  args.dy = take("dy", dy, in.y_shape(args));
  args.dh_n = take("dh_n", dh_n, h_shape);
  args.dc_n = take("dc_n", dc_n, c_shape);
  args.y = take("y", y, in.y_shape(args));
  args.saved_rows = saved_shape(in, args, 0)[1];
  args.saved = take(in.cell.has_c ? "gates" : "saved", saved, saved_shape(in, args, in.cell.saved * args.H));
  args.cells = take("cells", cells, saved_shape(in, args, args.H));

  const Shape none{0};
  LayerGradients out;
  out.dx = !need_dx                       ? empty_like_dtype(in.x, none)
           : in.padding_exists(args.walk) ? zeros_like_dtype(in.x, shape_of(in.x))
                                          : empty_like_dtype(in.x, shape_of(in.x));
  out.dh0 = empty_like_dtype(in.x, h0 ? h_shape : none);
  out.dc0 = empty_like_dtype(in.x, c0 ? c_shape : none);
  args.dx = need_dx ? out.dx.mutable_data_ptr() : nullptr;
  args.dh0 = h0 ? out.dh0.mutable_data_ptr() : nullptr;
  args.dc0 = c0 ? out.dc0.mutable_data_ptr() : nullptr;
  args.weights_wanted = need_dw;
  if (need_dw) {
    for (const Tensor& w : in.weights) out.dw.push_back(empty_like_dtype(w, shape_of(w)));
    const int64_t each = static_cast<int64_t>(in.weights.size()) / args.directions;
    for (int64_t d = 0; d < args.directions; ++d) {
      const auto at = [&](int64_t i) { return out.dw[d * each + i].mutable_data_ptr(); };
      WeightGradients& to = args.dw[d];
      to = {at(0), at(1), nullptr, nullptr, nullptr};
      if (args.weights[d].b_ih != nullptr) {
        to.b_ih = at(2);
        to.b_hh = at(3);
      }
      if (args.weights[d].w_hr != nullptr) to.w_hr = at(each - 1);
    }
  }
  kernels(kind).backward(args);
  return out;
}

}  // namespace

// ---- cells with one state, h ----

template <CellKind kKind>
std::tuple<Tensor, Tensor> layer(const Tensor& x, const std::optional<Tensor>& h0, const std::vector<Tensor>& weights,
                                 const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                                 bool bidirectional) {
  LayerOutputs out =
      forward_layer(kKind, Keep::kNothing, x, h0, std::nullopt, weights, batch_sizes, lengths, bidirectional);
  return {out.y, out.h_n};
}

template <CellKind kKind>
std::tuple<Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const std::optional<Tensor>& h0,
                                                 const std::vector<Tensor>& weights,
                                                 const std::optional<Tensor>& batch_sizes,
                                                 const std::optional<Tensor>& lengths, bool bidirectional) {
  LayerOutputs out =
      forward_layer(kKind, Keep::kForBackward, x, h0, std::nullopt, weights, batch_sizes, lengths, bidirectional);
  return {out.y, out.h_n, *out.saved};
}

template <CellKind kKind>
std::tuple<Tensor, Tensor, std::vector<Tensor>> layer_backward(
    const std::optional<Tensor>& dy, const std::optional<Tensor>& dh_n, const Tensor& x,
    const std::optional<Tensor>& h0, const std::vector<Tensor>& weights, const std::optional<Tensor>& batch_sizes,
    const std::optional<Tensor>& lengths, bool bidirectional, const Tensor& y, const Tensor& saved, bool need_dx,
    bool need_dw) {
  LayerGradients out = backward_layer(kKind, dy, dh_n, std::nullopt, x, h0, std::nullopt, weights, batch_sizes, lengths,
                                      bidirectional, y, saved, std::nullopt, need_dx, need_dw);
  return {out.dx, out.dh0, out.dw};
}

// ---- LSTM: two states ----

std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& x, const std::optional<Tensor>& h0,
                                        const std::optional<Tensor>& c0, const std::vector<Tensor>& weights,
                                        const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                                        bool bidirectional) {
  LayerOutputs out =
      forward_layer(CellKind::kLSTM, Keep::kNothing, x, h0, c0, weights, batch_sizes, lengths, bidirectional);
  return {out.y, out.h_n, *out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& x, const std::optional<Tensor>& h0,
                                                                const std::optional<Tensor>& c0,
                                                                const std::vector<Tensor>& weights,
                                                                const std::optional<Tensor>& batch_sizes,
                                                                const std::optional<Tensor>& lengths,
                                                                bool bidirectional) {
  LayerOutputs out =
      forward_layer(CellKind::kLSTM, Keep::kForBackward, x, h0, c0, weights, batch_sizes, lengths, bidirectional);
  return {out.y, out.h_n, *out.c_n, *out.saved, *out.cells};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward(
    const std::optional<Tensor>& dy, const std::optional<Tensor>& dh_n, const std::optional<Tensor>& dc_n,
    const Tensor& x, const std::optional<Tensor>& h0, const std::optional<Tensor>& c0,
    const std::vector<Tensor>& weights, const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
    bool bidirectional, const Tensor& y, const Tensor& gates, const Tensor& cells, bool need_dx, bool need_dw) {
  LayerGradients out = backward_layer(CellKind::kLSTM, dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, lengths,
                                      bidirectional, y, gates, cells, need_dx, need_dw);
  return {out.dx, out.dh0, out.dc0, out.dw};
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm));
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("gru", TORCH_BOX(&layer<CellKind::kGRU>));
  m.impl("gru_forward", TORCH_BOX(&layer_forward<CellKind::kGRU>));
  m.impl("gru_backward", TORCH_BOX(&layer_backward<CellKind::kGRU>));
  m.impl("rnn_tanh", TORCH_BOX(&layer<CellKind::kRNNTanh>));
  m.impl("rnn_tanh_forward", TORCH_BOX(&layer_forward<CellKind::kRNNTanh>));
  m.impl("rnn_tanh_backward", TORCH_BOX(&layer_backward<CellKind::kRNNTanh>));
  m.impl("rnn_relu", TORCH_BOX(&layer<CellKind::kRNNRelu>));
  m.impl("rnn_relu_forward", TORCH_BOX(&layer_forward<CellKind::kRNNRelu>));
  m.impl("rnn_relu_backward", TORCH_BOX(&layer_backward<CellKind::kRNNRelu>));
}

}  // namespace seqkernels
