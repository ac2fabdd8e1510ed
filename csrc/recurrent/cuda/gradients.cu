// Backward after the time loop: the input gradient and all weight gradients, as products and sums over all rows.
#include <algorithm>
#include <array>

#include "recurrent/cuda/layer.h"

namespace seqkernels::cuda {
namespace {

constexpr int64_t kRowsOfChunk = 512;  // rows per partial column sum
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
  dispatch(dtype,
           [&](auto storage) { launch(reduce_kernel<decltype(storage)>, plain_config(args.size, stream), args); });
}

// C[M, N] = A B^T over a long K, converted to the storage type.
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

// Column sums of [rows, columns] of the storage type or, with wide, the compute type.
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

void run_gradients(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const LayerArgs& layer,
                   const GateGradients& of, void* stream) {
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
  if (layer.variational != nullptr && rows > 0 && !no_h) run_recurrent_input(layer, args.dtype, of.fed, stream);
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
      if (shape.separate) {
        run_columns(args.dtype, by_x, false, rows, G, of.partial, {dw.b_ih, nullptr}, stream);
        run_columns(args.dtype, by_h, false, rows, G, of.partial, {dw.b_hh, nullptr}, stream);
      } else {
        run_columns(args.dtype, by_x, false, rows, G, of.partial, {dw.b_ih, dw.b_hh}, stream);
      }
    }
    if (dw.peephole != nullptr) {
      const int64_t width = shape.peepholes * args.H, wide = args.dtype == DType::kFloat64 ? 8 : 4;
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

}  // namespace seqkernels::cuda
