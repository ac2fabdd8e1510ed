// Prepared recurrent layers: packing of weights, and ops that run all layers and directions of a module in one call.
#if !defined(SEQKERNELS_EMULATE_CUDA)  // the test module has no CPU kernels

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "common/allocate.h"
#include "common/bytes.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/registration.h"
#include "recurrent/ops.h"
#include "recurrent/walk.h"

namespace seqkernels {

namespace {

using Maybe = const std::optional<Tensor>&;

PackedKernels packed_kernels() {
#if defined(SEQKERNELS_HAVE_AVX512_VNNI)
  if (current_isa() == Isa::kAvx512 && has_vnni(Isa::kAvx512)) return avx512_vnni::packed_kernels();
#endif
#if defined(SEQKERNELS_HAVE_AVX2_VNNI)
  if (current_isa() == Isa::kAvx2 && has_vnni(Isa::kAvx2)) return avx2_vnni::packed_kernels();
#endif
  SEQKERNELS_RETURN_ON_CURRENT_ISA(packed_kernels);
}

Precision precision_of(const std::string& op, int64_t precision) {
  if (precision < 0 || precision >= kPrecisions) {
    fail(op, ": precision must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (int8), got ", precision);
  }
  return static_cast<Precision>(precision);
}

ScalarType storage_of(Precision precision) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char};
  return kTypes[static_cast<int>(precision)];
}

// ---- packing

// The parts of a weight: the panels of each stage of each head.
struct Packing {
  Precision precision;
  int64_t gates, first, heads, H, K;  // H of a head; gates [0, first) are those of the first stage

  int64_t gates_of(int stage) const { return stage == 0 ? first : gates - first; }
  PanelLayout layout(int stage) const { return {precision, gates_of(stage), H, K}; }
  int64_t bytes() const {
    int64_t total = 0;
    for (int stage = 0; stage < 2; ++stage) total += gates_of(stage) > 0 ? layout(stage).bytes() : 0;
    return total * heads;
  }
  // Calls f(row of the weight, its panel, layout, gate within the layout, column within the panel).
  template <class F>
  void each_row(char* packed, F&& f) const {
    for (int64_t head = 0; head < heads; ++head) {
      for (int stage = 0; stage < 2; ++stage) {
        if (gates_of(stage) == 0) continue;
        const PanelLayout of = layout(stage);
        for (int64_t gate = 0; gate < of.gates; ++gate) {
          for (int64_t u = 0; u < H; ++u) {
            const int64_t row = ((stage == 0 ? 0 : first) + gate) * H * heads + head * H + u;
            f(row, packed + u / of.columns() * of.panel_bytes(), of, gate, u % of.columns());
          }
        }
        packed += of.bytes();
      }
    }
  }
};

Packing packing_of(const std::string& op, int64_t rows, int64_t K, int64_t gates, int64_t first, int64_t heads,
                   int64_t precision) {
  const Precision of = precision_of(op, precision);
  if (gates < 1 || gates > 4 || first < 1 || first > gates) {
    fail(op, ": gates must lie in [1, 4] and first in [1, gates], got ", gates, " and ", first);
  }
  if (heads < 1 || heads > rows || rows % (gates * heads) != 0) {
    fail(op, ": gates * heads must divide the rows of weight, ", rows, ", got ", gates, " * ", heads);
  }
  if (of == Precision::kInt8 && K > kMostInt8Depth) {
    fail(op, ": weight must have at most ", kMostInt8Depth, " columns in int8, got ", K);
  }
  return {of, gates, first, heads, rows / gates / heads, K};
}

std::tuple<Tensor, Tensor> pack(const Tensor& given, int64_t gates, int64_t first, int64_t heads, int64_t precision) {
  const std::string op = "recurrent_pack";
  check_cpu(op, "weight", given);
  if (given.dim() != 2) fail(op, ": weight must have 2 dimensions, got ", show(shape_of(given)));
  const Tensor weight = checked(op, "weight", given, ScalarType::Float, shape_of(given), given);
  const int64_t rows = weight.size(0), K = weight.size(1);
  const Packing packing = packing_of(op, rows, K, gates, first, heads, precision);
  const int64_t bytes = packing.bytes();
  const bool int8 = packing.precision == Precision::kInt8;
  Tensor packed =
      torch::stable::new_empty(weight, Shape{bytes / bytes_of(packing.precision)}, storage_of(packing.precision));
  Tensor scales = torch::stable::new_empty(weight, Shape{int8 ? rows : 0});
  char* const to = static_cast<char*>(packed.mutable_data_ptr());
  zero_bytes(to, bytes);
  float* const scale_of = static_cast<float*>(scales.mutable_data_ptr());
  const float* const from = static_cast<const float*>(weight.const_data_ptr());
  packing.each_row(to, [&](int64_t row, char* panel, const PanelLayout& of, int64_t gate, int64_t column) {
    const float* const w = from + row * K;
    const auto put = [&](int64_t k, auto value) {
      std::memcpy(panel + of.index(gate, column, k) * int64_t{sizeof value}, &value, sizeof value);
    };
    switch (packing.precision) {
      case Precision::kFloat32:
        for (int64_t k = 0; k < K; ++k) put(k, w[k]);
        return;
      case Precision::kBFloat16:
        for (int64_t k = 0; k < K; ++k) put(k, c10::BFloat16(w[k]).x);
        return;
      case Precision::kFloat16:
        for (int64_t k = 0; k < K; ++k) put(k, c10::Half(w[k]).x);
        return;
      case Precision::kInt8:
        break;
    }
    float largest = 0;
    bool finite = true;
    for (int64_t k = 0; k < K; ++k) {
      finite = finite && std::isfinite(w[k]);
      largest = std::max(largest, std::abs(w[k]));
    }
    const bool empty = !finite || largest < 0x1p-100f;
    scale_of[row] = !finite ? std::numeric_limits<float>::quiet_NaN() : empty ? 0.0f : largest / 127.0f;
    const float inverse = empty ? 0.0f : 127.0f / largest;
    int32_t sum = 0, of_negative = 0;
    for (int64_t k = 0; k < K && !empty; ++k) {
      const auto value = static_cast<int8_t>(std::clamp(std::nearbyint(w[k] * inverse), -127.0f, 127.0f));
      put(k, value);
      sum += value;
      of_negative += value < 0 ? -value : 0;
    }
    const int64_t lane = (gate * of.units() + column / kPackedLanes) * kPackedLanes + column % kPackedLanes;
    char* const sums = panel + of.value_bytes();
    std::memcpy(sums + lane * 4, &sum, 4);
    std::memcpy(sums + (of.vectors() * kPackedLanes + lane) * 4, &of_negative, 4);
  });
  return {packed, scales};
}

Tensor unpack(const Tensor& packed, const Tensor& scales, int64_t rows, int64_t K, int64_t gates, int64_t first,
              int64_t heads, int64_t precision) {
  const std::string op = "recurrent_unpack";
  if (rows < 0 || K < 0) fail(op, ": rows and columns must be at least 0, got ", rows, " and ", K);
  constexpr int64_t kMost = int64_t{1} << 28;  // the bytes of the packed weight cannot overflow
  if (rows > kMost || K > kMost) fail(op, ": rows and columns must be at most ", kMost, ", got ", rows, " and ", K);
  const Packing packing = packing_of(op, rows, K, gates, first, heads, precision);
  check_cpu(op, "packed", packed);
  const Tensor source = checked(op, "packed", packed, storage_of(packing.precision),
                                {packing.bytes() / bytes_of(packing.precision)}, packed);
  const bool int8 = packing.precision == Precision::kInt8;
  const Tensor factors = checked(op, "scales", scales, ScalarType::Float, {int8 ? rows : 0}, packed);
  Tensor weight = torch::stable::new_empty(packed, Shape{rows, K}, ScalarType::Float);
  float* const to = static_cast<float*>(weight.mutable_data_ptr());
  const float* const scale_of = static_cast<const float*>(factors.const_data_ptr());
  char* const from = static_cast<char*>(const_cast<void*>(source.const_data_ptr()));
  packing.each_row(from, [&](int64_t row, const char* panel, const PanelLayout& of, int64_t gate, int64_t column) {
    for (int64_t k = 0; k < K; ++k) {
      const char* const at = panel + of.index(gate, column, k) * bytes_of(packing.precision);
      uint16_t half;
      float value;
      switch (packing.precision) {
        case Precision::kFloat32:
          std::memcpy(&value, at, 4);
          break;
        case Precision::kInt8:
          value = static_cast<float>(*reinterpret_cast<const int8_t*>(at)) * scale_of[row];
          break;
        default:
          std::memcpy(&half, at, 2);
          value = packing.precision == Precision::kBFloat16
                      ? static_cast<float>(c10::BFloat16(half, c10::BFloat16::from_bits()))
                      : static_cast<float>(c10::Half(half, c10::Half::from_bits()));
      }
      to[row * K + k] = value;
    }
  });
  return weight;
}

// ---- layers

struct PreparedOpArgs {
  const std::string op;
  const CellKind kind;
  const Tensor& x;
  const std::vector<Tensor>& weights;
  const int64_t precision, hidden_size, proj_size, num_layers;
  const bool bidirectional;
  const int64_t heads;
  const bool peephole;
  const std::vector<double>& numbers;  // empty, or cell_clip, gate_clip, zoneout_h, zoneout_c, norm_eps
  Maybe ranges, batch_sizes, lengths, reset;
};

// Reused by the calls of a thread.
struct Scratch {
  WalkArrays arrays;
  std::vector<int64_t> identity, x_offsets;
  std::vector<uint8_t> reset;
};

// The checked inputs of a call.
struct PreparedCall {
  const PreparedOpArgs& given;
  const std::string& op = given.op;
  const CellShape cell = shape_of(given.kind);
  const Precision precision = precision_of(op, given.precision);
  const bool int8 = precision == Precision::kInt8, packed = given.batch_sizes.has_value();
  const int64_t directions = given.bidirectional ? 2 : 1, L = given.num_layers, H = given.hidden_size;
  const int64_t P = given.proj_size > 0 ? given.proj_size : H, heads = given.heads;
  Tensor x;
  bool step;  // x is [B, D]: one step
  Scratch& scratch;
  ForwardArgs args{};
  PreparedLayer layer{};
  std::vector<Tensor> alive;

  explicit PreparedCall(const PreparedOpArgs& of) : given(of), x(of.x), scratch(reused()) {
    check_cpu(op, "x", x);
    check_dtype(op, "x", x, ScalarType::Float);
    step = !packed && x.dim() == 2;
    if (x.dim() != 3 && !step && !(packed && x.dim() == 2)) {
      fail(op, ": x must have shape [T, B, D], [N, D] with batch_sizes, or [B, D] for one step, got ",
           show(shape_of(x)));
    }
    if (H < 1 || L < 1 || given.proj_size < 0) {
      fail(op, ": hidden_size and num_layers must be positive and proj_size at least 0, got ", H, ", ", L, " and ",
           given.proj_size);
    }
    check_cell();
    if (x.numel() > 0 && x.size(x.dim() - 1) > 1 && x.stride(x.dim() - 1) != 1) x = torch::stable::contiguous(x);
    if (step) {
      if (given.lengths) fail(op, ": lengths must be absent for one step");
      scratch.arrays.of_step(x.size(0), x.stride(0), args.walk);
    } else if (packed) {
      if (given.lengths) fail(op, ": lengths must be absent where batch_sizes is given, got both");
      scratch.arrays.of_packed(op, *given.batch_sizes, x, true, args.walk);
    } else {
      scratch.arrays.of_padded(op, given.lengths, x, args.walk);
    }
    scratch.arrays.point(args.walk);
    args.dtype = DType::kFloat32;
    args.directions = directions;
    args.heads = heads;
    check_size(op, "the columns of x", x.size(x.dim() - 1));
    check_size(op, "hidden_size", H);
    check_size(op, "proj_size", given.proj_size);
    args.H = H;
    args.P = P;
    args.prepared = &layer;
    layer.kernels = packed_kernels();
    layer.precision = precision;
    take_options();
    if (given.ranges) {
      alive.push_back(checked(op, "ranges", *given.ranges, ScalarType::Float, {L, 1 + directions}, x));
      ranges = static_cast<const float*>(alive.back().const_data_ptr());
    }
    const size_t each = weights_of_direction();
    if (given.weights.size() != each * L * directions) {
      fail(op, ": weights must hold ", each, " tensors for each of ", L, " layers and ", directions,
           " directions, got ", given.weights.size());
    }
    alive.reserve(alive.size() + given.weights.size());
  }

  Shape state_shape(int64_t which) const {
    const int64_t width = which == 0 ? P : H;
    return step ? Shape{args.walk.B, width} : Shape{L * directions, args.walk.B, width};
  }
  Shape output_shape() const {
    Shape shape = shape_of(x);
    shape.back() = directions * P;
    return shape;
  }

  // states0, states: the address of each state, of all layers; null for zeros.
  void run(float* y, const std::vector<const float*>& states0, const std::vector<float*>& states) {
    const Walk walk = args.walk;
    const int64_t width = directions * P;
    const bool stacked = L > 1;
    const Memory between(stacked ? 2 * walk.N * width * sizeof(float) : 0);
    float* const buffers[] = {reinterpret_cast<float*>(between.get()),
                              reinterpret_cast<float*>(between.get()) + walk.N * width};
    if (stacked) {
      scratch.identity.resize(walk.N);
      scratch.x_offsets.resize(walk.N);
      for (int64_t n = 0; n < walk.N; ++n) {
        scratch.identity[n] = n;
        scratch.x_offsets[n] = n * width;
      }
    }
    size_t next = 0;  // weight
    for (int64_t l = 0; l < L; ++l) {
      const bool last = l == L - 1;
      args.x = l == 0 ? x.const_data_ptr() : buffers[(l - 1) % 2];
      args.D = l == 0 ? x.size(x.dim() - 1) : width;
      args.walk.x_offsets = l == 0 ? walk.x_offsets : scratch.x_offsets.data();
      args.walk.rows = last ? walk.rows : scratch.identity.data();
      args.y = last ? y : buffers[l % 2];
      for (int64_t i = 0; i < cell.states; ++i) {
        const int64_t at = l * directions * walk.B * (i == 0 ? P : H);
        (i == 0 ? args.h0 : args.c0[i - 1]) = states0[i] == nullptr ? nullptr : states0[i] + at;
        (i == 0 ? args.h_n : args.c_n[i - 1]) = states[i] + at;
      }
      for (int64_t d = 0; d < directions; ++d) take_weights(next, d);
      layer.x_range = range(l, 0);
      for (int64_t d = 0; d < directions; ++d) layer.h_range[d] = range(l, 1 + d);
      args.plan = plan_recurrent(args, given.kind, thread_count());
      kernels(given.kind, args.options.any).forward(args);
    }
  }

 private:
  const float* ranges = nullptr;

  static Scratch& reused() {
    thread_local Scratch scratch;
    return scratch;
  }
  float range(int64_t l, int64_t which) const { return ranges == nullptr ? 0 : ranges[l * (1 + directions) + which]; }
  bool two_biases() const { return cell.separate || (cell.norm_groups > 0 && !cell.joint_norm); }

  void check_cell() const {
    const bool projected = given.proj_size > 0;
    if (projected != (cell.projection == Projection::kAlways) && cell.projection != Projection::kMaybe) {
      fail(op, ": proj_size must be ", projected ? "0" : "positive", " for this cell, got ", given.proj_size);
    }
    if (given.peephole && cell.peepholes == 0) fail(op, ": peephole must be false for this cell, got true");
    if (heads < 1 || (heads > 1 && (!cell.heads || projected)) || H % std::max<int64_t>(heads, 1) != 0) {
      fail(op, ": heads must divide hidden_size, and be 1 for a projection or a cell without heads, got ", heads);
    }
    if (step && (L > 1 || directions > 1)) fail(op, ": x must have 3 dimensions for several layers or directions");
  }

  size_t weights_of_direction() const {
    const size_t matrices = 2 + (given.proj_size > 0) + 2 * (cell.inner_gates > 0);
    return matrices * (int8 ? 2 : 1) + (two_biases() ? 2 : 1) + given.peephole + 2 * (cell.norm_groups > 0) +
           2 * cell.norm_c + (cell.inner_gates > 0);
  }

  PackedMatrix take_matrix(const char* name, size_t& next, int64_t gates, int64_t first, int64_t of_heads,
                           int64_t columns, int64_t depth) {
    if (int8 && depth > kMostInt8Depth) fail(op, ": ", name, " must have at most ", kMostInt8Depth, " columns in int8");
    const Packing packing{precision, gates, first, of_heads, columns, depth};
    PackedMatrix matrix{
        static_cast<const char*>(take(name, next, storage_of(precision), packing.bytes() / bytes_of(precision))),
        nullptr};
    if (int8) {
      matrix.scales = static_cast<const float*>(take("scale", next, ScalarType::Float, gates * of_heads * columns));
    }
    return matrix;
  }
  const void* take(const char* name, size_t& next, ScalarType type, int64_t size) {
    const Tensor& t = given.weights[next++];
    if (t.is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.size(0) == size && t.is_contiguous()) {
      return t.const_data_ptr();
    }
    alive.push_back(checked(op, name, t, type, {size}, x));
    return alive.back().const_data_ptr();
  }

  void take_weights(size_t& next, int64_t d) {
    Weights& w = args.weights[d];
    PackedWeights& m = layer.weights[d];
    w = {};
    m = {};
    const int64_t units = H / heads, G = cell.gates * H;
    m.w_ih = take_matrix("weight_ih", next, cell.gates, cell.first, heads, units, args.D);
    m.w_hh = take_matrix("weight_hh", next, cell.gates, cell.first, heads, units, P / heads);
    if (given.proj_size > 0) {
      m.w_hr = take_matrix("weight_hr", next, 1, 1, 1, P, H);
      w.w_hr = m.w_hr.values;
    }
    if (cell.inner_gates > 0) {
      m.inner_ih = take_matrix("weight_inner_ih", next, cell.inner_gates, cell.inner_gates, 1, H, H);
      m.inner_hh = take_matrix("weight_inner_hh", next, cell.inner_gates, cell.inner_gates, 1, H, H);
    }
    const auto vector = [&](const char* name, int64_t size) { return take(name, next, ScalarType::Float, size); };
    w.b_ih = vector("bias_ih", G);
    if (two_biases()) w.b_hh = vector("bias_hh", G);
    if (given.peephole) w.peephole = vector("weight_ph", cell.peepholes * H);
    if (cell.joint_norm) {
      w.norm_weight = vector("norm_weight", G);
      w.norm_bias = vector("norm_bias", G);
    } else if (cell.norm_groups > 0) {
      w.gain_ih = vector("gain_ih", G);
      w.gain_hh = vector("gain_hh", G);
    }
    if (cell.norm_c) {
      w.gain_c = vector("gain_c", H);
      w.bias_c = vector("bias_c", H);
    }
    if (cell.inner_gates > 0) w.inner_b_ih = vector("bias_inner_ih", cell.inner_gates * H);
  }

  void take_options() {
    LayerOptions& o = args.options;
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    o.cell_clip = o.gate_clip = kInfinity;
    o.candidate_scale = 1;
    o.norm_eps = 1e-5;
    if (!given.numbers.empty()) {
      if (given.numbers.size() != 5) {
        fail(op, ": numbers must be empty or hold cell_clip, gate_clip, zoneout_h, zoneout_c, norm_eps, got ",
             given.numbers.size(), " numbers");
      }
      const double* const n = given.numbers.data();
      for (int i = 0; i < 2; ++i) {
        if (!(n[i] > 0)) fail(op, ": ", i == 0 ? "cell_clip" : "gate_clip", " must be positive, got ", n[i]);
        if (!(n[2 + i] >= 0 && n[2 + i] < 1)) {
          fail(op, ": ", i == 0 ? "zoneout_h" : "zoneout_c", " must lie in [0, 1), got ", n[2 + i]);
        }
      }
      if (!(n[4] >= 0) || n[4] == kInfinity) fail(op, ": norm_eps must be finite and at least 0, got ", n[4]);
      o.cell_clip = n[0];
      o.gate_clip = n[1];
      o.zoneout_h_rate = n[2];
      o.zoneout_c_rate = n[3];
      o.norm_eps = n[4];
      if (!cell.cell_options && (o.cell_clip < kInfinity || o.zoneout_c_rate > 0)) {
        fail(op, ": cell_clip and zoneout_c must be absent for this cell");
      }
      if (!cell.gate_clip && o.gate_clip < kInfinity) fail(op, ": gate_clip must be absent for this cell");
      if (given.proj_size > 0 && o.zoneout_h_rate > 0) {
        fail(op, ": zoneout_h must be absent where there is a projection");
      }
    }
    if (given.reset) {
      Shape outer = shape_of(x);
      outer.pop_back();
      const Tensor reset = checked(op, "reset", *given.reset, ScalarType::Bool, outer, x);
      const uint8_t* const from = static_cast<const uint8_t*>(reset.const_data_ptr());
      scratch.reset.resize(args.walk.N);
      for (int64_t n = 0; n < args.walk.N; ++n) scratch.reset[n] = from[args.walk.rows[n]];
      o.reset = scratch.reset.data();
    }
    o.any = given.peephole || given.reset || !given.numbers.empty();
  }
};

// Runs a call and returns y and, unless they are updated, the last states. update: `states` are all given, and
// overwritten with the last states; else they are the initial states, null for zeros.
std::vector<Tensor> run_prepared(const PreparedOpArgs& given, const std::vector<const Tensor*>& states, bool update) {
  PreparedCall call(given);
  const std::string& op = given.op;
  const size_t count = call.cell.states;
  if (states.size() != count) fail(op, ": states must hold ", count, " tensors, got ", states.size());
  std::vector<Tensor> out{allocate_cpu(ScalarType::Float, call.output_shape())}, kept;
  std::vector<const float*> before(count, nullptr);
  std::vector<float*> after(count);
  for (size_t i = 0; i < count; ++i) {
    const Shape shape = call.state_shape(i);
    const std::string name = std::string(1, call.cell.state_names[i]) + (update ? "" : "0");
    if (states[i] != nullptr) {
      if (update && !states[i]->is_contiguous()) fail(op, ": ", name, " must be contiguous to be updated in place");
      kept.push_back(checked(op, name, *states[i], ScalarType::Float, shape, call.x));
      before[i] = static_cast<const float*>(kept.back().const_data_ptr());
    }
    if (update) {
      after[i] = const_cast<float*>(before[i]);
    } else {
      out.push_back(allocate_cpu(ScalarType::Float, shape));
      after[i] = static_cast<float*>(out.back().mutable_data_ptr());
    }
  }
  float* const y = static_cast<float*>(out[0].mutable_data_ptr());
  const Walk& walk = call.args.walk;
  if (given.lengths && walk.N < walk.T * walk.B) zero_bytes(y, out[0].numel() * int64_t{sizeof(float)});
  call.run(y, before, after);
  return out;
}

template <CellKind kKind, class States>
struct PreparedOps;

template <CellKind kKind, size_t... I>
struct PreparedOps<kKind, std::index_sequence<I...>> {
  static std::vector<Tensor> infer(const Tensor& x, const Repeat<std::optional<Tensor>, I>&... states0,
                                   const std::vector<Tensor>& weights, int64_t precision, int64_t hidden_size,
                                   int64_t proj_size, int64_t num_layers, bool bidirectional, int64_t heads,
                                   bool peephole, const std::vector<double>& numbers, Maybe ranges, Maybe batch_sizes,
                                   Maybe lengths, Maybe reset) {
    return run_prepared(
        {std::string(shape_of(kKind).name) + "_prepared", kKind, x, weights, precision, hidden_size, proj_size,
         num_layers, bidirectional, heads, peephole, numbers, ranges, batch_sizes, lengths, reset},
        {(states0 ? &*states0 : nullptr)...}, false);
  }
  static Tensor update(const Tensor& x, const std::vector<Tensor>& states, const std::vector<Tensor>& weights,
                       int64_t precision, int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                       bool bidirectional, int64_t heads, bool peephole, const std::vector<double>& numbers,
                       Maybe ranges, Maybe batch_sizes, Maybe lengths, Maybe reset) {
    std::vector<const Tensor*> given;
    for (const Tensor& state : states) given.push_back(&state);
    return run_prepared(
        {std::string(shape_of(kKind).name) + "_prepared_", kKind, x, weights, precision, hidden_size, proj_size,
         num_layers, bidirectional, heads, peephole, numbers, ranges, batch_sizes, lengths, reset},
        given, true)[0];
  }
};

template <size_t... K>
void implement_all(Library& m, std::index_sequence<K...>) {
  const auto one = [&m](auto k) {
    constexpr CellKind kKind = kCellKinds[decltype(k)::value];
    using Ops = PreparedOps<kKind, std::make_index_sequence<shape_of(kKind).states>>;
    const std::string name = std::string(shape_of(kKind).name) + "_prepared";
    m.impl(name.c_str(), TORCH_BOX(&Ops::infer));
    m.impl((name + "_").c_str(), TORCH_BOX(&Ops::update));
  };
  (one(std::integral_constant<size_t, K>{}), ...);
}

}  // namespace

void implement_prepared(Library& m) {
  m.impl("recurrent_pack", TORCH_BOX(&pack));
  m.impl("recurrent_unpack", TORCH_BOX(&unpack));
  implement_all(m, std::make_index_sequence<std::size(kCellKinds)>());
}

}  // namespace seqkernels

#endif
