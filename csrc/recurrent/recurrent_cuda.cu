// Launchers of recurrent layers on a GPU: the products outside the time loop, one launch a step, and one step alone.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "recurrent/layer_cuda.h"
#include "recurrent/links_cuda.cuh"
#include "recurrent/recurrent_cuda.h"
#include "recurrent/steps_cuda.cuh"

namespace seqkernels {
namespace cuda {
namespace {

constexpr int64_t kFromXBytes = 32 << 20;  // pre-activations made at a time: they stay in the second-level cache

// ---- small kernels around the time loop
// ------------------------------------------------------------------------------

constexpr int kPlainThreads = 256;
LaunchConfig plain(int64_t items, void* stream, int64_t per_block = kPlainThreads) {
  LaunchConfig config;
  config.grid = {std::min<int64_t>((items + per_block - 1) / per_block, 1 << 16)};
  config.block = kPlainThreads;
  config.stream = stream;
  return config;
}

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

// The states at the beginning: h as the products see it in both slots, and c.
struct StartArgs {
  LayerArgs layer;
  void* slots[2];  // [directions, tiles, blocks, 2, 32] pieces
  int64_t tiles, blocks;
  void* c;  // [directions, B, H] of the compute type or null
};
template <class S>
SK_KERNEL(kPlainThreads)
start_kernel(const SK_GRID_CONSTANT StartArgs args) {
  constexpr int kP = kPiece<S>;
  const LayerArgs& layer = args.layer;
  const int64_t pieces = layer.directions * args.tiles * args.blocks * 64, states = layer.states();
  const Global<const S> h0 = global<const S>(layer.h0, layer.h0 == nullptr ? 0 : states);
  const Global<const S> c0 = global<const S>(layer.c0, layer.c0 == nullptr ? 0 : states);
  const Global<const S> mask = global<const S>(layer.variational, layer.variational == nullptr ? 0 : states);
  for (int64_t i = grid_thread_index(); i < pieces; i += grid_threads()) {
    const int64_t lane = i % 32, half = i / 32 % 2, block = i / 64 % args.blocks,
                  tile = i / 64 / args.blocks % args.tiles;
    const int64_t d = i / 64 / args.blocks / args.tiles, b = tile * kTileRows + half * 8 + lane / 4;
    const int64_t unit = block * kBlockK<S> + lane % 4 * kP;
    Piece<S> piece{};
    SK_UNROLL
    for (int e = 0; e < kP; ++e) {
      if (!h0 || b >= layer.B || unit + e >= layer.H) continue;
      const int64_t at = (d * layer.B + b) * layer.H + unit + e;
      S value = h0[at];
      if (mask) {
        const S factor = mask[at];
        value = narrow<S>(widen(value) * widen(factor));
      }
      piece[e] = operand(value, layer.tf32);
    }
    store_vec(global<S>(args.slots[0], pieces * kP), i * kP, piece);
    store_vec(global<S>(args.slots[1], pieces * kP), i * kP, piece);
  }
  if (args.c == nullptr) return;
  const Global<Compute<S>> c = global<Compute<S>>(args.c, states);
  for (int64_t i = grid_thread_index(); i < states; i += grid_threads()) {
    c[i] = Compute<S>(0);
    if (c0) {
      const S value = c0[i];
      c[i] = widen(value);
    }
  }
}

// The last states of sequences without steps.
struct EmptyArgs {
  LayerArgs layer;
  const void *from_h, *from_c;  // [directions, B, H] or null: zeros
  void *to_h, *to_c;            // or null
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
    if (link.next != kNobody) continue;
    const auto copy = [&](const void* from, void* to) {
      if (to == nullptr) return;
      S value{};
      if (from != nullptr) value = load<Cache::kDefault>(global<const S>(from, states), i);
      global<S>(to, states)[i] = value;
    };
    copy(args.from_h, args.to_h);
    copy(args.from_c, args.to_c);
  }
}

// Zeros in the rows that no sequence has.
struct ClearArgs {
  const Link* links;
  int64_t rows, B;
  struct Buffer {
    void* at;
    int64_t row, direction, width;  // elements
  } buffers[4];
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
    if (link.prev != kNobody) continue;
    for (int i = 0; i < args.count; ++i) {
      const ClearArgs::Buffer& buffer = args.buffers[i];
      const int64_t at = row * buffer.row + d * buffer.direction;
      const Global<S> to =
          global<S>(buffer.at, (args.rows - 1) * buffer.row + (directions - 1) * buffer.direction + buffer.width);
      for (int64_t k = lane_index(); k < buffer.width; k += kWarp) to[at + k] = S{};
    }
  }
}

// The h that each row's products saw: the states before, under their mask. Grid: rows and their units x directions.
struct FedArgs {
  LayerArgs layer;
  void* to;  // [directions, rows, H]
};
template <class S>
SK_KERNEL(kPlainThreads)
fed_kernel(const SK_GRID_CONSTANT FedArgs args) {
  const LayerArgs& layer = args.layer;
  const int d = static_cast<int>(block_index_y());
  const int64_t size = layer.rows * layer.H;
  const Global<S> to = global<S>(args.to, layer.directions * size) + d * size;
  for (int64_t i = grid_thread_index(); i < size; i += grid_threads()) {
    const int64_t row = i / layer.H;
    const Site<S> site{layer, d, row, i % layer.H, link_of(layer, d, row)};
    Compute<S> h = Compute<S>(0);
    if (site.link.prev != kNobody) h = site.before(layer.y, layer.h0) * site.state_at(layer.variational);
    to[i] = narrow<S>(h);
  }
}

// ---- host
// ------------------------------------------------------------------------------------------------------------

template <class S, class F>
void with_cell(CellKind kind, F&& f) {
  switch (kind) {
    case CellKind::kLSTM:
      return f(LSTMCell<S>{});
    case CellKind::kLSTMCoupled:
      return f(LSTMCoupledCell<S>{});
    case CellKind::kGRU:
      return f(GRUCell<S>{});
    case CellKind::kGRUBefore:
      return f(GRUBeforeCell<S>{});
    case CellKind::kMGU:
      return f(MGUCell<S>{});
    case CellKind::kMGUBefore:
      return f(MGUBeforeCell<S>{});
    case CellKind::kRNNTanh:
      return f(RNNTanhCell<S>{});
    case CellKind::kRNNRelu:
      return f(RNNReluCell<S>{});
    default:
      throw std::logic_error("no CUDA kernel for this cell");
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Matrix plain_matrix(const void* at, int64_t lines, int64_t width, int64_t ld, bool k_in_line) {
  Matrix m{};
  m.at = at;
  m.count = lines > 0 ? (lines - 1) * ld + width : 0;
  m.ld = ld;
  m.k_in_line = k_in_line;
  return m;
}

void run_fed(const LayerArgs& layer, DType dtype, void* to, void* stream) {
  const FedArgs fed{layer, to};
  LaunchConfig config = plain(layer.rows * layer.H, stream);
  config.grid.y = layer.directions;
  dispatch(dtype, [&](auto storage) { launch(fed_kernel<decltype(storage)>, config, fed); });
}

// The h that the products with W_hh of `rows` rows from `first` on saw: the states before them, under their mask. fed:
// of all rows, where there is a mask. Without links and h0 there are none, and no product is needed.
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

constexpr int64_t kRowsOfChunk = 512;  // of a sum of columns
int64_t row_chunks(int64_t rows) { return std::max<int64_t>(1, std::min<int64_t>(ceil_div(rows, kRowsOfChunk), 256)); }

void run_reduce(DType dtype, const void* from, int64_t count, int64_t rows, int64_t columns, void* to, void* stream) {
  ReduceArgs args{};
  args.from = from;
  args.count = count;
  args.stride = rows * columns;
  args.size = rows * columns;
  args.to = to;
  args.from_ld = args.width = args.to_ld = columns;
  if (args.size == 0) return;
  dispatch(dtype, [&](auto storage) { launch(reduce_kernel<decltype(storage)>, plain(args.size, stream), args); });
}

// C[M, N] = A B^T over a long K, narrowed.
void run_long_product(DType dtype, bool tf32, const Matrix& a, const Matrix& b, int64_t M, int64_t N, int64_t K,
                      void* c, void* partial, void* stream) {
  ProductArgs args{};
  args.M = M;
  args.N = N;
  args.K = K;
  args.parts = 1;
  args.a[0] = a;
  args.b[0] = b;
  args.ldc = N;
  args.splits = product_splits(M, N, K);
  args.chunk = ceil_div(ceil_div(K, args.splits), 64) * 64;
  args.narrow = args.splits == 1;
  args.c = args.narrow ? c : partial;
  run_product(dtype, tf32, args, stream);
  if (!args.narrow) run_reduce(dtype, partial, args.splits, M, N, c, stream);
}

// Sums of columns of [rows, columns], of the storage type or, wide, the compute type.
void run_columns(DType dtype, const void* from, bool wide, int64_t rows, int64_t columns, void* partial,
                 std::array<void*, 2> to, void* stream) {
  const int64_t chunks = row_chunks(rows);
  ColumnsArgs args{from, rows, columns, std::max<int64_t>(1, ceil_div(rows, chunks)), nullptr, {}};
  if (chunks == 1) {
    std::copy(to.begin(), to.end(), args.sums);
  } else {
    args.partial = partial;
  }
  LaunchConfig config;
  config.grid = {ceil_div(columns, kColumns), chunks};
  config.block = kSumThreads;
  config.stream = stream;
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    if (wide) {
      launch(columns_kernel<S, Compute<S>>, config, args);
    } else {
      launch(columns_kernel<S, S>, config, args);
    }
  });
  for (void* each : to) {
    if (chunks > 1 && each != nullptr) run_reduce(dtype, partial, chunks, 1, columns, each, stream);
  }
}

}  // namespace

// ---- what all tiers share
// --------------------------------------------------------------------------------------------

LayerArgs layer_args(const RecurrentArgs& args, const CudaLayout& layout, const CellShape& shape) {
  LayerArgs layer{};
  const Options& o = args.options;
  layer.rows = args.walk.N;
  layer.B = args.walk.B;
  layer.H = args.H;
  layer.directions = static_cast<int>(args.directions);
  layer.tf32 = layout.tf32 && args.dtype == DType::kFloat32;
  layer.h0 = args.h0;
  layer.c0 = shape.states > 1 ? args.c0 : nullptr;
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
    launch(pack_kernel<S>, plain(pieces, stream), of);
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
  LaunchConfig config = plain(of.rows * kWarp, stream);
  config.grid.y = args.directions;
  dispatch(args.dtype, [&](auto storage) { launch(clear_kernel<decltype(storage)>, config, of); });
}

void run_empty(const LayerArgs& layer, DType dtype, const void* from_h, const void* from_c, void* to_h, void* to_c,
               void* stream) {
  const EmptyArgs of{layer, from_h, from_c, to_h, to_c};
  if (layer.states() == 0) return;
  dispatch(dtype, [&](auto storage) { launch(empty_kernel<decltype(storage)>, plain(layer.states(), stream), of); });
}

// x W_ih^T of `rows` rows from `first` on, of one direction, with its bias and, where the cell sees both products as
// one, the other one's.
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

// First row and rows of step t.
void visit_step(const Walk& walk, bool packed, const std::vector<int64_t>& offsets, int64_t t, int64_t& first,
                int64_t& count) {
  first = packed ? offsets[t] : t * walk.B;
  count = packed ? walk.batch_sizes[t] : walk.B;
}
std::vector<int64_t> offsets_of(const Walk& walk, bool packed) {
  std::vector<int64_t> offsets(walk.T + 1, 0);
  for (int64_t t = 0; t < walk.T; ++t) offsets[t + 1] = offsets[t] + (packed ? walk.batch_sizes[t] : walk.B);
  return offsets;
}

// Of backward, after the loop: dx and everything of the weights, products over all rows of the gradients of the gates.
void run_gradients(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const LayerArgs& layer,
                   const AfterLoop& of, void* stream) {
  const CellShape shape = shape_of(kind);
  const Walk& walk = args.walk;
  const int64_t G = shape.gates * args.H, rows = walk.N, bytes = element_size(args.dtype);
  const auto at = [bytes](const void* p, int64_t elements) { return static_cast<const char*>(p) + elements * bytes; };
  const auto to = [bytes](void* p, int64_t elements) { return static_cast<char*>(p) + elements * bytes; };
  if (args.dx != nullptr && rows > 0) {
    ProductArgs product{};
    product.M = rows;
    product.N = args.D;
    product.K = G;
    product.parts = static_cast<int>(args.directions);
    for (int d = 0; d < args.directions; ++d) {
      product.a[d] = plain_matrix(at(of.dgates_x, d * rows * G), rows, G, G, true);
      product.b[d] = plain_matrix(args.weights[d].w_ih, G, args.D, args.D, false);
    }
    product.c = args.dx;
    product.ldc = args.D;
    product.narrow = true;
    product.splits = 1;
    product.chunk = G;
    run_product(args.dtype, layout.tf32, product, stream);
  }
  if (!args.weights_wanted) return;
  const bool no_h = layer.links == nullptr && args.h0 == nullptr;
  if (layer.variational != nullptr && rows > 0 && !no_h) run_fed(layer, args.dtype, of.fed, stream);
  const bool separate = kind == CellKind::kGRU || kind == CellKind::kMGU;
  for (int d = 0; d < args.directions; ++d) {
    const WeightGradients& dw = args.dw[d];
    const void *by_x = at(of.dgates_x, d * rows * G), *by_h = at(of.dgates_h, d * rows * G);
    const Matrix left_x = plain_matrix(by_x, rows, G, G, false);
    run_long_product(args.dtype, layout.tf32, left_x, input_matrix(args, layout, false), G, args.D, rows, dw.w_ih,
                     of.partial, stream);
    const int64_t first = of.q == nullptr ? G : of.first_gates * args.H;  // rows of W_hh whose product is with h
    const auto rows_of_w_hh = [&](int64_t from, int64_t upto, const Matrix& right) {
      Matrix left = plain_matrix(at(by_h, from), rows, G - from, G, false);
      run_long_product(args.dtype, layout.tf32, left, right, upto - from, args.H, rows, to(dw.w_hh, from * args.H),
                       of.partial, stream);
    };
    if (no_h) {
      fill_bytes(dw.w_hh, 0, G * args.H * bytes, stream);
    } else {
      rows_of_w_hh(0, first, recurrent_matrix(args, layer, of.fed, d, 0, rows, false));
    }
    if (of.q != nullptr && !no_h) {
      rows_of_w_hh(first, G, plain_matrix(at(of.q, d * rows * args.H), rows, args.H, args.H, false));
    }
    if (dw.b_ih != nullptr) {
      if (separate) {
        run_columns(args.dtype, by_x, false, rows, G, of.partial, {dw.b_ih, nullptr}, stream);
        run_columns(args.dtype, by_h, false, rows, G, of.partial, {dw.b_hh, nullptr}, stream);
      } else {
        run_columns(args.dtype, by_x, false, rows, G, of.partial, {dw.b_ih, dw.b_hh}, stream);
      }
    }
    if (dw.peephole != nullptr) {
      const int64_t width = (shape.gates - 1) * args.H, wide = args.dtype == DType::kFloat64 ? 8 : 4;
      run_columns(args.dtype, static_cast<const char*>(of.dpeephole) + d * rows * width * wide, true, rows, width,
                  of.partial, {dw.peephole, nullptr}, stream);
    }
  }
}

int64_t partial_bytes(const RecurrentArgs& args, int64_t gates, bool stages, int64_t first_gates) {
  const int64_t G = gates * args.H, rows = args.walk.N;
  int64_t most = row_chunks(rows) * G;
  most = std::max(most, partial_of_product(G, args.D, rows));
  most = std::max(most, partial_of_product(stages ? first_gates * args.H : G, args.H, rows));
  if (stages) most = std::max(most, partial_of_product(G - first_gates * args.H, args.H, rows));
  return most * (args.dtype == DType::kFloat64 ? 8 : 4);
}

// ---- one launch a step
// -----------------------------------------------------------------------------------------------

namespace {

// Rows of a chunk of pre-activations, whole steps.
int64_t rows_of_chunk(int64_t bytes_of_row, int64_t rows, int64_t B) {
  return std::min(rows, std::max(kFromXBytes / std::max<int64_t>(bytes_of_row, 1), B));
}

// Sizes that follow from the arguments.
struct StepShape {
  int64_t gates, first, directions, B, H, rows, blocks, tiles, element, wide;
  int row_tiles;
  bool stages, separate, has_c;
  StepShape(CellKind kind, const RecurrentArgs& args) {
    const CellShape shape = shape_of(kind);
    gates = shape.gates;
    stages = kind == CellKind::kGRUBefore || kind == CellKind::kMGUBefore;
    first = stages ? gates - 1 : gates;
    separate = kind == CellKind::kGRU || kind == CellKind::kMGU;
    has_c = shape.states > 1;
    directions = args.directions;
    B = args.walk.B;
    H = args.H;
    rows = args.walk.N;
    element = element_size(args.dtype);
    wide = args.dtype == DType::kFloat64 ? 8 : 4;
    blocks = ceil_div(H * element, 64);
    tiles = ceil_div(B, kTileRows);
    row_tiles = static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(tiles, args.dtype == DType::kFloat64 ? 2 : kStepTiles)));
  }
  int64_t weights_bytes() const { return directions * ceil_div(H, kUnits) * gates * blocks * 512; }
  int64_t slot_bytes(int64_t slot_gates) const { return directions * tiles * slot_gates * blocks * 1024; }
  int64_t states_bytes() const { return directions * B * H * wide; }
  int64_t chunk_rows() const { return rows_of_chunk(directions * gates * H * wide, rows, B); }
  LaunchConfig config(int64_t count, int strips_of_product, void* stream) const {
    LaunchConfig config;
    config.grid = {ceil_div(H, kUnits), ceil_div(count, row_tiles * kTileRows), directions};
    config.block = kStepThreads;
    config.shared_bytes = kStepWarps * row_tiles * kTileRows * strips_of_product * kUnits * wide;
    config.stream = stream;
    return config;
  }
};

struct ForwardSpace {
  Link* links;
  void *weights, *slots[2], *q_slots, *c, *carried, *from_x;
  void carve(Space& space, const StepShape& s) {
    links = static_cast<Link*>(space.take(s.directions * (s.rows + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    for (void*& slot : slots) slot = space.take(s.slot_bytes(1));
    q_slots = s.stages ? space.take(s.slot_bytes(1)) : nullptr;
    c = s.has_c ? space.take(s.states_bytes()) : nullptr;
    carried = s.stages ? space.take(s.states_bytes()) : nullptr;
    from_x = space.take(s.directions * s.chunk_rows() * s.gates * s.H * s.wide);
  }
};

struct BackwardSpace {
  Link* links;
  void *weights, *slots[2], *dgates_x, *dgates_h, *dc, *direct, *partial_gates, *q, *dpeephole, *fed, *partial;
  SavedAgain again;
  void carve(Space& space, const StepShape& s, const RecurrentArgs& args, bool recompute) {
    const Options& o = args.options;
    const int64_t rows_of_gates = s.directions * s.rows * s.gates * s.H;
    links = static_cast<Link*>(space.take(s.directions * (s.rows + s.B) * sizeof(Link)));
    weights = space.take(s.weights_bytes());
    for (void*& slot : slots) slot = space.take(s.slot_bytes(s.gates));
    dgates_x = space.take(rows_of_gates * s.element);
    dgates_h = s.separate ? space.take(rows_of_gates * s.element) : dgates_x;
    dc = s.has_c ? space.take(s.states_bytes()) : nullptr;
    const bool passes = s.separate || s.stages || o.zoneout_h != nullptr || o.zoneout_h_rate > 0;
    direct = passes ? space.take(s.states_bytes()) : nullptr;
    partial_gates = s.stages ? space.take(s.states_bytes() * s.first) : nullptr;
    q = s.stages ? space.take(s.directions * s.rows * s.H * s.element) : nullptr;
    const bool peephole = args.weights[0].peephole != nullptr;
    dpeephole = peephole ? space.take(s.directions * s.rows * (s.gates - 1) * s.H * s.wide) : nullptr;
    fed = o.variational != nullptr ? space.take(s.directions * s.rows * s.H * s.element) : nullptr;
    partial = space.take(partial_bytes(args, s.gates, s.stages, s.first));
    again.carve(space, s.gates, args, recompute);
  }
};

void forward_by_steps(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, void* workspace, void* stream) {
  const StepShape s(kind, args);
  const Walk& walk = args.walk;
  Space space(workspace);
  ForwardSpace at{};
  at.carve(space, s);
  LayerArgs layer = layer_args(args, layout, shape_of(kind));
  layer.links = at.links;
  layer.y = args.y;
  layer.cells = args.cells;
  layer.saved = args.saved;
  if (s.B == 0) return;
  run_links(args, layout, at.links, stream);
  run_clear(args, layout, at.links,
            {{args.y, s.directions * s.H, s.H, s.H},
             {args.cells, s.directions * s.H, s.H, s.H},
             {args.saved, args.saved_width, s.rows * args.saved_width, args.saved_width}},
            stream);
  run_empty(layer, args.dtype, args.h0, args.c0, args.h_n, args.c_n, stream);
  if (s.rows == 0) return;
  run_pack(args, layer.tf32, s.gates, false, at.weights, stream);
  StartArgs start{layer, {at.slots[0], at.slots[1]}, s.tiles, s.blocks, at.c};
  if (s.stages) fill_bytes(at.q_slots, 0, s.slot_bytes(1), stream);

  ForwardStepArgs step{};
  step.layer = layer;
  step.from_x = at.from_x;
  step.from_x_rows = s.chunk_rows();
  step.c = at.c;
  step.carried = at.carried;
  step.h_n = args.h_n;
  step.c_n = args.c_n;
  step.leaves_states = true;
  StepOperands& of = step.product;
  of.weights = at.weights;
  of.tiles = s.tiles;
  of.slot_blocks = of.blocks = of.strip = s.blocks;
  of.weight_blocks = s.gates * s.blocks;

  const std::vector<int64_t> offsets = offsets_of(walk, layout.packed);
  const auto time = [&](int64_t i, int d) { return d == 0 ? i : walk.T - 1 - i; };
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    launch(start_kernel<S>, plain(std::max(s.slot_bytes(1) / 16, layer.states()), stream), start);
    with_cell<S>(kind, [&](auto cell) {
      using Cell = decltype(cell);
      for (int64_t i = 0, chunk_end = 0; i < walk.T; ++i) {
        if (i == chunk_end) {  // the next chunk of pre-activations
          const auto fits = [&](int64_t end) {
            return offsets[end] - offsets[i] <= step.from_x_rows &&
                   offsets[walk.T - i] - offsets[walk.T - end] <= step.from_x_rows;
          };
          for (chunk_end = i + 1; chunk_end < walk.T && fits(chunk_end + 1);) ++chunk_end;
          for (int d = 0; d < s.directions; ++d) {
            const int64_t first = d == 0 ? offsets[i] : offsets[walk.T - chunk_end];
            const int64_t end = d == 0 ? offsets[chunk_end] : offsets[walk.T - i];
            step.from_x_first[d] = first;
            void* to = static_cast<char*>(at.from_x) + d * step.from_x_rows * s.gates * s.H * s.wide;
            run_from_x(args, layout, s.gates, s.separate, d, first, end - first, to, stream);
          }
        }
        int64_t most = 0;
        for (int d = 0; d < s.directions; ++d) {
          visit_step(walk, layout.packed, offsets, time(i, d), step.visit.first[d], step.visit.count[d]);
          most = std::max(most, step.visit.count[d]);
        }
        of.slots = at.slots[i % 2];
        of.weight_first = 0;
        constexpr bool kStages = Cell::kFirst < Cell::kGates;
        step.slots_out = kStages ? at.q_slots : at.slots[(i + 1) % 2];
        launch(forward_step_kernel<Cell, false>, s.config(most, Cell::kFirst, stream), step, s.row_tiles);
        if constexpr (kStages) {
          of.slots = at.q_slots;
          of.weight_first = Cell::kFirst * s.blocks;
          step.slots_out = at.slots[(i + 1) % 2];
          launch(forward_step_kernel<Cell, true>, s.config(most, Cell::kGates - Cell::kFirst, stream), step,
                 s.row_tiles);
        }
      }
    });
  });
}

}  // namespace

void SavedAgain::carve(Space& space, int64_t gates, const RecurrentArgs& args, bool wanted) {
  wanted = wanted && args.saved_width > 0;
  const int64_t wide = args.dtype == DType::kFloat64 ? 8 : 4, row = args.directions * gates * args.H * wide;
  rows = rows_of_chunk(row, args.walk.N, args.walk.B);
  const int64_t saved_bytes = args.directions * args.walk.N * args.saved_width * element_size(args.dtype);
  saved = wanted ? space.take(saved_bytes) : nullptr;
  from_x = wanted ? space.take(rows * row) : nullptr;
  from_h = wanted ? space.take(rows * row) : nullptr;
}

namespace {

// The cell on `count` rows from `first` on, and before it the products, which go to from_x and from_h: [directions,
// step.from_x_rows, G * H] of the compute type. fed: as in recurrent_matrix.
void forward_rows(CellKind kind, const RecurrentArgs& args, const CudaLayout& layout, ForwardStepArgs step,
                  void* from_x, void* from_h, const void* fed, int64_t first, int64_t count, void* stream) {
  const StepShape s(kind, args);
  const bool no_h = step.layer.links == nullptr && args.h0 == nullptr;
  step.from_x = from_x;
  step.from_h = no_h ? nullptr : from_h;
  step.from_h_rows = step.from_x_rows;
  const auto product_h = [&](int d, int64_t gate, int64_t gates, const Matrix& left) {
    ProductArgs of{};
    of.M = count;
    of.N = gates * s.H;
    of.K = s.H;
    of.parts = 1;
    of.a[0] = left;
    const void* const w_hh = static_cast<const char*>(args.weights[d].w_hh) + gate * s.H * s.H * s.element;
    of.b[0] = plain_matrix(w_hh, of.N, s.H, s.H, true);
    of.c = static_cast<char*>(from_h) + d * step.from_h_rows * of.N * s.wide;
    of.ldc = of.N;
    of.splits = 1;
    of.chunk = s.H;
    run_product(args.dtype, layout.tf32, of, stream);
  };
  for (int d = 0; d < s.directions; ++d) {
    step.visit.first[d] = step.from_x_first[d] = first;
    step.visit.count[d] = count;
    void* to = static_cast<char*>(from_x) + d * step.from_x_rows * s.gates * s.H * s.wide;
    run_from_x(args, layout, s.gates, s.separate, d, first, count, to, stream);
    if (!no_h) product_h(d, 0, s.first, recurrent_matrix(args, step.layer, fed, d, first, count, true));
  }
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_cell<S>(kind, [&](auto cell) {
      using Cell = decltype(cell);
      LaunchConfig config = plain(count * s.H, stream);
      config.grid.y = s.directions;
      launch(forward_rows_kernel<Cell, false>, config, step);
      if constexpr (Cell::kFirst < Cell::kGates) {
        for (int d = 0; d < s.directions && !no_h; ++d) {
          const void* const q = static_cast<const char*>(step.q) + d * step.from_h_rows * s.H * s.element;
          product_h(d, Cell::kFirst, Cell::kGates - Cell::kFirst, plain_matrix(q, count, s.H, s.H, true));
        }
        launch(forward_rows_kernel<Cell, true>, config, step);
      }
    });
  });
}

}  // namespace

void make_saved_again(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const SavedAgain& at,
                      LayerArgs& layer, void* fed, void* q, void* stream) {
  if (at.saved == nullptr) return;
  layer.saved = at.saved;
  if (layer.variational != nullptr) run_fed(layer, args.dtype, fed, stream);
  ForwardStepArgs step{};
  step.layer = layer;
  step.from_x_rows = at.rows;
  step.q = q;
  const int64_t step_rows = layout.packed ? at.rows : at.rows / layer.B * layer.B;
  for (int64_t first = 0; first < layer.rows; first += step_rows) {
    const int64_t count = std::min(step_rows, layer.rows - first);
    forward_rows(kind, args, layout, step, at.from_x, at.from_h, fed, first, count, stream);
  }
}

namespace {

LayerArgs walked_back(CellKind kind, const BackwardArgs& args, const CudaLayout& layout) {
  LayerArgs layer = layer_args(args, layout, shape_of(kind));
  layer.y = const_cast<void*>(args.y);
  layer.cells = const_cast<void*>(args.cells);
  layer.saved = const_cast<void*>(args.saved);
  return layer;
}
// What every kernel of a step back is told, with a workspace of either kind.
template <class Places>
BackwardStepArgs backward_step(const BackwardArgs& args, const LayerArgs& layer, const Places& at) {
  BackwardStepArgs step{};
  step.layer = layer;
  step.dy = args.dy;
  step.dcells = args.dcells;
  step.dh_n = args.dh_n;
  step.dc_n = args.dc_n;
  step.dgates_x = at.dgates_x;
  step.dgates_h = at.dgates_h;
  step.q = at.q;
  step.direct = at.direct;
  step.partial_gates = at.partial_gates;
  step.dpeephole = at.dpeephole;
  step.dc0 = args.dc0;
  return step;
}

void backward_by_steps(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, void* workspace,
                       void* stream) {
  const StepShape s(kind, args);
  const Walk& walk = args.walk;
  Space space(workspace);
  BackwardSpace at{};
  at.carve(space, s, args, args.saved == nullptr);
  LayerArgs layer = walked_back(kind, args, layout);
  layer.links = at.links;
  run_links(args, layout, at.links, stream);
  if (s.rows > 0 && s.B > 0) {
    // dgates_x: not in use yet, and wide enough
    make_saved_again(kind, args, layout, at.again, layer, at.fed, s.stages ? at.dgates_x : nullptr, stream);
    const int64_t width = s.gates * s.H;
    run_clear(args, layout, at.links,
              {{at.dgates_x, width, s.rows * width, width},
               {s.separate ? at.dgates_h : nullptr, width, s.rows * width, width},
               {at.q, s.H, s.rows * s.H, s.H}},
              stream);
    if (at.dpeephole != nullptr && layout.lengths != nullptr) {
      fill_bytes(at.dpeephole, 0, s.directions * s.rows * (s.gates - 1) * s.H * s.wide, stream);
    }
    for (void* slot : at.slots) fill_bytes(slot, 0, s.slot_bytes(s.gates), stream);
    run_pack(args, layer.tf32, s.gates, true, at.weights, stream);
  }

  BackwardStepArgs step = backward_step(args, layer, at);
  step.dc = at.dc;
  step.dh0 = args.dh0;
  step.last_step = walk.T - 1;
  StepOperands& of = step.product;
  of.weights = at.weights;
  of.tiles = s.tiles;
  of.slot_blocks = of.weight_blocks = s.gates * s.blocks;
  of.strip = 0;

  const std::vector<int64_t> offsets = offsets_of(walk, layout.packed);
  const auto time = [&](int64_t i, int d) { return d == 0 ? walk.T - 1 - i : i; };
  if (s.B > 0) {
    dispatch(args.dtype, [&](auto storage) {
      using S = decltype(storage);
      with_cell<S>(kind, [&](auto cell) {
        using Cell = decltype(cell);
        const auto product = [&](int64_t gate, int64_t gates) {
          of.slot_first = of.weight_first = gate * s.blocks;
          of.blocks = gates * s.blocks;
        };
        for (int64_t i = 0; i < walk.T; ++i) {
          int64_t most = 0;
          for (int d = 0; d < s.directions; ++d) {
            visit_step(walk, layout.packed, offsets, time(i, d), step.visit.first[d], step.visit.count[d]);
            most = std::max(most, step.visit.count[d]);
          }
          of.slots = at.slots[(i + 1) % 2];
          step.slots_out = at.slots[i % 2];
          product(0, Cell::kFirst);
          launch(backward_step_kernel<Cell, false>, s.config(most, 1, stream), step, s.row_tiles);
          if constexpr (Cell::kFirst < Cell::kGates) {
            of.slots = at.slots[i % 2];
            product(Cell::kFirst, Cell::kGates - Cell::kFirst);
            launch(backward_step_kernel<Cell, true>, s.config(most, 1, stream), step, s.row_tiles);
          }
        }
        if (args.dh0 == nullptr && args.dc0 == nullptr) return;
        product(0, Cell::kFirst);
        for (int parity = 0; parity < (s.rows > 0 ? 2 : 1); ++parity) {
          for (int d = 0; d < s.directions; ++d) {
            step.visit.first[d] = s.rows;
            step.visit.count[d] = s.B;
          }
          of.slots = at.slots[parity];
          step.slots_out = nullptr;
          step.parity = parity;
          launch(backward_step_kernel<Cell, false>, s.config(s.B, 1, stream), step, s.row_tiles);
        }
      });
    });
  }
  run_gradients(kind, args, layout, layer, {at.dgates_x, at.dgates_h, at.q, at.fed, at.dpeephole, at.partial, s.first},
                stream);
}

// ---- one step alone
// ------------------------------------------------------------------------------------------------

struct CellForwardSpace {
  void *from_x, *from_h, *fed, *carried, *q;
  void carve(Space& space, const StepShape& s, const RecurrentArgs& args) {
    const int64_t states = s.directions * s.B * s.H;
    from_x = space.take(s.gates * states * s.wide);
    from_h = space.take(s.gates * states * s.wide);
    fed = args.options.variational != nullptr ? space.take(states * s.element) : nullptr;
    carried = s.stages ? space.take(states * s.wide) : nullptr;
    q = s.stages ? space.take(states * s.element) : nullptr;
  }
};

enum class Width { kWide, kNarrow };  // of the compute type, of the storage type

struct CellBackwardSpace {
  void *dgates_x, *dgates_h, *to_h, *direct, *partial_gates, *q, *dpeephole, *fed, *partial;
  void carve(Space& space, const StepShape& s, const RecurrentArgs& args) {
    const Options& o = args.options;
    const int64_t states = s.directions * s.B * s.H;
    dgates_x = space.take(s.gates * states * s.element);
    dgates_h = s.separate ? space.take(s.gates * states * s.element) : dgates_x;
    const bool passes = s.separate || s.stages || o.zoneout_h != nullptr || o.zoneout_h_rate > 0;
    direct = passes ? space.take(states * s.wide) : nullptr;
    // Else the product of the gates' gradients with W_hh is dh0 itself.
    to_h = passes || o.variational != nullptr ? space.take(states * s.wide) : nullptr;
    partial_gates = s.stages ? space.take(s.first * states * s.wide) : nullptr;
    q = s.stages ? space.take(states * s.element) : nullptr;
    const bool peephole = args.weights[0].peephole != nullptr;
    dpeephole = peephole ? space.take((s.gates - 1) * states * s.wide) : nullptr;
    fed = o.variational != nullptr ? space.take(states * s.element) : nullptr;
    partial = space.take(partial_bytes(args, s.gates, s.stages, s.first));
  }
};

CudaPlan::Pass plan_cell(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                         bool recompute) {
  CudaPlan::Pass plan{};
  const auto unless = [&](bool fits, const char* why) {
    if (!fits) plan.reasons.push_back(std::string("cell: ") + why);
  };
  unless(allows_tier(CudaTier::kCell), "switched off");
  unless(layout.lengths == nullptr, "lengths must be absent");
  unless(args.options.reset == nullptr, "reset must be absent");
  unless(pass == PassKind::kForward || !recompute || args.saved_width == 0, "what backward needs must have been saved");
  if (!plan.reasons.empty()) return plan;
  Space space(nullptr);
  if (pass == PassKind::kForward) {
    CellForwardSpace{}.carve(space, StepShape(kind, args), args);
  } else {
    CellBackwardSpace{}.carve(space, StepShape(kind, args), args);
  }
  plan.tier = CudaTier::kCell;
  plan.cluster = 1;
  plan.block = kStepThreads;
  plan.workspace = space.bytes();
  return plan;
}

void forward_by_cell(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, void* workspace, void* stream) {
  const StepShape s(kind, args);
  Space space(workspace);
  CellForwardSpace at{};
  at.carve(space, s, args);
  ForwardStepArgs step{};
  step.layer = layer_args(args, layout, shape_of(kind));
  step.layer.y = args.y;
  step.layer.cells = args.cells;
  step.layer.saved = args.saved;
  step.from_x_rows = s.B;
  step.carried = at.carried;
  step.q = at.q;
  step.h_n = args.h_n;
  step.c_n = args.c_n;
  step.leaves_states = true;
  if (at.fed != nullptr && args.h0 != nullptr) run_fed(step.layer, args.dtype, at.fed, stream);
  forward_rows(kind, args, layout, step, at.from_x, at.from_h, at.fed, 0, s.B, stream);
}

void backward_by_cell(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, void* workspace,
                      void* stream) {
  const StepShape s(kind, args);
  Space space(workspace);
  CellBackwardSpace at{};
  at.carve(space, s, args);
  const LayerArgs layer = walked_back(kind, args, layout);
  BackwardStepArgs step = backward_step(args, layer, at);
  // Gradients of gates times their rows of W_hh: [B, H], wide or narrowed.
  const auto product = [&](int64_t gate, int64_t gates, void* to, Width width) {
    const int64_t G = s.gates * s.H, skip = gate * s.H;
    for (int d = 0; d < s.directions; ++d) {
      ProductArgs of{};
      of.M = s.B;
      of.N = s.H;
      of.K = gates * s.H;
      of.parts = 1;
      const char* const left = static_cast<const char*>(at.dgates_h) + (d * s.B * G + skip) * s.element;
      const char* const w_hh = static_cast<const char*>(args.weights[d].w_hh) + skip * s.H * s.element;
      of.a[0] = plain_matrix(left, s.B, of.K, G, true);
      of.b[0] = plain_matrix(w_hh, of.K, s.H, s.H, false);
      of.c = static_cast<char*>(to) + d * s.B * s.H * (width == Width::kNarrow ? s.element : s.wide);
      of.ldc = s.H;
      of.narrow = width == Width::kNarrow;
      of.splits = 1;
      of.chunk = of.K;
      run_product(args.dtype, layout.tf32, of, stream);
    }
  };
  dispatch(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    with_cell<S>(kind, [&](auto cell) {
      using Cell = decltype(cell);
      LaunchConfig config = plain(s.B * s.H, stream);
      config.grid.y = s.directions;
      const auto visit = [&](int64_t first) {
        for (int d = 0; d < s.directions; ++d) {
          step.visit.first[d] = first;
          step.visit.count[d] = s.B;
        }
      };
      visit(0);
      launch(backward_rows_kernel<Cell, false>, config, step);
      if constexpr (Cell::kFirst < Cell::kGates) {
        product(Cell::kFirst, Cell::kGates - Cell::kFirst, at.to_h, Width::kWide);
        step.to_h = at.to_h;
        launch(backward_rows_kernel<Cell, true>, config, step);
      }
      if (args.dh0 == nullptr) return;
      if (at.to_h == nullptr) return product(0, Cell::kFirst, args.dh0, Width::kNarrow);
      product(0, Cell::kFirst, at.to_h, Width::kWide);
      visit(s.B);
      step.to_h = at.to_h;
      step.dh0 = args.dh0;
      step.dc0 = nullptr;  // is there
      launch(backward_rows_kernel<Cell, false>, config, step);
    });
  });
  run_gradients(kind, args, layout, layer, {at.dgates_x, at.dgates_h, at.q, at.fed, at.dpeephole, at.partial, s.first},
                stream);
}

}  // namespace

}  // namespace cuda

// ---- what an op calls
// ------------------------------------------------------------------------------------------------

namespace {
std::atomic<bool> tf32_allowed{false};
}
bool allows_tf32() { return tf32_allowed; }
bool set_allows_tf32(bool allow) { return tf32_allowed.exchange(allow); }

CudaDevice current_cuda_device() {
  const DeviceLimits limits = device_limits();
  return {limits.major, limits.minor, limits.multiprocessors, limits.shared_bytes};
}

const char* cuda_tier_name(CudaTier tier) {
  switch (tier) {
    case CudaTier::kCell:
      return "cell";
    case CudaTier::kCluster:
      return "cluster";
    case CudaTier::kGrid:
      return "grid";
    case CudaTier::kSteps:
      return "steps";
    default:
      return "none";
  }
}

namespace {

constexpr CudaTier kTiers[] = {CudaTier::kCell, CudaTier::kCluster, CudaTier::kGrid, CudaTier::kSteps};
int bit_of(CudaTier tier) { return 1 << static_cast<int>(tier); }

int tiers_called(const std::vector<std::string>& names, const std::string& where) {
  int bits = 0;
  for (const std::string& name : names) {
    int bit = 0;
    for (const CudaTier tier : kTiers) {
      if (name == cuda_tier_name(tier)) bit = bit_of(tier);
    }
    if (bit == 0)
      throw std::invalid_argument(where + " must name some of cell, cluster, grid and steps, got '" + name + "'");
    bits |= bit;
  }
  return bits;
}

std::atomic<int>& tiers() {
  static std::atomic<int> bits = [] {
    const char* wanted = std::getenv("SEQKERNELS_CUDA_TIERS");
    std::vector<std::string> names;
    if (wanted == nullptr || *wanted == 0) {
      for (const CudaTier tier : kTiers) names.push_back(cuda_tier_name(tier));
    } else {
      std::istringstream list(wanted);
      for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    }
    return tiers_called(names, "the environment variable SEQKERNELS_CUDA_TIERS");
  }();
  return bits;
}

}  // namespace

bool allows_tier(CudaTier tier) { return (tiers().load() & bit_of(tier)) != 0; }

std::vector<std::string> set_cuda_tiers(const std::vector<std::string>& names) {
  const int before = tiers().exchange(tiers_called(names, "set_cuda_tiers: names"));
  std::vector<std::string> were;
  for (const CudaTier tier : kTiers) {
    if (before & bit_of(tier)) were.push_back(cuda_tier_name(tier));
  }
  return were;
}

CudaPlan plan_recurrent_cuda(CellKind kind, const RecurrentArgs& args, const CudaLayout& layout, bool recompute,
                             const CudaDevice& device) {
  using namespace cuda;
  std::vector<std::string> missing;
  const auto why_not = [&](const std::string& why) { missing.push_back("steps: " + why); };
  switch (kind) {
    case CellKind::kLSTMNorm:
    case CellKind::kLSTMNested:
    case CellKind::kGRUNorm:
    case CellKind::kGRUProjected:
      why_not(std::string(shape_of(kind).name) + " has no CUDA kernel");
      break;
    default:
      break;
  }
  if (args.heads != 1) why_not("heads must be 1, got " + std::to_string(args.heads));
  if (args.weights[0].w_hr != nullptr) {
    why_not("a projection must be absent, got one to " + std::to_string(args.P));
  }
  if (device.major < 8) {
    why_not("compute capability must be 8.0 or more, got " + std::to_string(device.major) + "." +
            std::to_string(device.minor));
  }
  CudaPlan plan{};
  if (!missing.empty()) {
    plan.forward.reasons = plan.backward.reasons = missing;
    return plan;
  }
  const auto before_steps = [&](PassKind pass) {
    CudaPlan::Pass cell{};
    if (args.walk.T == 1) cell = plan_cell(kind, pass, args, layout, recompute);
    if (cell.tier != CudaTier::kNone) return cell;
    CudaPlan::Pass cluster = plan_cluster(kind, pass, args, layout, recompute, device);
    if (cluster.tier != CudaTier::kNone) return cluster;
    CudaPlan::Pass grid = plan_grid(kind, pass, args, layout, recompute, device);
    grid.reasons.insert(grid.reasons.begin(), cluster.reasons.begin(), cluster.reasons.end());
    grid.reasons.insert(grid.reasons.begin(), cell.reasons.begin(), cell.reasons.end());
    if (grid.tier == CudaTier::kNone && !allows_tier(CudaTier::kSteps)) grid.reasons.push_back("steps: switched off");
    return grid;
  };
  plan.forward = before_steps(PassKind::kForward);
  plan.backward = before_steps(PassKind::kBackward);
  if (!allows_tier(CudaTier::kSteps)) return plan;
  const StepShape s(kind, args);
  const auto by_steps = [&](CudaPlan::Pass& pass, int64_t strips_of_product, const Space& space) {
    pass.tier = CudaTier::kSteps;
    pass.cluster = 1;
    pass.rows = s.row_tiles * kTileRows;
    pass.teams = 0;
    pass.workspace = space.bytes();
    set_launch(pass, s.config(s.B, static_cast<int>(strips_of_product), nullptr));
  };
  if (plan.forward.tier == CudaTier::kNone) {
    Space space(nullptr);
    ForwardSpace of{};
    of.carve(space, s);
    by_steps(plan.forward, s.first, space);
  }
  if (plan.backward.tier == CudaTier::kNone) {
    Space space(nullptr);
    BackwardSpace of{};
    of.carve(space, s, args, recompute);
    by_steps(plan.backward, 1, space);
  }
  return plan;
}

void launch_recurrent_forward(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan,
                              void* workspace, void* stream) {
  switch (plan.forward.tier) {
    case CudaTier::kCell:
      return cuda::forward_by_cell(kind, args, layout, workspace, stream);
    case CudaTier::kCluster:
      return cuda::forward_by_clusters(kind, args, layout, plan.forward, workspace, stream);
    case CudaTier::kGrid:
      return cuda::forward_by_grid(kind, args, layout, plan.forward, workspace, stream);
    case CudaTier::kSteps:
      return cuda::forward_by_steps(kind, args, layout, workspace, stream);
    default:
      throw std::logic_error("launch_recurrent_forward: the plan has no kernels");
  }
}

void launch_recurrent_backward(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan,
                               void* workspace, void* stream) {
  switch (plan.backward.tier) {
    case CudaTier::kCell:
      return cuda::backward_by_cell(kind, args, layout, workspace, stream);
    case CudaTier::kCluster:
      return cuda::backward_by_clusters(kind, args, layout, plan.backward, workspace, stream);
    case CudaTier::kGrid:
      return cuda::backward_by_grid(kind, args, layout, plan.backward, workspace, stream);
    case CudaTier::kSteps:
      return cuda::backward_by_steps(kind, args, layout, workspace, stream);
    default:
      throw std::logic_error("launch_recurrent_backward: the plan has no kernels");
  }
}

}  // namespace seqkernels
