// Launchers of the products outside the time loop of recurrent layers on a GPU.
#include <algorithm>

#include "recurrent/layer_cuda.h"
#include "recurrent/product_tiles_cuda.cuh"

namespace seqkernels::cuda {

namespace {

using LargeTile = Tile<128, 128, 2, 2, 3, 2>;
using SmallTile = Tile<64, 64, 2, 2, 4, 3>;
using LargeExactTile = Tile<128, 128, 2, 4, 3, 1>;
using SmallExactTile = Tile<64, 64, 2, 4, 3, 2>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest power of two, up to 16, that divides all.
int64_t common_alignment(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (const int64_t each : bytes) all |= each;
  return all & -all;
}
void prepare(Matrix& m, int64_t element) {
  if (m.period != 0 && m.ld == m.period * m.across) {  // lines as far apart as those within a period
    m.ld = m.across;
    m.period = 0;
  }
  m.start_bytes = common_alignment({static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.at)), m.ld * element,
                                    m.period == 0 ? 0 : m.across * element,
                                    static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.initial)),
                                    m.initial == nullptr ? 0 : m.initial_ld * element});
}

template <template <class, class, bool, bool> class Worker, class S, class Large, class Small>
void choose_tile(const ProductArgs& args, void* stream) {
  const int64_t large = ceil_div(args.M, Large::kM) * ceil_div(args.N, Large::kN) * args.splits;
  if (large >= device_limits().multiprocessors * 3 / 4) {
    launch_product<Worker, S, Large>(args, stream);
  } else {
    launch_product<Worker, S, Small>(args, stream);
  }
}

}  // namespace

void run_product(DType dtype, bool tf32, ProductArgs args, void* stream) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t element = element_size(dtype), wide = dtype == DType::kFloat64 ? 8 : 4;
  for (int part = 0; part < args.parts; ++part) {
    prepare(args.a[part], element);
    prepare(args.b[part], element);
  }
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
