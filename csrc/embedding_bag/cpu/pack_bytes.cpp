// Quantises the rows of a table to bytes.
#include "embedding_bag/cpu/bags.h"
#include "embedding_bag/cpu/rows.h"

namespace seqkernels::SEQKERNELS_ISA {

// Quantises rows: byte = round((x - min) * 255 / (max - min)).
void bag_pack_bytes(const BagTable& t, DType dtype, uint8_t* packed) {
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    const Division division = divide(t.E * t.D * int64_t(sizeof(S)));
    for_each_part(division, [&](int64_t thread) {
      for (int64_t row = part(t.E, division.threads, thread), last = part(t.E, division.threads, thread + 1);
           row < last; ++row) {
        const S* from = static_cast<const S*>(t.table) + row * t.row_stride;
        uint8_t* to = packed + row * (t.D + 8);
        const auto value = [&](int64_t d) { return float(load_value(from + d * t.column_stride)); };
        float lowest = value(0), highest = lowest;
        for (int64_t d = 1; d < t.D; ++d) {
          const float x = value(d);
          lowest = x < lowest ? x : lowest;
          highest = x > highest ? x : highest;
        }
        const float range = highest - lowest, numbers[2] = {range / 255.0f, lowest};
        const float inverse = 255.0f / (range + 1e-8f);
        for (int64_t d = 0; d < t.D; ++d) to[d] = uint8_t(__builtin_lrintf((value(d) - lowest) * inverse));
        memcpy(to + t.D, numbers, sizeof(numbers));
      }
    });
  });
}

}  // namespace seqkernels::SEQKERNELS_ISA
