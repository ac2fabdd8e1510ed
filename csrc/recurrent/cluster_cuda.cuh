// Layers walked by clusters of thread blocks (compute capability 9.0): one launch for all steps.
//
// A cluster owns 16 sequences of one direction; its blocks share the hidden units, a warp has 8 of them with all their
// gates, for all steps. Weights stay where the warp multiplies with them, the first kHeld blocks of K in registers and
// the rest in shared memory. After a step a warp pushes what it made, h (backward: the gradients of its gates), to
// every block of the cluster by distributed shared memory; each block counts the bytes that arrive in a barrier of its
// own and waits for nobody else. Clusters never meet, so a layer may have more of them than fit on the device at once.
//
// Two slots for what is pushed suffice. Let step s read slot s % 2 and push into slot (s + 1) % 2. A warp pushes the
// values of step s only when it has waited for all values of step s - 1. A warp of any block sends its values of step
// s - 1 after its product of step s - 1, which was its last read of slot (s - 1) % 2 = (s + 1) % 2 before the values of
// step s are there. So when the values of step s are pushed, every warp of the cluster is done with what they
// overwrite. With the same argument the bytes of a slot's next use never reach its barrier before the phase of this use
// is over: the one arrival that a phase waits for, beside bytes, is made by the block itself, after the phase before.
//
// Sequences go at their own pace along the links between rows: each is at its own step, one that has ended keeps
// pushing its last values, and a cluster ends with its longest sequence.
#pragma once

#include "recurrent/cells_cuda.cuh"
#include "recurrent/steps_cuda.cuh"

namespace seqkernels::cuda {

constexpr int kClusterWarps = 8;  // at most: a strip of 8 units each
constexpr int kClusterThreads = kClusterWarps * kWarp;
constexpr int kClusterBlocks = 16;
// Pieces of the weights that a lane keeps in registers, up to 128 of them: whole blocks of K of so many gates. More
// would spill.
template <class S, int kGates>
constexpr int kHeldPieces = (sizeof(S) == 4 ? 28
                             : kGates == 1  ? 30
                                            : 32) /
                            kGates * kGates;
constexpr int kRing = 3;  // steps of pre-activations under way

struct ClusterArgs {
  LayerArgs layer;
  const void* weights;  // [directions, strips, gates, blocks, 32] pieces
  int64_t tiles;        // of 16 sequences
};

struct ClusterForwardArgs : ClusterArgs {
  const void* from_x;  // [directions, rows, G * H] of the compute type
  void *h_n, *c_n;
};

struct ClusterBackwardArgs : ClusterArgs {
  const void *dy, *dcells;    // like y, or null
  const void *dh_n, *dc_n;    // [directions, B, H] or null
  void *dgates_x, *dgates_h;  // [directions, rows, G * H]
  void *dh0, *dc0;            // [directions, B, H] or null
};

// Shared memory of a block, for both passes. pieces: of the weights of a warp, of which kHeld are in registers.
template <class S, int kHeld, class Arena>
struct ClusterMemory {
  Shared<S> slots;        // [2, blocks, 2, 32] pieces
  Shared<S> weights;      // [warps, pieces - held, 32] pieces
  Shared<float> ring;     // [kRing, gates, 2, threads, 2]
  Shared<MBarrier> full;  // [2]
  SK_HOST_DEVICE ClusterMemory(Arena& arena, int64_t blocks, int64_t pieces, int64_t warps, int64_t ring_gates)
      : slots(arena.template array<S>(2 * blocks * 2 * kBlockSize<S>, 128)),
        weights(arena.template array<S>(warps * (pieces > kHeld ? pieces - kHeld : 0) * kBlockSize<S>, 128)),
        ring(arena.template array<float>(kRing * ring_gates * 2 * warps * kWarp * 2)),
        full(arena.template array<MBarrier>(2, 8)) {}
};

// Where a warp stands: its strip of units, its two rows of each lane, and the barriers.
template <class S>
struct Post {
  int direction, lane, g, t, rank, blocks_of_cluster;
  int tile, strip, strips, unit;  // unit: this lane's first of two
  bool idle;                      // there are fewer strips than warps

  SK_DEVICE explicit Post(const ClusterArgs& args) {
    lane = lane_index();
    g = lane / 4;
    t = lane % 4;
    rank = cluster_rank();
    blocks_of_cluster = cluster_blocks();
    const int64_t cluster = block_index() / blocks_of_cluster;
    direction = static_cast<int>(cluster / args.tiles);
    tile = static_cast<int>(cluster % args.tiles);
    strips = static_cast<int>((args.layer.H + kUnits - 1) / kUnits);
    strip = warp_index() * blocks_of_cluster + rank;
    idle = strip >= strips;
    unit = strip * kUnits + 2 * t;
  }
  SK_DEVICE int64_t sequence(int r) const { return static_cast<int64_t>(tile) * kTileRows + r * 8 + g; }
};

// The longest of 16 sequences.
SK_DEVICE int64_t steps_of_tile(const LayerArgs& layer, Global<const Link> links, int64_t tile) {
  int64_t most = 0;
  for (int64_t b = tile * kTileRows; b < (tile + 1) * kTileRows && b < layer.B; ++b) {
    const Link link = links[layer.rows + b];
    most = link.prev > most ? link.prev : most;
  }
  return most;
}

// Of a strip's weights, the first pieces go to registers, the others to shared memory. Piece p of a strip is that of
// strip p / blocks of the product, and block p % blocks; `order` says which come first.
template <class S, int kHeld, class Order>
SK_DEVICE void take_weights(const ClusterArgs& args, const Post<S>& post, int pieces, Order order, Words (&held)[kHeld],
                            Shared<S> rest) {
  const int64_t size = static_cast<int64_t>(args.layer.directions) * post.strips * pieces * kBlockSize<S>;
  const Global<const S> from =
      global<const S>(args.weights, size) +
      (static_cast<int64_t>(post.direction) * post.strips + post.strip) * pieces * kBlockSize<S>;
  SK_UNROLL
  for (int p = 0; p < kHeld; ++p) {
    held[p] = Words{};
    if (p < pieces && !post.idle) held[p] = load_words<S>(from, order(p) * kBlockSize<S> + post.lane * kPiece<S>);
  }
  if (post.idle) return;
  for (int p = kHeld; p < pieces; ++p) {
    store_vec(rest, (p - kHeld) * kBlockSize<S> + post.lane * kPiece<S>,
              load_vec<kPiece<S>, Cache::kReadOnly>(from, order(p) * kBlockSize<S> + post.lane * kPiece<S>));
  }
}

// sum[half] += one block of the tile times one piece: halves of K have sums of their own, so that fewer of the matrix
// instructions wait for each other.
template <class S>
SK_DEVICE void add_piece(float (&sum)[2][4], const Words& low, const Words& high, const Words& right) {
  SK_UNROLL
  for (int half = 0; half < 2; ++half) multiply<S>(sum[half], low, high, right, half);
}

// Pushes one row's two values of each lane, gathered to pieces of 16 bytes, to all blocks of the cluster. place: of the
// row and the strip's first unit, in a slot.
template <class S>
SK_DEVICE void push(const Post<S>& post, Shared<S> slot, int place, S first, S second, Shared<MBarrier> full, int at) {
  constexpr int kLanes = kPiece<S> / 2;  // that hold a piece together
  Piece<S> piece;
  SK_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    const int from = post.lane / kLanes * kLanes + i;
    piece[2 * i] = shuffle(first, from);
    piece[2 * i + 1] = shuffle(second, from);
  }
  if (post.idle) return;
  const int mine = place + post.t / kLanes * kPiece<S>;
  for (int peer = post.t % kLanes; peer < post.blocks_of_cluster; peer += kLanes) {
    store_async(remote(slot, peer), mine, piece, remote(full, peer) + at);
  }
}

// The extra arguments of a cell, all of them off.
template <class T>
SK_DEVICE Extra<T> no_extra() {
  const T infinity = static_cast<T>(INFINITY);
  return {T(0), T(0), T(1), T(1), infinity, infinity, T(0), T(1), T(1), {T(0), T(0), T(0)}};
}

// Two elements of what a caller brought, which may lie anywhere; zeros where there is nothing.
template <class S>
SK_DEVICE Vec<float, 2> pair_at(const void* from, int64_t at, int64_t count) {
  if (from == nullptr) return Vec<float, 2>{};
  const Global<const S> of = global<const S>(from, count);
  if (reinterpret_cast<uintptr_t>(from) % (2 * sizeof(S)) == 0) {
    const Vec<S, 2> v = load_vec<2>(of, at);
    return {{widen(v[0]), widen(v[1])}};
  }
  const S first = of[at], second = of[at + 1];
  return {{widen(first), widen(second)}};
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------

// Grid: a cluster for each 16 sequences of each direction. H is a multiple of 8.
template <class Cell>
SK_KERNEL(kClusterThreads, 1)
cluster_forward_kernel(const SK_GRID_CONSTANT ClusterForwardArgs args) {
  if constexpr (kHasClusters) {
    using S = typename Cell::Storage;
    constexpr int kGates = Cell::kGates, kPieces = kHeldPieces<S, kGates>, kHeld = kPieces / kGates;  // blocks of K
    constexpr bool kHasC = Cell::kStates > 1;
    const LayerArgs& layer = args.layer;
    const int64_t H = layer.H;
    const int blocks = static_cast<int>(blocks_of<S>(H)), pieces = blocks * kGates;
    const Post<S> post(args);
    const int d = post.direction, threads = block_threads();
    SharedArena arena;
    const ClusterMemory<S, kPieces, SharedArena> memory(arena, blocks, pieces, threads / kWarp, kGates);
    const int slot_size = blocks * 2 * kBlockSize<S>;
    const int bytes = static_cast<int>(post.strips * kUnits * kTileRows * sizeof(S));

    const Global<const Link> links = global<const Link>(layer.links, layer.link_count()) + d * (layer.rows + layer.B);
    const Global<const S> h0 = global<const S>(layer.h0, layer.h0 == nullptr ? 0 : layer.states());
    const Global<const float> from_x = global<const float>(args.from_x, layer.directions * layer.rows * kGates * H);
    const int64_t steps = steps_of_tile(layer, links, post.tile);

    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i) mbarrier_init(memory.full, i, 1);
      mbarrier_init_fence();
      for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(memory.full, i, bytes);
    }
    Words held[kPieces];
    const Shared<S> rest = memory.weights + warp_index() * (pieces > kPieces ? pieces - kPieces : 0) * kBlockSize<S>;
    // Block by block, so that a held block has all its gates.
    take_weights(args, post, pieces, [&](int p) { return p % kGates * blocks + p / kGates; }, held, rest);
    for (int i = thread_index(); i < blocks * 64; i += threads) {
      const int64_t b = post.sequence(0) - post.g + i / 32 % 2 * 8 + i % 32 / 4,
                    unit = i / 64 * kBlockK<S> + i % 4 * kPiece<S>;
      Piece<S> piece{};
      if (h0 && b < layer.B) {
        SK_UNROLL
        for (int e = 0; e < kPiece<S>; ++e) {
          if (unit + e < H) piece[e] = operand(load<Cache::kReadOnly>(h0, (d * layer.B + b) * H + unit + e), true);
        }
      }
      store_vec(memory.slots, i * kPiece<S>, piece);
      store_vec(memory.slots, slot_size + i * kPiece<S>, Piece<S>{});
    }

    // This lane's two rows and two units of each.
    float c[2][2] = {}, h[2][2] = {};
    int64_t at[kRing][2];  // the row of this step and of those after it
    SK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t b = post.sequence(r);
      at[0][r] = kNobody;
      if (b >= layer.B || post.idle) continue;
      const Link link = links[layer.rows + b];
      at[0][r] = link.next;
      const int64_t state = (d * layer.B + b) * H + post.unit;
      const Vec<float, 2> from_h = pair_at<S>(layer.h0, state, layer.states());
      const Vec<float, 2> from_c = kHasC ? pair_at<S>(layer.c0, state, layer.states()) : Vec<float, 2>{};
      SK_UNROLL
      for (int i = 0; i < 2; ++i) {
        h[r][i] = from_h[i];
        c[r][i] = from_c[i];
      }
    }
    const auto follow = [&](int64_t link) -> int64_t {
      if (link < 0) return kNobody;
      const Link of = links[link & ~kCut];
      return of.next;
    };
    const auto fetch = [&](int stage, const int64_t (&rows)[2]) {
      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (rows[r] >= 0) {
          const int64_t row = rows[r] & ~kCut;
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            copy_async<8>(memory.ring + (((stage * kGates + gate) * 2 + r) * threads + thread_index()) * 2,
                          from_x + ((d * layer.rows + row) * kGates + gate) * H + post.unit);
          }
        }
      }
      copy_async_commit();
    };
    SK_UNROLL
    for (int i = 1; i < kRing; ++i) {
      SK_UNROLL
      for (int r = 0; r < 2; ++r) at[i][r] = follow(at[i - 1][r]);
    }
    SK_UNROLL
    for (int i = 0; i < kRing - 1; ++i) fetch(i, at[i]);
    float bias[kGates][2] = {};
    if (Cell::kSeparate && layer.bias_h[d] != nullptr && !post.idle) {
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        const Vec<float, 2> from = pair_at<S>(layer.bias_h[d], gate * H + post.unit, kGates * H);
        bias[gate][0] = from[0];
        bias[gate][1] = from[1];
      }
    }
    cluster_sync();

    const Extra<float> e = no_extra<float>();
    int stage = 0;
    for (int64_t s = 0; s < steps; ++s) {
      const int slot = static_cast<int>(s % 2);
      fetch((stage + kRing - 1) % kRing, at[kRing - 1]);
      int64_t ahead[2];
      SK_UNROLL
      for (int r = 0; r < 2; ++r) ahead[r] = follow(at[kRing - 1][r]);
      if (s > 0) {
        mbarrier_wait(memory.full, slot, static_cast<int>((s - 1) / 2 % 2));
        if (thread_index() == 0) mbarrier_arrive_expect(memory.full, slot, bytes);
      }

      float sum[kGates][2][4] = {};
      const Shared<S> tile = memory.slots + slot * slot_size;
      if (!post.idle) {
        SK_UNROLL
        for (int block = 0; block < kHeld; ++block) {
          if (block >= blocks) continue;
          const Words low = load_words<S>(tile, block * 2 * kBlockSize<S> + post.lane * kPiece<S>);
          const Words high = load_words<S>(tile, (block * 2 + 1) * kBlockSize<S> + post.lane * kPiece<S>);
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) add_piece<S>(sum[gate], low, high, held[block * kGates + gate]);
        }
        for (int block = kHeld; block < blocks; ++block) {
          const Words low = load_words<S>(tile, block * 2 * kBlockSize<S> + post.lane * kPiece<S>);
          const Words high = load_words<S>(tile, (block * 2 + 1) * kBlockSize<S> + post.lane * kPiece<S>);
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            const int p = (block - kHeld) * kGates + gate;
            add_piece<S>(sum[gate], low, high, load_words<S>(rest, p * kBlockSize<S> + post.lane * kPiece<S>));
          }
        }
      }
      copy_async_wait<kRing - 1>();  // of this step

      S now[2][2];
      float saved[2][2][Cell::kSaved];
      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t link = at[0][r];
        if (link >= 0) {
          const bool anew = starts_anew(link);
          Vec<float, 2> x[kGates];
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            x[gate] = load_vec<2>(memory.ring, (((stage * kGates + gate) * 2 + r) * threads + thread_index()) * 2);
          }
          SK_UNROLL
          for (int i = 0; i < 2; ++i) {
            float of_x[kGates], of_h[kGates];
            SK_UNROLL
            for (int gate = 0; gate < kGates; ++gate) {
              of_x[gate] = x[gate][i];
              of_h[gate] = (anew ? 0.0f : sum[gate][0][2 * r + i] + sum[gate][1][2 * r + i]) + bias[gate][i];
            }
            if (anew) c[r][i] = h[r][i] = 0.0f;
            h[r][i] = rounded<S>(Cell::forward(of_x, of_h, e, h[r][i], c[r][i], saved[r][i]));
          }
        }
        SK_UNROLL
        for (int i = 0; i < 2; ++i) now[r][i] = narrow<S>(h[r][i]);
      }
      if (s + 1 < steps) {
        warp_sync();  // a lane's push stands for what the whole warp has read
        const Shared<S> to = memory.slots + (1 - slot) * slot_size;
        const int unit = post.strip * kUnits;
        SK_UNROLL
        for (int r = 0; r < 2; ++r) {
          push(post, to, r * kBlockSize<S> + static_cast<int>(place_in_tile<S>(post.g, unit)), operand(now[r][0], true),
               operand(now[r][1], true), memory.full, 1 - slot);
        }
      }

      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t row = at[0][r] & ~kCut;
        if (at[0][r] < 0) continue;
        const int64_t out = (row * layer.directions + d) * H + post.unit;
        const Vec<S, 2> h_now{{now[r][0], now[r][1]}};
        store_vec(global<S>(layer.y, layer.outputs()), out, h_now);
        Vec<S, 2> c_now{};
        if constexpr (kHasC) {
          c_now = {{narrow<S>(c[r][0]), narrow<S>(c[r][1])}};
          if (layer.cells != nullptr) store_vec<Cache::kStreaming>(global<S>(layer.cells, layer.outputs()), out, c_now);
        }
        if (layer.saved != nullptr && layer.saved_width > 0) {
          const Global<S> to = global<S>(layer.saved, layer.directions * layer.rows * layer.saved_width);
          SK_UNROLL
          for (int k = 0; k < Cell::kSaved; ++k) {
            store_vec<Cache::kStreaming>(to, (d * layer.rows + row) * layer.saved_width + k * H + post.unit,
                                         Vec<S, 2>{{narrow<S>(saved[r][0][k]), narrow<S>(saved[r][1][k])}});
          }
        }
        if (at[1][r] == kNobody && args.h_n != nullptr) {
          const int64_t state = (d * layer.B + post.sequence(r)) * H + post.unit;
          store_vec(global<S>(args.h_n, layer.states()), state, h_now);
          if (kHasC && args.c_n != nullptr) store_vec(global<S>(args.c_n, layer.states()), state, c_now);
        }
      }
      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        SK_UNROLL
        for (int i = 0; i + 1 < kRing; ++i) at[i][r] = at[i + 1][r];
        at[kRing - 1][r] = ahead[r];
      }
      stage = (stage + 1) % kRing;
    }
    copy_async_wait<0>();
    cluster_sync();  // nobody leaves while others push to it
  }
}

// ---- backward
// --------------------------------------------------------------------------------------------------------

// The walk the other way: the gradients of the gates of all units are pushed, G times as many values as h, and a warp
// multiplies them with the columns of W_hh of its units.
template <class Cell>
SK_KERNEL(kClusterThreads, 1)
cluster_backward_kernel(const SK_GRID_CONSTANT ClusterBackwardArgs args) {
  if constexpr (kHasClusters) {
    using S = typename Cell::Storage;
    constexpr int kGates = Cell::kGates, kPieces = kHeldPieces<S, 1>;
    constexpr bool kHasC = Cell::kStates > 1;
    const LayerArgs& layer = args.layer;
    const int64_t H = layer.H;
    const int of_gate = static_cast<int>(blocks_of<S>(H)), blocks = of_gate * kGates;
    const Post<S> post(args);
    const int d = post.direction, threads = block_threads();
    SharedArena arena;
    const ClusterMemory<S, kPieces, SharedArena> memory(arena, blocks, blocks, threads / kWarp, 0);
    const int slot_size = blocks * 2 * kBlockSize<S>;
    const int bytes = static_cast<int>(post.strips * kUnits * kTileRows * kGates * sizeof(S));

    const Global<const Link> links = global<const Link>(layer.links, layer.link_count()) + d * (layer.rows + layer.B);
    const int64_t steps = steps_of_tile(layer, links, post.tile);

    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i) mbarrier_init(memory.full, i, 1);
      mbarrier_init_fence();
      for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(memory.full, i, bytes);
    }
    Words held[kPieces];
    const Shared<S> rest = memory.weights + warp_index() * (blocks > kPieces ? blocks - kPieces : 0) * kBlockSize<S>;
    take_weights(args, post, blocks, [](int p) { return p; }, held, rest);
    // What no strip fills of the last blocks stays zero.
    for (int i = thread_index(); i < 2 * blocks * 64; i += threads) store_vec(memory.slots, i * kPiece<S>, Piece<S>{});

    float dc[2][2] = {}, direct[2][2] = {};  // of the state of the row to come; direct: not by way of the product
    bool cut[2] = {};                        // that nothing comes by way of the product
    int64_t at[2], before[2] = {kNobody, kNobody};  // the row of this step, and its link to the row before
    const auto link_of = [&](int64_t row) -> int64_t {
      if (row < 0 || row >= layer.rows) return kNobody;
      const Link link = links[row];
      return link.prev;
    };
    SK_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t b = post.sequence(r);
      at[r] = kNobody;
      cut[r] = true;
      if (b >= layer.B || post.idle) continue;
      const Link link = links[layer.rows + b];
      at[r] = link.last == kNobody ? layer.rows + b : link.last;
      before[r] = link_of(at[r]);
      const int64_t state = (d * layer.B + b) * H + post.unit;
      const Vec<float, 2> dh_n = pair_at<S>(args.dh_n, state, layer.states());
      const Vec<float, 2> dc_n = kHasC ? pair_at<S>(args.dc_n, state, layer.states()) : Vec<float, 2>{};
      SK_UNROLL
      for (int i = 0; i < 2; ++i) {
        direct[r][i] = dh_n[i];
        dc[r][i] = dc_n[i];
      }
    }
    cluster_sync();

    const Extra<float> e = no_extra<float>();
    for (int64_t s = 0; s <= steps; ++s) {
      const int slot = static_cast<int>(s % 2);
      // What this step reads is on its way while the product is made.
      Vec<float, 2> saved[2][Cell::kSaved], dy[2] = {}, dcells[2] = {}, c[2] = {}, c_prev[2] = {}, h_prev[2] = {};
      int64_t ahead[2] = {kNobody, kNobody};
      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (at[r] < 0 || at[r] >= layer.rows) continue;
        const int64_t row = at[r], out = (row * layer.directions + d) * H + post.unit;
        const int64_t state = (d * layer.B + post.sequence(r)) * H + post.unit;
        const int64_t prev = before[r] & ~kCut, prev_out = (prev * layer.directions + d) * H + post.unit;
        const bool anew = starts_anew(before[r]), initial = prev >= layer.rows;
        const auto previous = [&](const void* every, const void* start) {
          if (anew) return Vec<float, 2>{};
          return initial ? pair_at<S>(start, state, layer.states()) : pair_at<S>(every, prev_out, layer.outputs());
        };
        ahead[r] = link_of(prev);
        if (!initial && post.t == 0) {  // one lane for the 16 bytes or more of a row's strip
          if (args.dy != nullptr) prefetch_l2(global<const S>(args.dy, layer.outputs()), prev_out);
          if (layer.saved_width > 0) {
            SK_UNROLL
            for (int k = 0; k < Cell::kSaved; ++k) {
              prefetch_l2(global<const S>(layer.saved, layer.directions * layer.rows * layer.saved_width),
                          (d * layer.rows + prev) * layer.saved_width + k * H + post.unit);
            }
          }
        }
        dy[r] = pair_at<S>(args.dy, out, layer.outputs());
        if constexpr (kHasC) {
          dcells[r] = pair_at<S>(args.dcells, out, layer.outputs());
          c[r] = pair_at<S>(layer.cells, out, layer.outputs());
          c_prev[r] = previous(layer.cells, layer.c0);
        }
        if (Cell::kReadsH) h_prev[r] = previous(layer.y, layer.h0);
        SK_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) {
          saved[r][k] = layer.saved_width == 0
                            ? pair_at<S>(layer.y, out, layer.outputs())
                            : pair_at<S>(layer.saved, (d * layer.rows + row) * layer.saved_width + k * H + post.unit,
                                         layer.directions * layer.rows * layer.saved_width);
        }
      }
      if (s > 0) {
        mbarrier_wait(memory.full, slot, static_cast<int>((s - 1) / 2 % 2));
        if (thread_index() == 0) mbarrier_arrive_expect(memory.full, slot, bytes);
      }

      float sum[2][2][4] = {};  // of even and odd blocks
      const Shared<S> tile = memory.slots + slot * slot_size;
      if (!post.idle && s > 0) {
        SK_UNROLL
        for (int block = 0; block < kPieces; ++block) {
          if (block >= blocks) continue;
          add_piece<S>(sum[block % 2], load_words<S>(tile, block * 2 * kBlockSize<S> + post.lane * kPiece<S>),
                       load_words<S>(tile, (block * 2 + 1) * kBlockSize<S> + post.lane * kPiece<S>), held[block]);
        }
        for (int block = kPieces; block < blocks; block += 2) {
          SK_UNROLL
          for (int i = 0; i < 2; ++i) {
            if (block + i >= blocks) continue;
            add_piece<S>(sum[i], load_words<S>(tile, (block + i) * 2 * kBlockSize<S> + post.lane * kPiece<S>),
                         load_words<S>(tile, ((block + i) * 2 + 1) * kBlockSize<S> + post.lane * kPiece<S>),
                         load_words<S>(rest, (block + i - kPieces) * kBlockSize<S> + post.lane * kPiece<S>));
          }
        }
      }

      float by_x[2][kGates][2] = {}, by_h[2][kGates][2] = {};
      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (at[r] < 0) continue;
        const int64_t state = (d * layer.B + post.sequence(r)) * H + post.unit;
        float dh[2];
        SK_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int k = 2 * r + i;
          const float product = (sum[0][0][k] + sum[0][1][k]) + (sum[1][0][k] + sum[1][1][k]);
          dh[i] = (cut[r] ? 0.0f : product) + direct[r][i];
        }
        if (at[r] >= layer.rows) {  // initial states
          if (args.dh0 != nullptr) {
            store_vec(global<S>(args.dh0, layer.states()), state, Vec<S, 2>{{narrow<S>(dh[0]), narrow<S>(dh[1])}});
          }
          if (kHasC && args.dc0 != nullptr) {
            store_vec(global<S>(args.dc0, layer.states()), state,
                      Vec<S, 2>{{narrow<S>(dc[r][0]), narrow<S>(dc[r][1])}});
          }
          continue;
        }
        SK_UNROLL
        for (int i = 0; i < 2; ++i) {
          float kept[Cell::kSaved];
          SK_UNROLL
          for (int k = 0; k < Cell::kSaved; ++k) kept[k] = saved[r][k][i];
          StepGradient<float> step;
          dc[r][i] += dcells[r][i];
          Cell::backward(kept, e, 0.0f, h_prev[r][i], c[r][i], c_prev[r][i], dh[i] + dy[r][i], dc[r][i], step);
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            by_x[r][gate][i] = step.x[gate];
            by_h[r][gate][i] = Cell::kSeparate ? step.h[gate] : step.x[gate];
          }
          direct[r][i] = step.direct;
        }
      }
      if (s < steps) {
        warp_sync();  // a lane's push stands for what the whole warp has read
        const Shared<S> to = memory.slots + (1 - slot) * slot_size;
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          SK_UNROLL
          for (int r = 0; r < 2; ++r) {
            push(post, to,
                 (gate * of_gate * 2 + r) * kBlockSize<S> +
                     static_cast<int>(place_in_tile<S>(post.g, post.strip * kUnits)),
                 operand(narrow<S>(by_h[r][gate][0]), true), operand(narrow<S>(by_h[r][gate][1]), true), memory.full,
                 1 - slot);
          }
        }
      }

      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (at[r] >= 0 && at[r] < layer.rows) {
          const int64_t size = layer.directions * layer.rows * kGates * H;
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            const int64_t to = ((d * layer.rows + at[r]) * kGates + gate) * H + post.unit;
            store_vec(global<S>(args.dgates_x, size), to,
                      Vec<S, 2>{{narrow<S>(by_x[r][gate][0]), narrow<S>(by_x[r][gate][1])}});
            if (Cell::kSeparate) {
              store_vec(global<S>(args.dgates_h, size), to,
                        Vec<S, 2>{{narrow<S>(by_h[r][gate][0]), narrow<S>(by_h[r][gate][1])}});
            }
          }
          cut[r] = starts_anew(before[r]);
          at[r] = before[r] & ~kCut;
          before[r] = ahead[r];
          if (cut[r]) direct[r][0] = direct[r][1] = dc[r][0] = dc[r][1] = 0.0f;
        } else {
          at[r] = kNobody;
        }
      }
    }
    cluster_sync();
  }
}

}  // namespace seqkernels::cuda
