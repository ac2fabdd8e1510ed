// Compares the products of an emulated instruction set with the portable ones, bit for bit.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "recurrent/packed_weights.h"

namespace seqkernels::CHECKED {
PackedKernels packed_kernels();
}

using namespace seqkernels;

int main() {
  const PackedKernels ours = CHECKED::packed_kernels(), portable = seqkernels::portable::packed_kernels();
  constexpr int64_t kLanes = CHECKED_LANES;
  int failures = 0, compared = 0;
  for (const auto precision : {Precision::kFloat32, Precision::kBFloat16, Precision::kFloat16, Precision::kInt8}) {
    for (const int64_t gates : {1, 2, 3, 4}) {
      for (const int64_t extent : {1, 9, 24, 70}) {
        for (const int64_t depth : {1, 3, 65, 515}) {
          for (const int64_t rows : {1, 3, 4, 13, 66}) {
            const PanelLayout layout{precision, gates, extent, depth};
            std::vector<char> panels(layout.bytes());
            std::vector<float> scales(gates * extent), x(rows * depth);
            for (float& v : scales) v = float(std::rand() % 100) / 100;
            for (float& v : x) v = float(std::rand() % 2001 - 1000) / 1000;
            if (depth > 2) x[0] = 100;  // values of both signs and of the largest magnitude
            for (char& c : panels) c = char(std::rand() % 255 - 127);
            if (precision == Precision::kInt8) {
              for (int64_t p = 0; p < layout.panels(); ++p) {
                char* const panel = panels.data() + p * layout.panel_bytes();
                for (int64_t gate = 0; gate < gates; ++gate) {
                  for (int64_t column = 0; column < layout.columns(); ++column) {
                    int32_t sum = 0, negative = 0;
                    for (int64_t k = 0; k < layout.padded_depth(); ++k) {
                      int8_t& value = reinterpret_cast<int8_t&>(panel[layout.index(gate, column, k)]);
                      if (k >= depth) value = 0;
                      sum += value;
                      negative += value < 0 ? -value : 0;
                    }
                    const int64_t lane = gate * layout.columns() + column;
                    std::memcpy(panel + layout.value_bytes() + lane * 4, &sum, 4);
                    std::memcpy(panel + layout.value_bytes() + (gates * layout.columns() + lane) * 4, &negative, 4);
                  }
                }
              }
            } else {  // small finite numbers
              for (int64_t i = 0; i < layout.bytes() / bytes_of(precision); ++i) {
                const float value = float(std::rand() % 512 - 256) / 256;
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                const uint16_t bfloat = uint16_t(bits >> 16),
                               half = uint16_t(std::rand() % 0x3c00 | (std::rand() & 0x8000));
                char* const to = panels.data() + i * bytes_of(precision);
                if (precision == Precision::kFloat32) std::memcpy(to, &value, 4);
                if (precision == Precision::kBFloat16) std::memcpy(to, &bfloat, 2);
                if (precision == Precision::kFloat16) std::memcpy(to, &half, 2);
              }
            }
            const int64_t stride = round_up(depth, 64), units = layout.units();
            std::vector<float> results[2];
            for (int which = 0; which < 2; ++which) {
              const PackedKernels& kernels = which == 0 ? portable : ours;
              const int64_t lanes = which == 0 ? 4 : kLanes, width = gates * units * lanes;
              std::vector<int8_t> bytes(rows * stride, 99);
              std::vector<float> row_scales(rows);
              const Activations a{x.data(), depth, bytes.data(), stride, row_scales.data()};
              if (precision == Precision::kInt8) kernels.quantize(a, rows, depth, 0);
              results[which].assign(rows * gates * extent, 0);
              for (int64_t column = 0; column < extent; column += units * lanes) {
                std::vector<float> c(rows * width, 1.0f);
                for (const bool add : {false, true}) {
                  kernels.product(
                      {layout, panels.data(), scales.data(), extent, column, rows, a, c.data(), width, add});
                }
                for (int64_t r = 0; r < rows; ++r) {
                  for (int64_t v = 0; v < gates * units * lanes; ++v) {
                    const int64_t gate = v / (units * lanes), u = column + v % (units * lanes);
                    if (u < extent) results[which][(r * gates + gate) * extent + u] = c[r * width + v];
                  }
                }
              }
            }
            for (size_t i = 0; i < results[0].size(); ++i) {
              ++compared;
              // Portable code rounds between multiply and add.
              const bool exact = precision == Precision::kInt8;
              const float difference = results[0][i] - results[1][i];
              if (exact ? std::memcmp(&results[0][i], &results[1][i], 4) != 0
                        : !(difference < 1e-3f && difference > -1e-3f)) {
                if (++failures <= 5) {
                  std::printf("precision %d gates %ld extent %ld depth %ld rows %ld: element %zu is %g, not %g\n",
                              int(precision), long(gates), long(extent), long(depth), long(rows), i,
                              double(results[1][i]), double(results[0][i]));
                }
              }
            }
          }
        }
      }
    }
  }
  std::printf("compared %d, failures %d\n", compared, failures);
  return failures == 0 && compared > 0 ? 0 : 1;
}
