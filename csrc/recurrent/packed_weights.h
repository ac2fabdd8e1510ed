// Weights of prepared recurrent layers: packed once, in a layout that every instruction set reads. Free of torch types.
//
// A weight [G * H, K] is stored in panels. A panel holds 8 * units columns (hidden units) of each of its gates, as
// vectors of 8 lanes, for all K:
//   float32, float16   [K][gates][units][8]
//   bfloat16           [K / 2][gates][units][8][2]
//   int8               [K / 4][gates][units][8][4], then [2][gates][units][8] int32: the sum over K of the values, and
//                      that of the magnitudes of the negative ones
// K is padded to a multiple of 2 or 4, and H to one of 8 * units, with zeros. The panels of the gates of a cell's first
// stage precede those of its second stage; with heads, the panels of a head precede those of the next one.
// int8 values are round(w / scale), to nearest even, with one scale for each row of the weight: max |w| / 127.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace seqkernels {

enum class Precision { kFloat32, kBFloat16, kFloat16, kInt8 };
constexpr int64_t kPrecisions = 4;

constexpr int64_t kPackedLanes = 8;
// int32 sums of products of two values of at most 127 do not overflow.
constexpr int64_t kMostInt8Depth = 131072;

constexpr int64_t bytes_of(Precision precision) {
  return precision == Precision::kFloat32 ? 4 : precision == Precision::kInt8 ? 1 : 2;
}

// The vectors of 8 columns of one gate in a panel: 4 vectors of a panel come from one register tile.
constexpr int64_t units_of_panel(int64_t gates) { return 4 / gates; }

// The panels of some gates of one head.
struct PanelLayout {
  Precision precision;
  int64_t gates;
  int64_t extent;  // columns of a gate
  int64_t depth;   // K

  SK_MATH int64_t units() const { return units_of_panel(gates); }
  SK_MATH int64_t vectors() const { return gates * units(); }
  SK_MATH int64_t columns() const { return kPackedLanes * units(); }  // of a gate, per panel
  SK_MATH int64_t panels() const { return ceil_div(extent, columns()); }
  // Values of K that lie side by side.
  SK_MATH int64_t together() const {
    return precision == Precision::kInt8 ? 4 : precision == Precision::kBFloat16 ? 2 : 1;
  }
  SK_MATH int64_t padded_depth() const { return round_up(depth, together()); }
  SK_MATH int64_t value_bytes() const { return padded_depth() * vectors() * kPackedLanes * bytes_of(precision); }
  SK_MATH int64_t panel_bytes() const {
    return value_bytes() + (precision == Precision::kInt8 ? 2 * vectors() * kPackedLanes * 4 : 0);
  }
  SK_MATH int64_t bytes() const { return panels() * panel_bytes(); }

  // The index of a value in its panel, for column `column` of gate `gate` within the panel.
  SK_MATH int64_t index(int64_t gate, int64_t column, int64_t k) const {
    const int64_t lane = (gate * units() + column / kPackedLanes) * kPackedLanes + column % kPackedLanes;
    return (k / together() * vectors() * kPackedLanes + lane) * together() + k % together();
  }
};

// The left operand of a product: rows of values, and for int8 weights their int8 form.
struct Activations {
  const void* values;  // [rows, K], float
  int64_t stride;
  int8_t* bytes = nullptr;  // [rows, byte_stride], zero beyond K
  int64_t byte_stride = 0;
  float* scales = nullptr;  // [rows]
};

// C[rows, gates * units * lanes] = or += A[rows, K] times columns [column, column + units * lanes) of each gate, where
// lanes are those of the instruction set. Columns beyond the last one are undefined. Sums have the order of gemm.h;
// int8 sums are exact, and then multiplied by (scale of the row of A * scale of the row of the weight).
struct PackedProduct {
  PanelLayout layout;
  const char* panels;   // of the layout
  const float* scales;  // int8: of the first column of the first gate
  int64_t gate_stride;  // between the scales of two gates
  int64_t column;       // a multiple of units * lanes
  int64_t rows;
  Activations a;
  float* c;
  int64_t ldc;
  bool add;
};

// The kernels of an instruction set.
struct PackedKernels {
  void (*product)(const PackedProduct&);
  // Writes the int8 form of rows of `depth` columns. range: see PreparedLayer. A row with NaN or infinity gets the
  // scale NaN; a row whose maximum is below 2^-100 is zero.
  void (*quantize)(const Activations& a, int64_t rows, int64_t depth, float range);
};
namespace portable {
PackedKernels packed_kernels();
}
namespace avx2 {
PackedKernels packed_kernels();
}
namespace avx2_vnni {
PackedKernels packed_kernels();
}
namespace avx512 {
PackedKernels packed_kernels();
}
namespace avx512_vnni {
PackedKernels packed_kernels();
}

// A packed weight of one direction.
struct PackedMatrix {
  const char* values;
  const float* scales;  // [G * H] of int8
};

// The packed weights of one direction of a layer; null where a layer has none.
struct PackedWeights {
  PackedMatrix w_ih, w_hh, w_hr, inner_ih, inner_hh;
};

// A layer whose weights are packed.
struct PreparedLayer {
  PackedKernels kernels;
  Precision precision;
  PackedWeights weights[2];  // of each direction
  // int8: the largest |value| of the input and of h of each direction that can be represented; 0: that of each row.
  float x_range, h_range[2];
};

}  // namespace seqkernels
