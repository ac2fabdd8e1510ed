// Warp collectives. The matrix fragments follow the tables of the PTX ISA ("Warp Level Matrix Instructions"): lane = 4
// g + t.
#include <cstring>

#include "common/device.cuh"

namespace seqkernels {
namespace emulation {

using device::kWarp;

void perform_shuffle(void** operands) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!operands[lane]) continue;
    auto& mine = *static_cast<Shuffle*>(operands[lane]);
    // A lane that does not participate has no value; reading it is undefined and yields NaN here.
    const void* source = operands[mine.source & (kWarp - 1)];
    if (source) {
      memcpy(mine.result, static_cast<const Shuffle*>(source)->value, mine.bytes);
    } else {
      memset(mine.result, 0xff, mine.bytes);
    }
  }
}

void perform_vote(void** operands) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (operands[lane] && static_cast<Vote*>(operands[lane])->value) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!operands[lane]) continue;
    auto& mine = *static_cast<Vote*>(operands[lane]);
    mine.ballot = ballot;
    for (int other = 0; other < kWarp; ++other) {
      if (operands[other] && static_cast<Vote*>(operands[other])->value == mine.value) mine.match |= 1u << other;
    }
  }
}

namespace {

template <int K>
struct Tiles {
  float a[16][K], b[K][8];
};

template <int K>
void multiply(const Tiles<K>& tiles, void** operands) {
  for (int g = 0; g < 8; ++g) {
    for (int half = 0; half < 2; ++half) {
      const int row = g + 8 * half;
      float sums[8];
      for (int n = 0; n < 8; ++n) sums[n] = static_cast<Fragments*>(operands[4 * g + n / 2])->d[2 * half + n % 2];
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < 8; ++n) sums[n] += tiles.a[row][k] * tiles.b[k][n];
      }
      for (int n = 0; n < 8; ++n) static_cast<Fragments*>(operands[4 * g + n / 2])->d[2 * half + n % 2] = sums[n];
    }
  }
}

template <class T>
void mma_16(void** operands) {
  Tiles<16> tiles;
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const auto pair = device::unpack_pair<T>(mine.a[i]);
      const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
      for (int e = 0; e < 2; ++e) tiles.a[row][column + e] = pair[e];
    }
    for (int i = 0; i < 2; ++i) {
      const auto pair = device::unpack_pair<T>(mine.b[i]);
      for (int e = 0; e < 2; ++e) tiles.b[2 * t + 8 * i + e][g] = pair[e];
    }
  }
  multiply(tiles, operands);
}

}  // namespace

void perform_mma_bf16(void** operands) { mma_16<BFloat16>(operands); }
void perform_mma_f16(void** operands) { mma_16<Half>(operands); }

void perform_mma_tf32(void** operands) {
  const auto operand = [](uint32_t bits) { return device::bit_cast<float>(bits & 0xffffe000u); };
  Tiles<8> tiles;
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) tiles.a[g + 8 * (i % 2)][t + 4 * (i / 2)] = operand(mine.a[i]);
    for (int i = 0; i < 2; ++i) tiles.b[t + 4 * i][g] = operand(mine.b[i]);
  }
  multiply(tiles, operands);
}

void perform_load_matrices(void** operands) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<Matrices*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < mine.count; ++i) {
      uint32_t pair = 0;
      for (int e = 0; e < 2; ++e) {
        const int row = mine.transposed ? 2 * t + e : g, column = mine.transposed ? g : 2 * t + e;
        pair |= static_cast<uint32_t>(static_cast<Matrices*>(operands[8 * i + row])->row[column]) << (16 * e);
      }
      mine.result[i] = pair;
    }
  }
}

}  // namespace emulation
}  // namespace seqkernels
