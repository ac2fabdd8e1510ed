// Launchers of the products outside the time loop of recurrent layers on a GPU.
#include <algorithm>

#include "recurrent/cuda/layer.h"
#include "recurrent/cuda/product_tiles.cuh"

namespace seqkernels::cuda {

namespace {

using LargeTile = Tile<128, 128, 2, 2, 3, 2>;
using SmallTile = Tile<64, 64, 2, 2, 4, 3, Lines::kAny>;
using LargeExactTile = Tile<128, 128, 2, 4, 3, 1>;
using SmallExactTile = Tile<64, 64, 2, 4, 3, 2, Lines::kAny>;

// The largest power of two, up to 16, that divides the start offsets of all lines of the matrix. Contiguous periods are
// merged into one.
int start_bytes(Matrix& m, int64_t element) {
  if (m.period != 0 && m.ld == m.period * m.across) {
    m.ld = m.across;
    m.period = 0;
  }
  int64_t all = 16 | static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.at)) | m.ld * element;
  if (m.period != 0) all |= m.across * element;
  if (m.initial != nullptr)
    all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.initial)) | m.initial_ld * element;
  return static_cast<int>(all & -all);
}

template <template <class, class, bool, bool> class Worker, class S, class Large, class Small>
void choose_tile(const ProductArgs& args, void* stream) {
  const int64_t large = ceil_div(args.M, Large::kM) * ceil_div(args.N, Large::kN) * args.splits;
  if (args.whole_pieces && large >= device_limits().multiprocessors * 3 / 4) {
    launch_product<Worker, S, Large>(args, stream);
  } else {
    launch_product<Worker, S, Small>(args, stream);
  }
}

}  // namespace

// The cheapest split by a rough cost model, in microseconds, of a GPU with 132 multiprocessors. It depends on the shape
// alone, so that sums are equal on all devices.
int64_t product_splits(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kBlocks = 2 * 132, kMostSplits = 64, kLeastK = 256;
  constexpr double kStage = 1.5, kStagesAround = 6;  // 64 of K; what filling the pipeline and writing C cost
  constexpr double kElement = 8 / 3e6;               // of a partial sum, written and read
  const int64_t tiles = ceil_div(M, LargeTile::kM) * ceil_div(N, LargeTile::kN);
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= std::min(kMostSplits, K / kLeastK) || splits == 1; ++splits) {
    const double stages = static_cast<double>(ceil_div(ceil_div(K, splits), 64));
    double cost = static_cast<double>(ceil_div(tiles * splits, kBlocks)) * (stages + kStagesAround) * kStage;
    if (splits > 1) cost += kElement * static_cast<double>(splits * M * N) + 3;
    if (splits == 1 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}
int64_t partial_of_product(int64_t M, int64_t N, int64_t K) {
  const int64_t splits = product_splits(M, N, K);
  return splits == 1 ? 0 : splits * M * N;
}

void run_product(DType dtype, bool tf32, ProductArgs args, void* stream) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t element = element_size(dtype), wide = dtype == DType::kFloat64 ? 8 : 4;
  args.start_bytes = 16;
  args.whole_pieces = true;
  for (int part = 0; part < args.parts; ++part) {
    args.start_bytes =
        std::min({args.start_bytes, start_bytes(args.a[part], element), start_bytes(args.b[part], element)});
    for (const Matrix* m : {&args.a[part], &args.b[part]}) {
      const int64_t length = m->k_in_line ? args.K : m == &args.a[part] ? args.M : args.N;
      args.whole_pieces = args.whole_pieces && length * element % 16 == 0;
      if (m->k_in_line && args.K > INT32_MAX - 1024) throw std::logic_error("a product over a line of 2^31 elements");
    }
  }
  args.whole_pieces = args.whole_pieces && args.start_bytes == 16;
  args.vectors_c = args.ldc % 4 == 0 && reinterpret_cast<uintptr_t>(args.c) % (4 * (args.narrow ? element : wide)) == 0;
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (sizeof(S) == 8) {
      launch_product<ByMultiplyAdd, S, SmallExactTile>(args, stream);
    } else {
      if (sizeof(S) == 2 || tf32) return choose_tile<ByMatrixUnits, S, LargeTile, SmallTile>(args, stream);
      if constexpr (sizeof(S) == 4) choose_tile<ByMultiplyAdd, S, LargeExactTile, SmallExactTile>(args, stream);
    }
  });
}

}  // namespace seqkernels::cuda
