// Stable LSD radix sort of 32-bit keys with 32-bit values; only the digits that the largest key uses are sorted.
//
// A pass counts the digits of every tile, computes prefix sums of the counts over the tiles, and scatters the tiles.
// Within a tile, each warp ranks consecutive elements, 32 at a time: lanes with equal digits find each other by
// match_any, which keeps equal keys in order. The tile is reordered in shared memory first, so that elements with the
// same digit are written contiguously, in few memory sectors.
#pragma once

#include "embedding_bag/cuda/bags.cuh"

namespace seqkernels::bags_cuda {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kItems = 16;  // per thread
constexpr int64_t kTileItems = kThreads * kItems;
constexpr int kWarps = kThreads / kWarp;
static_assert(kDigits == kThreads, "each thread handles one digit");

// Exclusive prefix sum over the threads of the block; `total` receives the sum over all threads.
SK_DEVICE uint32_t block_scan(uint32_t x, uint32_t& total, Shared<uint32_t> sums) {
  uint32_t inclusive = x;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t before = shuffle_up(inclusive, distance);
    if (lane_index() >= distance) inclusive += before;
  }
  if (lane_index() == kWarp - 1) sums[warp_index()] = inclusive;
  block_sync();
  uint32_t front = 0;
  total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    const uint32_t sum = sums[warp];
    if (warp < warp_index()) front += sum;
    total += sum;
  }
  block_sync();
  return front + inclusive - x;
}

// Memory of a sort. The caller writes the keys to keys[0]; the result is in keys[result] and values[result].
struct SortMemory {
  uint32_t* keys[2];
  uint32_t* values[2];
  uint32_t* counts;
  uint32_t* totals;
  int64_t n, tiles;
  int passes, bits, result;
  const uint32_t* first_values = nullptr;  // values of keys[0]; null: their indices

  SortMemory(int64_t n_, uint32_t largest_key, Scratch& scratch) : n(n_), tiles(ceil_div(n_, kTileItems)) {
    int width = 1;
    while (width < 32 && largest_key >> width != 0) ++width;
    passes = static_cast<int>(ceil_div(width, kDigitBits));
    bits = static_cast<int>(ceil_div(width, passes));
    result = passes % 2;
    for (int i = 0; i < 2; ++i) {
      keys[i] = scratch.take<uint32_t>(n);
      values[i] = scratch.take<uint32_t>(n);
    }
    counts = scratch.take<uint32_t>(kDigits * tiles);
    totals = scratch.take<uint32_t>(kDigits);
  }
};

void launch_sort(const SortMemory& memory, void* stream);

}  // namespace seqkernels::bags_cuda
