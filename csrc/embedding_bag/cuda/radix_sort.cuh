// A stable sort of 32-bit keys with what belongs to them, by digits from the lowest up, only as many as keys have.
//
// A pass counts the digits of every tile, sums the counts of each digit over the tiles in front, and moves the tiles.
// In a tile a warp has successive elements, 32 at a time: lanes of one digit find each other by a vote, so that equal
// keys keep their order. A tile is put in order in shared memory first: so what goes to one digit's place is written
// side by side, a few sectors instead of one for each element.
#pragma once

#include "embedding_bag/cuda/bags.cuh"

namespace seqkernels::bags_cuda {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kItems = 16;  // of a thread
constexpr int64_t kTileItems = kThreads * kItems;
constexpr int kWarps = kThreads / kWarp;
static_assert(kDigits == kThreads, "a thread looks after a digit");

struct SortPass {
  const uint32_t* keys;
  const uint32_t* values;  // null: an element's value is its place
  uint32_t* sorted_keys;
  uint32_t* sorted_values;
  uint32_t* counts;  // [digits, tiles]
  uint32_t* totals;  // [digits]
  int64_t n, tiles;
  int shift, bits;

  SK_DEVICE uint32_t digit(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
  SK_DEVICE Global<uint32_t> count() const { return global<uint32_t>(counts, kDigits * tiles); }
};

// The sum over the threads in front, and over all of them.
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

SK_KERNEL(kThreads) sort_count_kernel(const SK_GRID_CONSTANT SortPass a) {
  SK_SHARED(uint32_t, counts, kDigits);
  const int thread = thread_index();
  counts[thread] = 0;
  block_sync();
  const auto keys = global<const uint32_t>(a.keys, a.n);
  const int64_t first = block_index() * kTileItems;
  SK_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = first + k * kThreads + thread;
    if (i < a.n) {
      const uint32_t key = keys[i];
      atomic_add(counts, a.digit(key), 1u);
    }
  }
  block_sync();
  const uint32_t count = counts[thread];
  a.count()[thread * a.tiles + block_index()] = count;
}

// A block has a digit: what lies in the tiles in front of each.
SK_KERNEL(kThreads) sort_scan_kernel(const SK_GRID_CONSTANT SortPass a) {
  SK_SHARED(uint32_t, sums, kWarps);
  const auto counts = a.count() + block_index() * a.tiles;
  uint32_t before = 0;
  for (int64_t first = 0; first < a.tiles; first += kThreads) {
    const int64_t i = first + thread_index();
    const uint32_t count = i < a.tiles ? load<Cache::kDefault>(counts, i) : 0u;
    uint32_t total;
    const uint32_t place = before + block_scan(count, total, sums);
    if (i < a.tiles) counts[i] = place;
    before += total;
  }
  if (thread_index() == 0) global<uint32_t>(a.totals, kDigits)[block_index()] = before;
}

SK_KERNEL(kThreads, 3) sort_move_kernel(const SK_GRID_CONSTANT SortPass a) {
  SK_SHARED(uint32_t, sums, kWarps);
  SK_SHARED(uint32_t, places, kWarps* kDigits);  // how many elements a warp has of each digit, then where in the tile
  SK_SHARED(uint32_t, shifts, kDigits);          // from a place in the tile to that of all
  SK_SHARED(uint32_t, tile_keys, kTileItems);
  SK_SHARED(uint32_t, tile_values, kTileItems);
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  const uint32_t tiles_in_front = a.count()[thread * a.tiles + block_index()];
  const uint32_t all =
      thread < 1 << a.bits ? load<Cache::kDefault>(global<const uint32_t>(a.totals, kDigits), thread) : 0u;
  SK_UNROLL
  for (int w = 0; w < kWarps; ++w) places[w * kDigits + thread] = 0;
  block_sync();

  const auto keys = global<const uint32_t>(a.keys, a.n);
  const auto values = global<const uint32_t>(a.values, a.values == nullptr ? 0 : a.n);
  const int64_t tile = block_index() * kTileItems, first = tile + warp * (kItems * kWarp) + lane;
  uint32_t key[kItems], rank[kItems];
  SK_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = first + k * kWarp;
    key[k] = i < a.n ? load<Cache::kDefault>(keys, i) : 0u;
  }
  SK_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const bool there = first + k * kWarp < a.n;
    const uint32_t digit = a.digit(key[k]);
    const uint32_t same = match_any(there ? digit : kDigits);
    const uint32_t in_front = places[warp * kDigits + digit];
    rank[k] = in_front + popcount(same & lanes_before());
    warp_sync();
    if (there && (same & lanes_before()) == 0) places[warp * kDigits + digit] = in_front + popcount(same);
    warp_sync();
  }
  block_sync();

  uint32_t counts[kWarps], mine = 0, total;
  SK_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    counts[w] = places[w * kDigits + thread];
    mine += counts[w];
  }
  uint32_t place = block_scan(mine, total, sums);
  shifts[thread] = block_scan(all, total, sums) + tiles_in_front - place;
  SK_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    places[w * kDigits + thread] = place;
    place += counts[w];
  }
  block_sync();
  SK_UNROLL
  for (int k = 0; k < kItems; ++k) {
    if (first + k * kWarp >= a.n) continue;
    rank[k] += places[warp * kDigits + a.digit(key[k])];
    tile_keys[rank[k]] = key[k];
  }
  // Read this late, values take the registers of keys.
  SK_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int64_t i = first + k * kWarp;
    if (i < a.n) tile_values[rank[k]] = values ? load<Cache::kDefault>(values, i) : static_cast<uint32_t>(i);
  }
  block_sync();

  const auto sorted_keys = global<uint32_t>(a.sorted_keys, a.n), sorted_values = global<uint32_t>(a.sorted_values, a.n);
  SK_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const uint32_t i = k * kThreads + thread;
    if (tile + i >= a.n) continue;
    const uint32_t moved = tile_keys[i], with = tile_values[i];
    const uint32_t to = shifts[a.digit(moved)] + i;
    sorted_keys[to] = moved;
    sorted_values[to] = with;
  }
}

// ---- host ------------------------------------------------------------------------------------------------------

// The memory of a sort. Keys are put into keys[0]; what is sorted lies in keys[result] and values[result].
struct SortMemory {
  uint32_t* keys[2];
  uint32_t* values[2];
  uint32_t* counts;
  uint32_t* totals;
  int64_t n, tiles;
  int passes, bits, result;
  const uint32_t* first_values = nullptr;  // what belongs to keys[0]; null: their places

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

inline void launch_sort(const SortMemory& m, void* stream) {
  if (m.n == 0) return;
  for (int pass = 0; pass < m.passes; ++pass) {
    const int from = pass % 2, to = 1 - from;
    const SortPass args{m.keys[from],  pass == 0 ? m.first_values : m.values[from],
                        m.keys[to],    m.values[to],
                        m.counts,      m.totals,
                        m.n,           m.tiles,
                        pass * m.bits, m.bits};
    LaunchConfig config = blocks_of(m.tiles * kThreads, stream);
    launch(sort_count_kernel, config, args);
    config.grid = {int64_t{1} << m.bits};
    launch(sort_scan_kernel, config, args);
    config.grid = {m.tiles};
    launch(sort_move_kernel, config, args);
  }
}

}  // namespace seqkernels::bags_cuda
