// Small kernels that exercise each part of common/device.cuh, some of them with planted faults.
// tests/test_cuda_on_cpu.py runs them under the emulation; those without faults also run on a GPU, which validates the
// emulation.
//
// A kernel takes arrays and a variant. Of kernels with planted faults, variant 0 is correct.
#include <map>
#include <vector>

#include "common/device.cuh"

namespace seqkernels {
namespace {

using namespace device;

constexpr int kMaxArrays = 8;
struct Arrays {
  void* data[kMaxArrays];
  int64_t bytes[kMaxArrays];
  int variant;
};
template <class T>
SK_DEVICE Global<T> array(const Arrays& args, int i) {
  return global<T>(args.data[i], args.bytes[i] / static_cast<int64_t>(sizeof(T)));
}

// Thread and block indices.

SK_KERNEL(64) indices_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);  // [z, y, x, thread, 6]
  const int64_t block = (block_index_z() * grid_blocks_y() + block_index_y()) * grid_blocks() + block_index();
  const auto row = out + (block * block_threads() + thread_index()) * 6;
  row[0] = static_cast<int>(block_index());
  row[1] = static_cast<int>(block_index_y());
  row[2] = static_cast<int>(block_index_z());
  row[3] = warp_index() * 100 + lane_index();
  row[4] = static_cast<int>(grid_thread_index());
  row[5] = static_cast<int>(grid_threads());
}

// Warps.

SK_KERNEL(32) shuffles_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const int32_t>(args, 0);
  const auto out = array<int32_t>(args, 1);  // [9, 32]
  const int lane = lane_index();
  const int32_t v = in[lane];
  int row = 0;
  const auto put = [&](int32_t value) { out[32 * row++ + lane] = value; };
  put(shuffle(v, 5));
  put(shuffle(v, lane * 7 + 3));  // the source lane is taken modulo the width
  put(shuffle(v, 2, 8));
  put(shuffle_xor(v, 9));
  put(shuffle_up(v, 3, 16));
  put(shuffle_down(v, 3, 16));
  put(static_cast<int32_t>(ballot(v % 3 == 0)));
  put(static_cast<int32_t>(match_any(static_cast<uint32_t>(v) % 4)));
  const Vec<double, 2> wide{{v * 0.5, v * 2.0}};
  const Vec<double, 2> got = shuffle(wide, 31 - lane);
  put(static_cast<int32_t>(got[0] * 10 + got[1]));
  put(any_lane(v > 1000) * 4 + all_lanes(v > -1000) * 2 + any_lane(v == 0));
  // The two halves of the warp call different shuffles.
  int32_t half = 0;
  if (lane < 16) {
    half = shuffle(v, 1, 32, 0x0000ffffu);
  } else {
    half = shuffle_xor(v, 1, 32, 0xffff0000u);
  }
  put(half);
}

// 0: broadcast by a shuffle; 1: one lane calls a different operation; 2: half of the lanes have exited.
SK_KERNEL(32) divergent_warp_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);
  int32_t v = lane_index();
  if (args.variant == 2 && lane_index() >= 16) return;
  if (args.variant == 1 && lane_index() == 7) {
    v = static_cast<int32_t>(ballot(true));
  } else {
    v = shuffle(v, 0);
  }
  out[lane_index()] = v;
}

// Shared memory and barriers.

// out = in, reversed within each block. 0: correct; 1: no barrier; 2: half of the threads exit before the barrier; 3:
// each half waits at a different barrier; 4: reads uninitialised memory; 5: unordered writes of one word.
SK_KERNEL(64) reverse_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const float>(args, 0);
  const auto out = array<float>(args, 1);
  SharedArena arena;
  const auto tile = arena.array<float>(65);
  const int i = thread_index(), n = block_threads();
  const int64_t at = block_index() * n;
  if (args.variant == 2 && i >= n / 2) return;
  tile[i] = in[at + i];
  if (args.variant == 5) tile[64] = 1.f;
  if (args.variant == 3 && i < n / 2) {
    block_sync();  // one place
  } else if (args.variant != 1) {
    block_sync();  // the other
  }
  const float v = tile[args.variant == 4 && i == 3 ? 64 : n - 1 - i];
  out[at + i] = v;
}

// Communication within a warp. 0: with warp_sync; 1: without.
SK_KERNEL(32) neighbour_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);
  SK_SHARED(int32_t, tile, 32);
  tile[lane_index()] = lane_index() * 3;
  if (args.variant == 0) warp_sync();
  out[lane_index()] = tile[(lane_index() + 1) % 32];
}

// 0: in bounds; 1 to 8: reads and writes past the end and before the start of shared and global memory; 9: a vector
// that extends past the end; 10: a misaligned vector; 11: an array larger than the dynamic shared memory.
SK_KERNEL(32) bounds_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto x = array<float>(args, 0);  // [36]
  SharedArena arena;
  const auto tile = arena.array<float>(args.variant == 11 ? 48 : 36);
  const int i = lane_index(), v = args.variant;
  for (int j = i; j < 36; j += 32) tile[j] = 1.f;
  block_sync();
  const float a = tile[v == 1 ? i + 5 : v == 2 ? i - 1 : i];
  const float b = x[v == 3 ? i + 5 : v == 4 ? i - 1 : i];
  block_sync();
  tile[v == 5 ? i + 5 : v == 6 ? i - 1 : i] = a + b;
  x[v == 7 ? i + 5 : v == 8 ? i - 1 : i] = a + b;
  block_sync();
  if (v == 9 && i == 0) store_vec(x, 34, load_vec<4>(x, 34));
  if (v == 10 && i == 0) store_vec(x, 2, load_vec<4>(x, 2));
}

// Named barriers: warp 0 fills a buffer that warp 1 empties, in rounds. 0: correct; 1: warp 1 never signals that it is
// empty.
SK_KERNEL(64) handover_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);  // [rounds, 32]
  const int rounds = static_cast<int>(args.bytes[0] / (32 * sizeof(int32_t)));
  SK_SHARED(int32_t, buffer, 32);
  enum { kFull = 1, kEmpty = 2 };
  for (int r = 0; r < rounds; ++r) {
    if (warp_index() == 0) {
      if (r > 0) named_sync(kEmpty, 64);
      buffer[lane_index()] = r * 100 + lane_index();
      named_arrive(kFull, 64);
    } else {
      named_sync(kFull, 64);
      out[32 * r + lane_index()] = buffer[31 - lane_index()];
      if (r + 1 < rounds && args.variant == 0) named_arrive(kEmpty, 64);
    }
  }
}

// Atomics and ordering between blocks.

// Histogram in shared memory, then in global memory. 0: with atomics; 1: without atomics in shared memory.
SK_KERNEL(128) histogram_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const uint32_t>(args, 0);
  const auto counts = array<uint32_t>(args, 1);   // [16]
  const auto extremes = array<int64_t>(args, 2);  // largest, smallest, all bits, common bits
  const int64_t n = args.bytes[0] / static_cast<int64_t>(sizeof(uint32_t));
  SK_SHARED(uint32_t, mine, 16);
  if (thread_index() < 16) mine[thread_index()] = 0;
  block_sync();
  for (int64_t i = grid_thread_index(); i < n; i += grid_threads()) {
    const uint32_t v = in[i];
    if (args.variant == 0) {
      atomic_add(mine, v % 16, 1u);
    } else {
      mine[v % 16] += 1u;
    }
    atomic_max(extremes, 0, static_cast<int64_t>(v));
    atomic_min(extremes, 1, static_cast<int64_t>(v));
    atomic_or(extremes, 2, static_cast<int64_t>(v));
    atomic_and(extremes, 3, static_cast<int64_t>(v));
  }
  block_sync();
  if (thread_index() < 16) {
    const uint32_t count = mine[thread_index()];
    atomic_add(counts, thread_index(), count);
  }
}

// The last block to finish adds the results of all blocks. 0: with fences; 1: without; 2: no barrier after `last`.
SK_KERNEL(32) last_block_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto parts = array<int32_t>(args, 0);    // [blocks]
  const auto ticket = array<uint32_t>(args, 1);  // 0, and 0 again afterwards
  const auto total = array<int32_t>(args, 2);
  SK_SHARED(int32_t, last, 1);
  if (thread_index() == 0) {
    parts[block_index()] = static_cast<int>(block_index()) + 1;
    if (args.variant != 1) fence_device();
    last[0] = atomic_add(ticket, 0, 1u) == grid_blocks() - 1;
    if (args.variant != 1) fence_device();
  }
  if (args.variant != 2) block_sync();
  const int32_t is_last = last[0];
  if (!is_last) return;
  int32_t sum = 0;
  for (int64_t b = lane_index(); b < grid_blocks(); b += 32) {
    const int32_t part = parts[b];
    sum += part;
  }
  for (int d = 16; d > 0; d /= 2) sum += shuffle_xor(sum, d);
  if (lane_index() == 0) {
    total[0] = sum;
    store_relaxed(ticket, 0, 0u);
  }
}

// A chain through all blocks of a cooperative grid: each adds 1 to its predecessor's value. 0: release and acquire; 1:
// relaxed; 2: waits for a flag that is never set; 3: one flag that all blocks increment.
SK_KERNEL(32) chain_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto values = array<int32_t>(args, 0);  // [blocks]
  const auto flags = array<uint32_t>(args, 1);  // [blocks], 0
  const int64_t b = block_index();
  if (args.variant == 3) {
    if (thread_index() == 0) values[b] = static_cast<int>(b);
    if (thread_index() == 0) add_release(flags, 0, 1u);
    if (thread_index() == 0) wait_acquire(flags, 0, static_cast<uint32_t>(grid_blocks()));
    block_sync();
    const int32_t next = values[(b + 1) % grid_blocks()];
    grid_sync();
    if (thread_index() == 0) values[b] = next;
    return;
  }
  if (thread_index() != 0) return;
  int32_t before = 0;
  if (b > 0) {
    if (args.variant == 1) {
      while (load_relaxed(flags, b - 1) == 0) pause();
    } else {
      wait_acquire(flags, b - 1, 1u);
    }
    before = values[b - 1];
  }
  values[b] = before + 1;
  if (args.variant == 1) {
    store_relaxed(flags, b, 1u);
  } else if (args.variant != 2 || b != 2) {
    store_release(flags, b, 1u);
  }
}

// Rounds in which each block sums what all blocks published in the round before, through two slots, without a grid
// barrier. 0: waits for the publications of its round; 1: for one too few; 2: publishes before it writes.
SK_KERNEL(32) rounds_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto slots = array<int32_t>(args, 0);   // [2, blocks]
  const auto flags = array<uint32_t>(args, 1);  // [blocks], 0: publications of each block
  const auto out = array<int32_t>(args, 2);     // [rounds, blocks]
  const int64_t b = block_index(), blocks = grid_blocks(), rounds = args.bytes[2] / 4 / blocks;
  const auto publish = [&](int64_t round, int32_t value) {
    if (thread_index() != 0) return;
    if (args.variant == 2) add_release(flags, b, 1u);
    slots[round % 2 * blocks + b] = value;
    if (args.variant != 2) add_release(flags, b, 1u);
  };
  publish(0, static_cast<int32_t>(b));
  for (int64_t round = 0; round < rounds; ++round) {
    int32_t sum = 0;
    for (int64_t from = lane_index(); from < blocks; from += 32) {
      wait_acquire(flags, from, static_cast<uint32_t>(args.variant == 1 ? round : round + 1));
      const int32_t part = slots[round % 2 * blocks + from];
      sum += part;
    }
    warp_sync();  // a shuffle does not order memory
    for (int d = 16; d > 0; d /= 2) sum += shuffle_xor(sum, d);
    if (thread_index() == 0) out[round * blocks + b] = sum;
    publish(round + 1, sum % 1000 + static_cast<int32_t>(b));
  }
}

// Two rounds of a grid-wide rotation. 0: with both grid barriers; 1: without the second.
SK_KERNEL(64) rotate_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto a = array<int32_t>(args, 0), b = array<int32_t>(args, 1);
  const int64_t i = grid_thread_index(), n = grid_threads();
  a[i] = static_cast<int>(i);
  grid_sync();
  b[i] = a[(i + 1) % n];
  if (args.variant == 0) grid_sync();
  a[i] = b[(i + 65) % n];
}

// 0: each block writes its own word; 1: all blocks write one word.
SK_KERNEL(32) blocks_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);
  if (thread_index() == 0) out[args.variant == 0 ? block_index() : 0] = static_cast<int>(block_index());
}

// Asynchronous copies.

// Rows of 64 floats through a ring of three buffers, two rows ahead. 0: correct; 1: waits for one group too few; 2: no
// barrier after the wait; 3: no barrier after the reads, so that copies overwrite data that is still being read.
SK_KERNEL(32) ring_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const float>(args, 0);
  const auto out = array<float>(args, 1);  // each row reversed
  constexpr int kRow = 64, kRing = 3;
  const int64_t rows = args.bytes[0] / (kRow * 4);
  SharedArena arena;
  const auto ring = arena.array<float>(kRing * kRow);
  const int i = lane_index();
  const auto fetch = [&](int64_t row) {
    const auto to = ring + row % kRing * kRow;
    if (i < 16) copy_async<16>(to + 4 * i, in + row * kRow + 4 * i, true);
    copy_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int64_t row = 0; row < rows; ++row) {
    if (row + 2 < rows) {
      fetch(row + 2);
    } else {
      copy_async_commit();
    }
    if (args.variant == 1) {
      copy_async_wait<3>();
    } else {
      copy_async_wait<2>();
    }
    if (args.variant != 2) block_sync();
    const auto from = ring + row % kRing * kRow;
    out[row * kRow + i] = from[kRow - 1 - i];
    out[row * kRow + 32 + i] = from[31 - i];
    if (args.variant != 3) block_sync();
  }
}

// Copies of 4 and 8 bytes, and invalid copies, which write zeros.
SK_KERNEL(32) small_copies_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const float>(args, 0);  // [96]
  const auto out = array<float>(args, 1);       // [128]
  SharedArena arena;
  const auto tile = arena.array<float>(128);
  const int i = lane_index();
  copy_async<4>(tile + i, in + i, true);
  copy_async<8>(tile + 32 + 2 * i, in + 32 + 2 * i, i < 30);
  copy_async<4>(tile + 96 + i, in, false);
  copy_async_commit();
  copy_async_wait<0>();
  block_sync();
  for (int j = i; j < 128; j += 32) out[j] = tile[j];
}

// Copies the first `lane % 9` elements of pieces of 16 bytes, and 0 to 2 elements of pieces of 4 bytes.
SK_KERNEL(32) part_copies_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const BFloat16>(args, 0);  // [320]
  const auto out = array<BFloat16>(args, 1);       // [320]
  SharedArena arena;
  const auto tile = arena.array<BFloat16>(320);
  const int i = lane_index();
  copy_async_part<16>(tile + 8 * i, in + 8 * i, i % 9 + (args.variant == 1 && i == 31 ? 8 : 0));
  copy_async_part<4>(tile + 256 + 2 * i, in + 256 + 2 * i, i % 3);
  copy_async_commit();
  copy_async_wait<0>();
  block_sync();
  for (int j = i; j < 320; j += 32) out[j] = tile[j];
}

// Clusters.

// Each block reads its right neighbour's tile. 0: correct; 1: no barrier before the read; 2: the owner may have exited.
SK_KERNEL(32) neighbours_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<float>(args, 0);
  SharedArena arena;
  const auto tile = arena.array<float>(32);
  tile[lane_index()] = static_cast<float>(100 * block_index() + lane_index());
  if (args.variant != 1) cluster_sync();
  const auto theirs = remote(tile, (cluster_rank() + 1) % cluster_blocks());
  if (args.variant == 2 && cluster_rank() == 1) return;
  out[grid_thread_index()] = load(theirs, lane_index());
  if (args.variant != 2) cluster_sync();
}

// A recurrence: each block owns a slice of the state, computes its slice of the next state from the whole state and
// stores it into every block; two buffers with one barrier each. next[j] = state[j + 1] + state[j + 5] (mod n) + 1. 0:
// correct; 1: the reader does not wait; 2: only one buffer; 3: expects too many bytes.
SK_KERNEL(32) exchange_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<float>(args, 0);  // [clusters, n]
  const int steps = static_cast<int>(args.bytes[1] / 4);
  const int ranks = cluster_blocks(), rank = cluster_rank(), n = 32 * ranks, lane = lane_index();
  const int slots = args.variant == 2 ? 1 : 2;
  SharedArena arena;
  const auto state = arena.array<float>(2 * n);
  const auto bars = arena.array<MBarrier>(2);
  const int bytes = n * 4 + (args.variant == 3 ? 4 : 0);
  if (lane == 0) {
    for (int s = 0; s < 2; ++s) mbarrier_init(bars, s, 1);
    mbarrier_init_fence();
  }
  for (int i = lane; i < n; i += 32) state[i] = static_cast<float>(i);
  cluster_sync();
  float own = 0.f;
  for (int t = 0; t < steps; ++t) {
    const int from = t % slots, to = (t + 1) % slots;
    if (lane == 0) mbarrier_arrive_expect(bars, to, bytes);
    const auto now = state + from * n;
    const float a = now[(32 * rank + lane + 1) % n], b = now[(32 * rank + lane + 5) % n];
    own = a + b + 1.f;
    if (own > 1000.f) own -= 1000.f;
    warp_sync();
    for (int r = 0; r < ranks; ++r) {
      store_async(remote(state, r), to * n + 32 * rank + lane, Vec<float, 1>{{own}}, remote(bars, r) + to);
    }
    // Barrier `to` is used in every second step (with one slot, in every step): its phase is t / slots.
    if (args.variant != 1) mbarrier_wait(bars, to, t / slots % 2);
  }
  out[grid_thread_index()] = own;
  cluster_sync();
}

// Ping-pong between two blocks by remote arrivals. 0: correct; 1: the second block never answers.
SK_KERNEL(32) pingpong_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);  // [2]
  constexpr int kRounds = 9;
  SharedArena arena;
  const auto ball = arena.array<int32_t>(4);
  const auto bars = arena.array<MBarrier>(1);
  const int rank = cluster_rank();
  if (thread_index() == 0) {
    mbarrier_init(bars, 0, 1);
    mbarrier_init_fence();
    ball[0] = 0;
  }
  cluster_sync();
  if (thread_index() == 0) {
    const auto theirs = remote(ball, 1 - rank);
    for (int t = 0; t < kRounds; ++t) {
      if (rank == 1 || t > 0) mbarrier_wait(bars, 0, (rank == 1 ? t : t - 1) % 2);
      const int32_t got = ball[0];
      if (rank == 1 && t + 1 == kRounds) break;
      if (rank == 1 && args.variant == 1) break;
      store(theirs, 0, got + 1);
      mbarrier_arrive(remote(bars, 1 - rank), 0);
    }
    out[rank] = ball[0];
  }
  cluster_sync();
}

// Copies a row from global memory in bulk, and from there to every block of the cluster.
SK_KERNEL(32) bulk_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const float>(args, 0);  // [blocks, 64]
  const auto out = array<float>(args, 1);       // [blocks, ranks, 64]
  const int ranks = cluster_blocks(), rank = cluster_rank(), lane = lane_index();
  SharedArena arena;
  const auto row = arena.array<float>(64), all = arena.array<float>(64 * ranks);
  const auto bars = arena.array<MBarrier>(2);
  if (lane == 0) {
    mbarrier_init(bars, 0, 1);
    mbarrier_init(bars, 1, 1);
    mbarrier_init_fence();
  }
  cluster_sync();
  if (lane == 0) {
    mbarrier_arrive_expect(bars, 0, 256);
    copy_bulk(row, in + block_index() * 64, 64, bars);
    mbarrier_arrive_expect(bars, 1, 256 * ranks);
  }
  mbarrier_wait(bars, 0, 0);
  for (int j = lane; j < 64; j += 32) {
    const float v = row[j];
    row[j] = v + 1000.f * static_cast<float>(rank);
  }
  fence_async();
  block_sync();
  if (lane == 0) {
    for (int r = 0; r < ranks; ++r) copy_bulk(remote(all, r) + 64 * rank, row, 64, remote(bars, r) + 1);
  }
  mbarrier_wait(bars, 1, 0);
  for (int j = lane; j < 64 * ranks; j += 32) out[block_index() * 64 * ranks + j] = all[j];
  cluster_sync();
}

// 0: waits for all arrivals; 1: one arrival is missing; 2: one arrival too many; 3: not initialised.
SK_KERNEL(64) arrivals_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<int32_t>(args, 0);
  SharedArena arena;
  const auto bars = arena.array<MBarrier>(1);
  const auto tile = arena.array<int32_t>(64);
  if (thread_index() == 0 && args.variant != 3) mbarrier_init(bars, 0, args.variant == 2 ? 32 : 64);
  block_sync();
  tile[thread_index()] = thread_index();
  if (args.variant != 1 || thread_index() != 5) {
    if (args.variant == 2 && thread_index() == 0) mbarrier_arrive_expect(bars, 0, 4);
    mbarrier_arrive(bars, 0);
  }
  mbarrier_wait(bars, 0, 0);
  out[thread_index()] = tile[63 - thread_index()];
}

// Matrix fragments.

// One product of fragments, gathered and scattered through tables of element offsets: [32, elements of the fragment].
template <class T, int kK>
SK_KERNEL(32)
fragments_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto a = array<const T>(args, 0);
  const auto b = array<const T>(args, 1);
  const auto c = array<const float>(args, 2);
  const auto d = array<float>(args, 3);
  const auto table_a = array<const int32_t>(args, 4), table_b = array<const int32_t>(args, 5),
             table_c = array<const int32_t>(args, 6);
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t fa[4], fb[2];
  float fc[4];
  const int lane = lane_index();
  const auto gather = [&](uint32_t* words, int n, Global<const T> x, Global<const int32_t> table) {
    for (int i = 0; i < n; ++i) {
      Vec<T, kPerWord> word;
      for (int e = 0; e < kPerWord; ++e) word[e] = x[table[(lane * n + i) * kPerWord + e]];
      words[i] = bit_cast<uint32_t>(word);
    }
  };
  gather(fa, 4, a, table_a);
  gather(fb, 2, b, table_b);
  for (int i = 0; i < 4; ++i) fc[i] = c[table_c[lane * 4 + i]];
  if constexpr (kK == 16) {
    mma_m16n8k16<T>(fc, fa, fb);
  } else {
    if (args.variant == 1) {
      for (int i = 0; i < 4; ++i) fa[i] = to_tf32(bit_cast<float>(fa[i]));
      for (int i = 0; i < 2; ++i) fb[i] = to_tf32(bit_cast<float>(fb[i]));
    }
    mma_m16n8k8_tf32(fc, fa, fb);
  }
  for (int i = 0; i < 4; ++i) d[table_c[lane * 4 + i]] = fc[i];
}

// The words that each lane receives of matrices whose element (m, row, column) equals its offset.
template <int N, bool kTransposed>
SK_KERNEL(32)
matrices_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto out = array<uint32_t>(args, 0);  // [32, N]
  SharedArena arena;
  const auto tile = arena.array<BFloat16>(64 * N);
  for (int i = lane_index(); i < 64 * N; i += 32) tile[i] = BFloat16{static_cast<uint16_t>(i)};
  block_sync();
  uint32_t words[N];
  load_matrices<N, kTransposed>(words, tile + lane_index() % (8 * N) * 8);
  for (int i = 0; i < N; ++i) out[lane_index() * N + i] = words[i];
}

// C = A B^T for row-major A [64, K] and B [32, K] of a half type: cp.async, load_matrices and mma combined; 4 warps.
template <class T>
SK_KERNEL(128)
product_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto a = array<const T>(args, 0), b = array<const T>(args, 1);
  const auto c = array<float>(args, 2);                      // [64, 32]
  constexpr int kM = 64, kN = 32, kK = 32, kPitch = kK + 8;  // a pitch of 80 bytes avoids bank conflicts between 8 rows
  const int64_t K = args.bytes[0] / (kM * static_cast<int64_t>(sizeof(T)));
  SharedArena arena;
  const auto tiles_a = arena.array<T>(2 * kM * kPitch), tiles_b = arena.array<T>(2 * kN * kPitch);
  const int lane = lane_index(), warp = warp_index();
  const auto fetch = [&](int64_t step) {
    const int64_t k = step * kK;
    const auto to_a = tiles_a + step % 2 * kM * kPitch, to_b = tiles_b + step % 2 * kN * kPitch;
    for (int i = thread_index(); i < (kM + kN) * kK / 8; i += block_threads()) {
      const int row = i / (kK / 8), column = i % (kK / 8) * 8;
      if (row < kM) {
        copy_async<16>(to_a + (row * kPitch + column), a + (row * K + k + column));
      } else {
        copy_async<16>(to_b + ((row - kM) * kPitch + column), b + ((row - kM) * K + k + column));
      }
    }
    copy_async_commit();
  };
  float sums[4][4] = {};
  fetch(0);
  for (int64_t step = 0; step < K / kK; ++step) {
    if (step + 1 < K / kK) fetch(step + 1);
    if (step + 1 < K / kK) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    block_sync();
    const auto from_a = tiles_a + step % 2 * kM * kPitch, from_b = tiles_b + step % 2 * kN * kPitch;
    for (int k = 0; k < kK; k += 16) {
      uint32_t fa[4];
      load_matrices<4>(fa, from_a + ((warp * 16 + lane % 16) * kPitch + k + lane / 16 * 8));
      for (int n = 0; n < 4; ++n) {
        uint32_t fb[2];
        load_matrices<2>(fb, from_b + ((n * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8));
        mma_m16n8k16<T>(sums[n], fa, fb);
      }
    }
    block_sync();
  }
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < 4; ++i) {
      c[(warp * 16 + lane / 4 + i / 2 * 8) * kN + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
    }
  }
}

// Arithmetic.

SK_KERNEL(64) numbers_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const float>(args, 0);
  const auto as_bf16 = array<BFloat16>(args, 1);
  const auto as_f16 = array<Half>(args, 2);
  const auto back = array<float>(args, 3);  // [2, n]
  const auto tf32 = array<uint32_t>(args, 4);
  const auto packed = array<uint32_t>(args, 5);  // [2, n]
  const int64_t n = args.bytes[0] / 4;
  for (int64_t i = grid_thread_index(); i < n; i += grid_threads()) {
    const float v = in[i];
    as_bf16[i] = narrow<BFloat16>(v);
    as_f16[i] = narrow<Half>(v);
    back[i] = widen(narrow<BFloat16>(v));
    back[n + i] = widen(narrow<Half>(v));
    tf32[i] = to_tf32(v);
    packed[i] = pack_pair<BFloat16>(v, -v);
    packed[n + i] = pack_pair<Half>(v, -v);
  }
}

// out = 2 * in, 16 bytes at a time.
SK_KERNEL(64) vectors_kernel(const SK_GRID_CONSTANT Arrays args) {
  const auto in = array<const Half>(args, 0);
  const auto out = array<Half>(args, 1);
  const int64_t n = args.bytes[0] / 16;
  SharedArena arena;
  const auto tile = arena.array<Half>(8 * 64);
  for (int64_t i = grid_thread_index(); i < n; i += grid_threads()) {
    auto v = load_vec<8, Cache::kReadOnly>(in, 8 * i);
    for (int j = 0; j < 8; ++j) v[j] = narrow<Half>(2.f * widen(v[j]));
    store_vec(tile, 8 * thread_index(), v);
    const auto words = tile.as<uint32_t>();
    const uint32_t low = words[4 * thread_index()];
    auto w = load_vec<8>(tile, 8 * thread_index());
    w[7] = unpack_pair<Half>(low)[0] == widen(v[0]) ? w[7] : Half{0};
    store_vec<Cache::kStreaming>(out, 8 * i, w);
  }
}

// Barriers only, to measure the speed of the emulation.
SK_KERNEL(1024) barriers_kernel(const SK_GRID_CONSTANT Arrays args) {
  for (int i = 0; i < args.variant; ++i) block_sync();
}

// Kernels by name.

using Kernel = void (*)(Arrays);
struct Entry {
  Kernel kernel;
  LaunchConfig config;
};
LaunchConfig config(LaunchConfig::Grid grid, int block, int64_t shared_bytes = 0, int cluster = 1,
                    bool cooperative = false) {
  LaunchConfig c;
  c.grid = grid;
  c.block = block;
  c.shared_bytes = shared_bytes;
  c.cluster = cluster;
  c.cooperative = cooperative;
  return c;
}

const std::map<std::string, Entry>& entries() {
  static const std::map<std::string, Entry> all = {
      {"indices", {indices_kernel, config({3, 2, 2}, 64)}},
      {"shuffles", {shuffles_kernel, config({1}, 32)}},
      {"divergent_warp", {divergent_warp_kernel, config({1}, 32)}},
      {"reverse", {reverse_kernel, config({3}, 64, 65 * 4)}},
      {"neighbour", {neighbour_kernel, config({1}, 32)}},
      {"bounds", {bounds_kernel, config({1}, 32, 36 * 4)}},
      {"handover", {handover_kernel, config({1}, 64)}},
      {"histogram", {histogram_kernel, config({3}, 128)}},
      {"last_block", {last_block_kernel, config({40}, 32)}},
      {"chain", {chain_kernel, config({7}, 32, 0, 1, true)}},
      {"rounds", {rounds_kernel, config({5}, 32, 0, 1, true)}},
      {"rotate", {rotate_kernel, config({5}, 64, 0, 1, true)}},
      {"too_many", {rotate_kernel, config({1 << 20}, 64, 0, 1, true)}},
      {"too_much_shared", {rotate_kernel, config({1}, 64, 300 * 1024)}},
      {"blocks", {blocks_kernel, config({4}, 32)}},
      {"ring", {ring_kernel, config({1}, 32, 3 * 64 * 4)}},
      {"small_copies", {small_copies_kernel, config({1}, 32, 128 * 4)}},
      {"part_copies", {part_copies_kernel, config({1}, 32, 320 * 2)}},
      {"neighbours", {neighbours_kernel, config({8}, 32, 32 * 4, 4)}},
      {"exchange", {exchange_kernel, config({8}, 32, 2 * 128 * 4 + 16, 4)}},
      {"pingpong", {pingpong_kernel, config({2}, 32, 64, 2)}},
      {"bulk", {bulk_kernel, config({8}, 32, 64 * 5 * 4 + 16, 4)}},
      {"arrivals", {arrivals_kernel, config({1}, 64, 16 + 256)}},
      {"fragments_bfloat16", {fragments_kernel<BFloat16, 16>, config({1}, 32)}},
      {"fragments_float16", {fragments_kernel<Half, 16>, config({1}, 32)}},
      {"fragments_tf32", {fragments_kernel<float, 8>, config({1}, 32)}},
      {"matrices_1", {matrices_kernel<1, false>, config({1}, 32, 128)}},
      {"matrices_2", {matrices_kernel<2, false>, config({1}, 32, 256)}},
      {"matrices_4", {matrices_kernel<4, false>, config({1}, 32, 512)}},
      {"matrices_1_transposed", {matrices_kernel<1, true>, config({1}, 32, 128)}},
      {"matrices_2_transposed", {matrices_kernel<2, true>, config({1}, 32, 256)}},
      {"matrices_4_transposed", {matrices_kernel<4, true>, config({1}, 32, 512)}},
      {"product_bfloat16", {product_kernel<BFloat16>, config({1}, 128, 2 * 96 * 40 * 2)}},
      {"product_float16", {product_kernel<Half>, config({1}, 128, 2 * 96 * 40 * 2)}},
      {"numbers", {numbers_kernel, config({4}, 64)}},
      {"vectors", {vectors_kernel, config({2}, 64, 8 * 64 * 2)}},
      {"barriers", {barriers_kernel, config({1}, 256)}},
      {"barriers_1024", {barriers_kernel, config({1}, 1024)}},
  };
  return all;
}

}  // namespace
}  // namespace seqkernels

// Runs one kernel over host arrays, which it modifies. Returns the failure as text, or "" on success.
extern "C" __attribute__((visibility("default"))) const char* seqkernels_selftest(const char* name, int variant,
                                                                                  int count, void** data,
                                                                                  const int64_t* bytes) {
  static std::string answer;
  using namespace seqkernels;
  try {
    const Entry& entry = entries().at(name);
    Arrays arrays{};
    arrays.variant = variant;
    for (int i = 0; i < count; ++i) {
      arrays.bytes[i] = bytes[i];
#if defined(SEQKERNELS_EMULATE_CUDA)
      arrays.data[i] = data[i];
      emulation::register_array(data[i], bytes[i], ("array " + std::to_string(i)).c_str());
#else
      check_cuda(cudaMalloc(&arrays.data[i], bytes[i]), "allocation");
      check_cuda(cudaMemcpy(arrays.data[i], data[i], bytes[i], cudaMemcpyHostToDevice), "copy");
#endif
    }
    answer.clear();
    try {
      launch(entry.kernel, entry.config, arrays);
    } catch (const std::exception& error) {
      answer = error.what();
    }
    for (int i = 0; i < count; ++i) {
#if defined(SEQKERNELS_EMULATE_CUDA)
      emulation::unregister_array(data[i]);
#else
      read_back(data[i], arrays.data[i], bytes[i], nullptr);
      cudaFree(arrays.data[i]);
#endif
    }
  } catch (const std::exception& error) {
    answer = error.what();
  }
  return answer.c_str();
}
