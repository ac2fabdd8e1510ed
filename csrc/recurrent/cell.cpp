// Ops of one step without options: the layer's kernels with T = 1, on CPU or
// CUDA, with minimal overhead.
//
// At B = 1 and H = 32 a step computes for a microsecond and the call dominates,
// so these ops have no tensor lists, no options and no tensors that only
// sequences need. x is [B, D], states are [B, H]; or [D] and [H], one sequence.

#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "common/allocate.h"
#include "common/parallel.h"
#include "common/registration.h"
#include "recurrent/ops.h"

namespace seqkernels {

namespace {

using Maybe = const std::optional<Tensor>&;

constexpr bool kPlain = false;  // without options

// The inputs of a step, checked without heap allocation.
struct Step {
  const char* const kind;
  const char* const suffix;
  const CellShape cell;
  const Tensor& x;
  const DevicePlace place;
  int32_t dtype;
  bool batched;
  int64_t B, D, H;
  Tensor copies[12];  // contiguous copies: at most all inputs of an LSTM's backward
  int copied = 0;
  static constexpr int64_t kFew = 64;
  int64_t few[2][kFew];
  std::vector<int64_t> many[2];
  int64_t batch_sizes[1], offsets[2];
  CudaLayout layout{};
  const Tensor* on_cuda = nullptr;  // x, if the CUDA launchers run the step

  [[noreturn]] void wrong(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    const Shape wanted = rows < 0 ? Shape{columns} : Shape{rows, columns};
    const std::string op = std::string(kind) + suffix;
    check_device(op, name, t, x);
    if (t.dim() == int64_t(wanted.size())) check_shape(op, name, t, wanted);
    int32_t got;
    aoti_torch_get_dtype(t.get(), &got);
    if (got != dtype) fail(op, ": ", name, " must have the dtype of x, got ", dtype_name(t.scalar_type()));
    fail(op, ": ", name, " must have shape ", show(wanted), ", got ", show(shape_of(t)));
  }

  // The contiguous data of a [rows, columns] tensor; [columns] where rows is
  // below 0.
  const void* take(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    const int64_t* sizes;
    int64_t dim;
    int32_t type;
    AtenTensorHandle h = t.get();
    aoti_torch_get_dim(h, &dim);
    aoti_torch_get_sizes(h, const_cast<int64_t**>(&sizes));
    aoti_torch_get_dtype(h, &type);
    const bool flat = rows < 0;
    if (type != dtype || DevicePlace(h) != place || dim != 2 - flat || sizes[dim - 1] != columns ||
        (!flat && sizes[0] != rows)) {
      wrong(name, t, rows, columns);
    }
    if (t.is_contiguous()) return t.const_data_ptr();
    copies[copied] = torch::stable::contiguous(t);
    return copies[copied++].const_data_ptr();
  }
  const void* take(const char* name, Maybe t, int64_t rows, int64_t columns) {
    return t ? take(name, *t, rows, columns) : nullptr;
  }

  Step(CellKind of, const char* suffix, const Tensor& x, const std::array<const std::optional<Tensor>*, 2>& states0,
       const Tensor& w_ih, const Tensor& w_hh, Maybe b_ih, Maybe b_hh, RecurrentArgs& args)
      : kind(shape_of(of).name), suffix(suffix), cell(shape_of(of)), x(x), place(x.get()) {
    aoti_torch_get_dtype(x.get(), &dtype);
    const int64_t dim = x.dim();
    batched = dim == 2;
    if (dim != 1 && dim != 2) fail(kind, suffix, ": x must have shape [B, D] or [D], got ", show(shape_of(x)));
    args.dtype = dtype_of(std::string(kind) + suffix, "x", x);
    const bool cuda = runs_on_cuda(x);
    if (!cuda && !x.is_cpu()) check_cpu(std::string(kind) + suffix, "x", x);
    if (w_hh.dim() != 2 || w_hh.size(1) < 1) {
      fail(kind, suffix, ": weight_hh must have shape [", cell.gates, "H, H], got ", show(shape_of(w_hh)));
    }
    B = batched ? x.size(0) : 1;
    D = x.size(dim - 1);
    H = w_hh.size(1);
    for (const int64_t size : {D, H}) {
      if (size > kLargestSize) fail(kind, suffix, ": D and H must be at most ", kLargestSize, ", got ", size);
    }
    const Tensor* dense = &x;
    if (D > 1 && x.stride(dim - 1) != 1) {
      copies[copied] = torch::stable::contiguous(x);
      dense = &copies[copied++];
    }
    args.x = dense->const_data_ptr();
    args.directions = args.heads = 1;
    args.D = D;
    args.H = args.P = H;
    Weights& w = args.weights[0];
    w.w_ih = take("weight_ih", w_ih, cell.gates * H, D);
    w.w_hh = take("weight_hh", w_hh, cell.gates * H, H);
    if (b_ih.has_value() != b_hh.has_value())
      fail(kind, suffix, ": bias_ih and bias_hh must both be given, or neither");
    w.b_ih = take("bias_ih", b_ih, -1, cell.gates * H);
    w.b_hh = take("bias_hh", b_hh, -1, cell.gates * H);
    args.h0 = take("h0", *states0[0], rows(), H);
    if (cell.states > 1) args.c0[0] = take("c0", *states0[1], rows(), H);
    args.options.cell_clip = args.options.gate_clip = std::numeric_limits<double>::infinity();
    args.options.candidate_scale = 1;
    args.saved_rows = B;
    args.saved_width = saved_width(cell, H, false);

    if (cuda) {
      args.walk = {B > 0, B, B, nullptr, nullptr, nullptr, nullptr, nullptr};
      layout.x_across = batched ? dense->stride(0) : 0;
      layout.tf32 = allows_tf32();
      on_cuda = dense;
      return;
    }
    int64_t *identity = few[0], *x_offsets = few[1];
    if (B > kFew) {
      for (auto& v : many) v.resize(B);
      identity = many[0].data();
      x_offsets = many[1].data();
    }
    const int64_t stride = batched ? dense->stride(0) : 0;
    for (int64_t b = 0; b < B; ++b) {
      identity[b] = b;
      x_offsets[b] = b * stride;
    }
    batch_sizes[0] = B;
    offsets[0] = 0;
    offsets[1] = B;
    args.walk = {B > 0, B, B, batch_sizes, offsets, identity, identity, x_offsets};
    args.plan = plan_recurrent(args, of, thread_count());
  }

  int64_t rows() const { return batched ? B : -1; }

  Tensor make(int64_t rows, int64_t columns) const { return allocate(place, dtype, rows, columns); }

  void run(CellKind of, const ForwardArgs& args) const {
    if (on_cuda != nullptr) return run_on_cuda(std::string(kind) + suffix, of, args, layout, *on_cuda);
    kernels(of, kPlain).forward(args);
  }
  void run(CellKind of, const BackwardArgs& args) const {
    if (on_cuda != nullptr) return run_on_cuda(std::string(kind) + suffix, of, args, layout, *on_cuda);
    kernels(of, kPlain).backward(args);
  }
};

template <CellKind kKind, class States>
struct CellOps;

template <CellKind kKind, size_t... I>
struct CellOps<kKind, std::index_sequence<I...>> {
  static constexpr size_t kStates = sizeof...(I);
  using States = std::tuple<Repeat<Tensor, I>...>;
  using Kept = std::tuple<Repeat<Tensor, I>..., Tensor>;

  static States infer(const Tensor& x, const Repeat<std::optional<Tensor>, I>&... states0, const Tensor& w_ih,
                      const Tensor& w_hh, Maybe b_ih, Maybe b_hh) {
    ForwardArgs args{};
    Step step(kKind, "_cell", x, {&states0...}, w_ih, w_hh, b_ih, b_hh, args);
    States states{Repeat<Tensor, I>(step.make(step.rows(), step.H))...};
    args.y = std::get<0>(states).mutable_data_ptr();
    if constexpr (kStates > 1) args.cells[0] = std::get<1>(states).mutable_data_ptr();
    step.run(kKind, args);
    return states;
  }

  static Kept forward(const Tensor& x, const Repeat<std::optional<Tensor>, I>&... states0, const Tensor& w_ih,
                      const Tensor& w_hh, Maybe b_ih, Maybe b_hh) {
    ForwardArgs args{};
    Step step(kKind, "_cell_forward", x, {&states0...}, w_ih, w_hh, b_ih, b_hh, args);
    Kept kept{Repeat<Tensor, I>(step.make(step.rows(), step.H))..., step.make(step.B, args.saved_width)};
    args.y = std::get<0>(kept).mutable_data_ptr();
    if constexpr (kStates > 1) args.cells[0] = std::get<1>(kept).mutable_data_ptr();
    args.saved = std::get<kStates>(kept).mutable_data_ptr();
    step.run(kKind, args);
    return kept;
  }

  // Gradients of x, each state, w_ih, w_hh, b_ih and, where it differs, b_hh.
  // Those not required are undefined.
  static auto backward(const Repeat<std::optional<Tensor>, I>&... dstates, const Tensor& x,
                       const Repeat<std::optional<Tensor>, I>&... states0, const Tensor& w_ih, const Tensor& w_hh,
                       Maybe b_ih, Maybe b_hh, const Repeat<Tensor, I>&... states, const Tensor& saved, bool need_dx,
                       bool need_states, bool need_dw) {
    BackwardArgs args{};
    Step step(kKind, "_cell_backward", x, {&states0...}, w_ih, w_hh, b_ih, b_hh, args);
    const std::array<const std::optional<Tensor>*, kStates> upstream{&dstates...}, before{&states0...};
    const std::array<const Tensor*, kStates> now{&states...};
    const int64_t rows = step.rows(), H = step.H, G = step.cell.gates * H;
    args.dh_n = step.take("dh", *upstream[0], rows, H);
    args.y = step.take("h", *now[0], rows, H);
    if constexpr (kStates > 1) {
      args.dc_n[0] = step.take("dc", *upstream[1], rows, H);
      args.cells[0] = step.take("c", *now[1], rows, H);
    }
    args.saved = step.take("saved", saved, step.B, args.saved_width);
    args.weights_wanted = need_dw;
    const auto give = [&](bool wanted, int64_t n, int64_t columns, void*& to) {
      if (!wanted) return Tensor();
      Tensor t = step.make(n, columns);
      to = t.mutable_data_ptr();
      return t;
    };
    WeightGradients& dw = args.dw[0];
    void** const dstates0[] = {&args.dh0, &args.dc0[0]};
    Tensor dx = give(need_dx, rows, step.D, args.dx);
    std::array<Tensor, kStates> ds{give(need_states && *before[I], rows, H, *dstates0[I])...};
    Tensor dw_ih = give(need_dw, G, step.D, dw.w_ih), dw_hh = give(need_dw, G, H, dw.w_hh);
    Tensor db_ih = give(need_dw && b_ih, -1, G, dw.b_ih);
    if constexpr (shape_of(kKind).separate) {
      Tensor db_hh = give(need_dw && b_hh, -1, G, dw.b_hh);
      step.run(kKind, args);
      return std::make_tuple(dx, ds[I]..., dw_ih, dw_hh, db_ih, db_hh);
    } else {
      step.run(kKind, args);
      return std::make_tuple(dx, ds[I]..., dw_ih, dw_hh, db_ih);
    }
  }
};

template <CellKind kKind>
void implement(Library& m) {
  constexpr CellShape kShape = shape_of(kKind);
  using Ops = CellOps<kKind, std::make_index_sequence<kShape.states>>;
  const std::string name = std::string(kShape.name) + "_cell";
  m.impl(name.c_str(), TORCH_BOX(&Ops::infer));
  m.impl((name + "_forward").c_str(), TORCH_BOX(&Ops::forward));
  m.impl((name + "_backward").c_str(), TORCH_BOX(&Ops::backward));
}

template <size_t... K>
void implement_all(Library& m, std::index_sequence<K...>) {
  const auto one = [&m](auto k) {
    constexpr CellKind kKind = kCellKinds[decltype(k)::value];
    if constexpr (shape_of(kKind).step) implement<kKind>(m);
  };
  (one(std::integral_constant<size_t, K>{}), ...);
}

}  // namespace

void implement_cells(Library& m) { implement_all(m, std::make_index_sequence<std::size(kCellKinds)>()); }

}  // namespace seqkernels
