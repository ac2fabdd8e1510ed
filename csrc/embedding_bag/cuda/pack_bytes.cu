// Quantises the rows of a table to bytes on CUDA.
#include "embedding_bag/cuda/bags.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

struct PackArgs {
  BagTable t;
  uint8_t* packed;  // [E, D + 8]
  int group;
};

// byte = round((x - min) * 255 / (max - min)); the scale and the minimum follow the row. One group per row.
template <class S>
SK_KERNEL(kThreads)
bag_pack_kernel(const SK_GRID_CONSTANT PackArgs a) {
  const BagTable& t = a.t;
  const int64_t row = grid_thread_index() / a.group;
  if (row >= t.E) return;
  const int lane = thread_index() % a.group;
  const auto from = global<const S>(t.table, (t.E - 1) * t.row_stride + (t.D - 1) * t.column_stride + 1);
  const auto to = global<uint8_t>(a.packed, t.E * (t.D + 8)) + row * (t.D + 8);
  const auto value = [&](int64_t d) -> float {
    return float(widen(load<Cache::kReadOnly>(from, row * t.row_stride + d * t.column_stride)));
  };
  float lowest = value(0), highest = lowest;
  for (int64_t d = lane; d < t.D; d += a.group) {
    const float x = value(d);
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
  }
  for (int distance = a.group / 2; distance > 0; distance /= 2) {
    const float x = shuffle_xor(lowest, distance, kWarp, group_mask(a.group));
    const float y = shuffle_xor(highest, distance, kWarp, group_mask(a.group));
    lowest = x < lowest ? x : lowest;
    highest = y > highest ? y : highest;
  }
  const float range = highest - lowest, inverse = 255.0f / (range + 1e-8f);
  for (int64_t d = lane; d < t.D; d += a.group) to[d] = uint8_t(rintf((value(d) - lowest) * inverse));
  if (lane != 0) return;
  const auto scale = bit_cast<Vec<uint8_t, 4>>(range / 255.0f), bias = bit_cast<Vec<uint8_t, 4>>(lowest);
  for (int i = 0; i < 4; ++i) {
    to[t.D + i] = scale[i];
    to[t.D + 4 + i] = bias[i];
  }
}

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

void launch_bag_pack_bytes(const BagTable& table, DType dtype, uint8_t* packed, void* stream) {
  if (table.E == 0) return;
  if (table.D == 0) return fill_bytes(packed, 0, table.E * 8, stream);
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    const int group = group_for<Columns<S, false>>(table.D);
    launch(bag_pack_kernel<S>, blocks_of(table.E * group, stream), PackArgs{table, packed, group});
  });
}

}  // namespace seqkernels
