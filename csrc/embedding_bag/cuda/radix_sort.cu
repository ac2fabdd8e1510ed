// Kernels of the radix sort. radix_sort.cuh describes the algorithm.
#include "embedding_bag/cuda/radix_sort.cuh"

namespace seqkernels::bags_cuda {
namespace {

struct SortPass {
  const uint32_t* keys;
  const uint32_t* values;  // null: the value is the element's index
  uint32_t* sorted_keys;
  uint32_t* sorted_values;
  uint32_t* counts;  // [digits, tiles]
  uint32_t* totals;  // [digits]
  int64_t n, tiles;
  int shift, bits;

  SK_DEVICE uint32_t digit(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
  SK_DEVICE Global<uint32_t> count() const { return global<uint32_t>(counts, kDigits * tiles); }
};

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

// One block per digit: replaces the counts by prefix sums over the tiles.
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
  SK_SHARED(uint32_t, places, kWarps* kDigits);  // count of each digit per warp, later the position within the tile
  SK_SHARED(uint32_t, shifts, kDigits);          // difference between the global position and that within the tile
  SK_SHARED(uint32_t, tile_keys, kTileItems);
  SK_SHARED(uint32_t, tile_values, kTileItems);
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  const uint32_t preceding_in_tiles = a.count()[thread * a.tiles + block_index()];
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
    const uint32_t preceding = places[warp * kDigits + digit];
    rank[k] = preceding + popcount(same & lanes_before());
    warp_sync();
    if (there && (same & lanes_before()) == 0) places[warp * kDigits + digit] = preceding + popcount(same);
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
  shifts[thread] = block_scan(all, total, sums) + preceding_in_tiles - place;
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
  // Reading the values this late lets them reuse the registers of the keys.
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

}  // namespace

void launch_sort(const SortMemory& m, void* stream) {
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
