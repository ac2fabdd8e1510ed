// Kernels that every tier runs around its time loop: links, packed weights, input products, padding.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "recurrent/cuda/layer.h"
#include "recurrent/cuda/links.cuh"

namespace seqkernels::cuda {
namespace {

struct PackArgs {
  const void* w[2];
  void* to;  // [directions, strips of 8 units, gates, blocks of K, 32] pieces
  int directions;
  int64_t units, K, gates, gate_stride, unit_stride, k_stride;
  bool tf32;
};
template <class S>
SK_KERNEL(kPlainThreads)
pack_kernel(const SK_GRID_CONSTANT PackArgs args) {
  constexpr int kP = kPiece<S>;
  const int64_t strips = (args.units + kUnits - 1) / kUnits, blocks = blocks_of<S>(args.K);
  const int64_t pieces = args.directions * strips * args.gates * blocks * 32;
  const Global<S> to = global<S>(args.to, pieces * kP);
  const int64_t size =
      (args.gates - 1) * args.gate_stride + (args.units - 1) * args.unit_stride + (args.K - 1) * args.k_stride + 1;
  for (int64_t i = grid_thread_index(); i < pieces; i += grid_threads()) {
    const int64_t lane = i % 32, block = i / 32 % blocks, gate = i / 32 / blocks % args.gates;
    const int64_t strip = i / 32 / blocks / args.gates % strips, d = i / 32 / blocks / args.gates / strips;
    const int64_t unit = strip * kUnits + lane / 4, k = block * kBlockK<S> + lane % 4 * kP;
    const Global<const S> w = global<const S>(args.w[d], size);
    Piece<S> piece{};
    SK_UNROLL
    for (int e = 0; e < kP; ++e) {
      if (unit < args.units && k + e < args.K) {
        const S value = w[gate * args.gate_stride + unit * args.unit_stride + (k + e) * args.k_stride];
        piece[e] = operand(value, args.tf32);
      }
    }
    store_vec(to, i * kP, piece);
  }
}

// The last states of sequences of length zero.
struct EmptyArgs {
  LayerArgs layer;
  int states;                    // arrays below
  const void* from[kMaxStates];  // [directions, B, H] each, or null: zeros
  void* to[kMaxStates];          // or null
};
template <class S>
SK_KERNEL(kPlainThreads)
empty_kernel(const SK_GRID_CONSTANT EmptyArgs args) {
  const LayerArgs& layer = args.layer;
  const int64_t states = layer.states();
  const Global<const Link> links = global<const Link>(layer.links, layer.link_count());
  for (int64_t i = grid_thread_index(); i < states; i += grid_threads()) {
    const int64_t b = i / layer.H % layer.B, d = i / layer.H / layer.B;
    const Link link = links[d * (layer.rows + layer.B) + layer.rows + b];
    if (link.next != kNone) continue;
    for (int k = 0; k < args.states; ++k) {
      if (args.to[k] == nullptr) continue;
      S value{};
      if (args.from[k] != nullptr) value = load<Cache::kDefault>(global<const S>(args.from[k], states), i);
      global<S>(args.to[k], states)[i] = value;
    }
  }
}

// Zeroes the rows that belong to no sequence.
struct ClearArgs {
  const Link* links;
  int64_t rows, B;
  struct Buffer {
    void* at;
    int64_t row, direction, width;  // elements
  } buffers[3 + kMaxCells];
  int count;
};
template <class S>
SK_KERNEL(kPlainThreads)
clear_kernel(const SK_GRID_CONSTANT ClearArgs args) {
  const int64_t d = block_index_y(), directions = grid_blocks_y();
  const Global<const Link> links =
      global<const Link>(args.links, directions * (args.rows + args.B)) + d * (args.rows + args.B);
  for (int64_t row = grid_thread_index() / kWarp; row < args.rows; row += grid_threads() / kWarp) {
    const Link link = links[row];
    if (link.prev != kNone) continue;
    for (int i = 0; i < args.count; ++i) {
      const ClearArgs::Buffer& buffer = args.buffers[i];
      const int64_t at = row * buffer.row + d * buffer.direction;
      const Global<S> to =
          global<S>(buffer.at, (args.rows - 1) * buffer.row + (directions - 1) * buffer.direction + buffer.width);
      for (int64_t k = lane_index(); k < buffer.width; k += kWarp) to[at + k] = S{};
    }
  }
}

// The h that the products of each row read: the h before, masked. Grid: rows and their units x directions.
struct RecurrentInputArgs {
  LayerArgs layer;
  void* to;  // [directions, rows, H]
};
template <class S>
SK_KERNEL(kPlainThreads)
recurrent_input_kernel(const SK_GRID_CONSTANT RecurrentInputArgs args) {
  const LayerArgs& layer = args.layer;
  const int d = static_cast<int>(block_index_y());
  const int64_t size = layer.rows * layer.H;
  const Global<S> to = global<S>(args.to, layer.directions * size) + d * size;
  for (int64_t i = grid_thread_index(); i < size; i += grid_threads()) {
    const int64_t row = i / layer.H;
    const UnitOfRow<S> row_unit{layer, d, row, i % layer.H, link_of(layer, d, row)};
    Compute<S> h = Compute<S>(0);
    if (row_unit.link.prev != kNone) h = row_unit.before(layer.y, layer.h0) * row_unit.state_at(layer.variational);
    to[i] = narrow<S>(h);
  }
}

}  // namespace

Matrix plain_matrix(const void* at, int64_t lines, int64_t width, int64_t ld, bool k_in_line) {
  Matrix m{};
  m.at = at;
  m.count = lines > 0 ? (lines - 1) * ld + width : 0;
  m.ld = ld;
  m.k_in_line = k_in_line;
  return m;
}

void run_recurrent_input(const LayerArgs& layer, DType dtype, void* to, void* stream) {
  const RecurrentInputArgs fed{layer, to};
  LaunchConfig config = plain_config(layer.rows * layer.H, stream);
  config.grid.y = layer.directions;
  dispatch(dtype, [&](auto storage) { launch(recurrent_input_kernel<decltype(storage)>, config, fed); });
}

// The left operand of the recurrent product of `rows` rows from `first`: the h before them, masked if fed holds masked
// h of all rows. Without links and h0 it is zero, and no product is needed.
Matrix recurrent_matrix(const RecurrentArgs& args, const LayerArgs& layer, const void* fed, int direction,
                        int64_t first, int64_t rows, bool k_in_line) {
  const int64_t H = layer.H, bytes = element_size(args.dtype);
  const auto at = [bytes](const void* p, int64_t elements) { return static_cast<const char*>(p) + elements * bytes; };
  const void* const h0 = args.h0 == nullptr ? nullptr : at(args.h0, direction * layer.B * H);
  if (layer.variational != nullptr) {
    return plain_matrix(at(fed, (direction * layer.rows + first) * H), rows, H, H, k_in_line);
  }
  if (layer.links == nullptr) return plain_matrix(h0, rows, H, H, k_in_line);
  Matrix h = plain_matrix(at(layer.y, direction * H), layer.rows, H, layer.directions * H, k_in_line);
  h.links = layer.links + direction * (layer.rows + layer.B) + first;
  h.links_count = layer.rows + layer.B - first;
  h.link_rows = layer.rows;
  if (h0 != nullptr) {
    h.initial = h0;
    h.initial_count = layer.B * H;
    h.initial_ld = H;
  }
  return h;
}

LayerArgs layer_args(const RecurrentArgs& args, const CudaLayout& layout, const CellShape& shape) {
  LayerArgs layer{};
  const LayerOptions& o = args.options;
  layer.rows = args.walk.N;
  layer.B = args.walk.B;
  layer.H = args.H;
  layer.directions = static_cast<int>(args.directions);
  layer.tf32 = layout.tf32 && args.dtype == DType::kFloat32;
  layer.h0 = args.h0;
  for (int64_t k = 0; k < shape.cells; ++k) layer.c0[k] = args.c0[k];
  for (int d = 0; d < args.directions; ++d) {
    layer.bias_h[d] = args.weights[d].b_hh;
    layer.peephole[d] = args.weights[d].peephole;
  }
  layer.variational = o.variational;
  layer.zoneout_h = o.zoneout_h;
  layer.zoneout_c = o.zoneout_c;
  layer.candidate = o.candidate;
  layer.zoneout_h_rate = o.zoneout_h_rate;
  layer.zoneout_c_rate = o.zoneout_c_rate;
  layer.candidate_scale = o.candidate_scale;
  layer.cell_clip = o.cell_clip;
  layer.gate_clip = o.gate_clip;
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  layer.sigmoid_low = sigmoid(-o.gate_clip);
  layer.sigmoid_high = sigmoid(o.gate_clip);
  layer.tanh_high = std::tanh(o.gate_clip);
  layer.saved_width = args.saved_width;
  return layer;
}

void run_links(const RecurrentArgs& args, const CudaLayout& layout, Link* links, void* stream) {
  const Walk& walk = args.walk;
  LaunchConfig config;
  config.block = kWalkThreads;
  config.stream = stream;
  if (!layout.packed) {
    const PaddedLinksArgs of{links, layout.lengths, args.options.reset, walk.T, walk.B};
    config.grid = {std::min<int64_t>(ceil_div(walk.N + walk.B, kWalkThreads), 1 << 16), args.directions};
    if (walk.B > 0) launch(padded_links_kernel, config, of);
    return;
  }
  PackedLinksArgs of{};
  of.links = links;
  of.reset = args.options.reset;
  of.T = walk.T;
  of.B = walk.B;
  of.N = walk.N;
  int64_t start = 0;  // of step `first`
  for (int64_t first = 0; first < walk.T; first += kWalkSteps) {
    of.first = first;
    of.count = static_cast<int>(std::min<int64_t>(kWalkSteps, walk.T - first));
    int64_t offset = first > 0 ? start - walk.batch_sizes[first - 1] : 0;
    for (int64_t i = 0; i < of.count + 3; ++i) {
      const int64_t t = first - 1 + i;
      if (t < 0) {
        of.offsets[i] = 0;
        continue;
      }
      of.offsets[i] = offset;
      if (i == of.count + 1) start = offset;
      if (t < walk.T) offset += walk.batch_sizes[t];
    }
    config.grid = {ceil_div(walk.batch_sizes[first], kWalkThreads), of.count, args.directions};
    launch(packed_links_kernel, config, of);
  }
}

void run_pack(const RecurrentArgs& args, bool tf32, int64_t gates, bool transposed, void* to, void* stream) {
  PackArgs of{};
  of.directions = static_cast<int>(args.directions);
  for (int d = 0; d < args.directions; ++d) of.w[d] = args.weights[d].w_hh;
  of.to = to;
  of.units = of.K = args.H;
  of.gates = gates;
  of.gate_stride = args.H * args.H;
  of.unit_stride = transposed ? 1 : args.H;
  of.k_stride = transposed ? args.H : 1;
  of.tf32 = tf32;
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t pieces = args.directions * ceil_div(args.H, kUnits) * gates * blocks_of<S>(args.H) * 32;
    launch(pack_kernel<S>, plain_config(pieces, stream), of);
  });
}

void run_clear(const RecurrentArgs& args, const CudaLayout& layout, const Link* links, std::vector<ClearTarget> targets,
               void* stream) {
  if (layout.lengths == nullptr || args.walk.N == 0) return;
  ClearArgs of{};
  of.links = links;
  of.rows = args.walk.N;
  of.B = args.walk.B;
  for (const ClearTarget& target : targets) {
    if (target.at == nullptr || target.width == 0) continue;
    of.buffers[of.count++] = {target.at, target.row, target.direction, target.width};
  }
  if (of.count == 0) return;
  LaunchConfig config = plain_config(of.rows * kWarp, stream);
  config.grid.y = args.directions;
  dispatch(args.dtype, [&](auto storage) { launch(clear_kernel<decltype(storage)>, config, of); });
}

std::vector<ClearTarget> outputs_to_clear(const ForwardArgs& args) {
  const int64_t width = args.directions * args.H;
  std::vector<ClearTarget> targets{{args.y, width, args.H, args.H},
                                   {args.saved, args.saved_width, args.walk.N * args.saved_width, args.saved_width}};
  for (void* cells : args.cells) targets.push_back({cells, width, args.H, args.H});
  return targets;
}

void run_empty(const LayerArgs& layer, const ForwardArgs& args, void* stream) {
  EmptyArgs of{layer, static_cast<int>(kMaxStates), {args.h0}, {args.h_n}};
  std::copy(std::begin(args.c0), std::end(args.c0), of.from + 1);
  std::copy(std::begin(args.c_n), std::end(args.c_n), of.to + 1);
  if (layer.states() == 0) return;
  const LaunchConfig config = plain_config(layer.states(), stream);
  dispatch(args.dtype, [&](auto storage) { launch(empty_kernel<decltype(storage)>, config, of); });
}

// x W_ih^T of `rows` rows from `first`, of one direction, plus b_ih and, unless the products have separate gradients,
// b_hh.
void run_from_x(const RecurrentArgs& args, const CudaLayout& layout, int64_t gates, bool separate, int direction,
                int64_t first, int64_t rows, void* to, void* stream) {
  if (rows == 0) return;
  const Walk& walk = args.walk;
  const Weights& w = args.weights[direction];
  const int64_t bytes = element_size(args.dtype);
  ProductArgs of{};
  of.M = rows;
  of.N = gates * args.H;
  of.K = args.D;
  of.parts = 1;
  of.a[0] = input_matrix(args, layout, true);
  const int64_t skip = layout.packed ? first * layout.x_step : first / walk.B * layout.x_step;
  of.a[0].at = static_cast<const char*>(args.x) + skip * bytes;
  of.a[0].count -= skip;
  of.b[0] = plain_matrix(w.w_ih, of.N, args.D, args.D, true);
  of.bias[0] = w.b_ih;
  of.bias[1] = separate ? nullptr : w.b_hh;
  of.c = to;
  of.ldc = of.N;
  of.splits = 1;
  of.chunk = args.D;
  run_product(args.dtype, layout.tf32, of, stream);
}

Matrix input_matrix(const RecurrentArgs& args, const CudaLayout& layout, bool k_in_line) {
  const Walk& walk = args.walk;
  Matrix m = plain_matrix(args.x, 0, args.D, layout.x_step, k_in_line);
  if (layout.packed) {
    m.count = walk.N > 0 ? (walk.N - 1) * layout.x_step + args.D : 0;
  } else {
    m.period = walk.B;
    m.across = layout.x_across;
    m.count = walk.N > 0 ? (walk.T - 1) * layout.x_step + (walk.B - 1) * layout.x_across + args.D : 0;
  }
  return m;
}

}  // namespace seqkernels::cuda
