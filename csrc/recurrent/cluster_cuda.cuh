// Layers walked by clusters of thread blocks (compute capability 9.0): one launch for all steps.
//
// A cluster owns up to 8 sequences of one direction, the rows of its tile; the fewer, the less its blocks have to tell
// each other, so a batch is dealt out to as many clusters as the device holds at once. Its blocks share the hidden
// units, 16 of them to a group of four warps, with all their gates and for all steps. The four warps of a group share
// the sum over K: weights stay where a warp multiplies with them, the first kHeld blocks of K in registers and the rest
// in shared memory. The matrix instructions take the weights as their 16 rows and the tile as their 8 columns. The
// partial sums meet in shared memory, in the order of the warps, and each lane then has one unit of one row.
//
// After a step a warp pushes what it made, h (backward: the gradients of its gates), to every block of the cluster by
// distributed shared memory; each block counts the bytes that arrive in a barrier of its own and waits for nobody else.
// Clusters never meet, so a layer may have more of them than fit on the device at once.
//
// Two slots for what is pushed suffice. Let step s read slot s % 2 and push into slot (s + 1) % 2. A warp pushes the
// values of step s only when it has waited for all values of step s - 1. Before a warp of any block sends its values of
// step s - 1, its group has met, and with that the last read of slot (s - 1) % 2 = (s + 1) % 2 by any of its warps is
// over. So when the values of step s are pushed, every warp of the cluster is done with what they overwrite. With the
// same argument the bytes of a slot's next use never reach its barrier before the phase of this use is over: the one
// arrival that a phase waits for, beside bytes, is made by the block itself, after the phase before. And a group's
// partial sums of the next step are written by warps that have waited for what their readers pushed after reading.
//
// Sequences go at their own pace along the links between rows: each is at its own step, one that has ended keeps
// pushing its last values, and a cluster ends with its longest sequence.
#pragma once

#include "recurrent/cells_cuda.cuh"
#include "recurrent/steps_cuda.cuh"

namespace seqkernels::cuda {

constexpr int kClusterBlocks = 16;
constexpr int kClusterRows = 8;  // of a tile, at most
constexpr int kGroupUnits = 16;  // of four warps
constexpr int kGroupWarps = 4;   // which share K
constexpr int kGroupThreads = kGroupWarps * kWarp;
constexpr int kSums = kGroupUnits * kClusterRows;  // of a warp and a tile: [2 strips, 8 rows, 8 units]
constexpr int kFewGroups = 2, kManyGroups = 3;     // of a block: kernels come for up to two groups and for three
constexpr int kRing = 3;                           // steps of pre-activations under way

// Blocks of K of `tiles` times 16 units that a lane keeps in registers: up to 128 registers of the 255 that a thread
// has in blocks of two groups, 96 of 168 in blocks of three. TF32 computes with the library's functions, which want
// more.
template <class S>
SK_HOST_DEVICE constexpr int kept_blocks(int groups, int tiles) {
  const bool wide = sizeof(S) == 4;
  const int pieces = groups > kFewGroups ? (tiles > 1 ? (wide ? 8 : 24) : wide ? 16 : 20) : wide ? 24 : 32;
  return pieces / (2 * tiles);
}

struct ClusterArgs {
  LayerArgs layer;
  const void* weights;  // [directions, strips, gates, blocks, 32] pieces
  int64_t tiles;        // of `rows` sequences
  int rows;             // 1, 2, 4 or 8
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

// What a slot holds is cut along K in columns of 16 bytes a row, so that a group's share lies side by side: element
// (row, k) in column k / kPiece. Distances between columns that let a warp read four columns without conflicts of
// banks.
template <class S>
SK_HOST_DEVICE int column_size(int rows) {
  return (rows * 16 + (rows >= 4 ? 32 : 0)) / static_cast<int>(sizeof(S));
}

// Shared memory of a block, for both passes: `pushed` gates, `tiles` of 16 units that a group sums. What every step
// addresses has strides that are known at compile time, those of kGroups groups and of eight rows.
template <class S, int kGroups, class Arena>
struct ClusterMemory {
  static constexpr int kThreads = kGroups * kGroupThreads;
  Shared<S> slots;        // [2, blocks of K, 4] columns
  Shared<S> weights;      // [warps, rest blocks, tiles, 2, 32] pieces
  Shared<float> ring;     // [kRing, ring_gates, kThreads]
  Shared<float> partial;  // [groups, kGroupWarps, tiles, kSums]
  Shared<S> stage;        // [warps, pushed, 4 rows, kUnits], rows of a column together
  Shared<MBarrier> full;  // [2]
  SK_HOST_DEVICE ClusterMemory(Arena& arena, int64_t rows, int64_t blocks, int64_t rest, int64_t tiles, int64_t pushed,
                               int64_t ring_gates)
      : slots(arena.template array<S>(2 * blocks * 4 * column_size<S>(static_cast<int>(rows)), 128)),
        weights(
            arena.template array<S>(kGroups * kGroupWarps * (rest > 0 ? rest : 0) * tiles * 2 * kBlockSize<S>, 128)),
        ring(arena.template array<float>(kRing * ring_gates * kThreads)),
        partial(arena.template array<float>(kGroups * kGroupWarps * tiles * kSums)),
        stage(arena.template array<S>(kGroups * kGroupWarps * pushed * 4 * kUnits)),
        full(arena.template array<MBarrier>(2, 8)) {}
};

// Blocks of K that a warp of a group has at most.
SK_HOST_DEVICE int64_t blocks_of_warp(int64_t blocks) { return (blocks + kGroupWarps - 1) / kGroupWarps; }

// Where a lane stands.
template <class S>
struct Post {
  int direction, lane, g, t, rank, blocks_of_cluster;
  int rows;          // of the tile
  int group, part;   // of the block; of the group
  int pair, strips;  // strips 2 * pair and 2 * pair + 1 of 8 units are the group's
  bool idle;         // there are fewer pairs than groups
  // The unit and the row that are this lane's, once the sums have met: of a warp, 8 units of four rows.
  int strip, unit, row, sequence;
  bool has_unit, alive;  // alive: it has a unit of a row of the tile, if not of a sequence

  SK_DEVICE explicit Post(const ClusterArgs& args) : rows(args.rows) {
    lane = lane_index();
    g = lane / 4;
    t = lane % 4;
    rank = cluster_rank();
    blocks_of_cluster = cluster_blocks();
    const int64_t cluster = block_index() / blocks_of_cluster;
    direction = static_cast<int>(cluster / args.tiles);
    strips = static_cast<int>((args.layer.H + kUnits - 1) / kUnits);
    group = warp_index() / kGroupWarps;
    part = warp_index() % kGroupWarps;
    pair = group * blocks_of_cluster + rank;
    idle = 2 * pair >= strips;
    strip = part / 2;
    unit = (2 * pair + strip) * kUnits + lane % kUnits;
    row = part % 2 * 4 + lane / kUnits;
    sequence = static_cast<int>(cluster % args.tiles) * rows + row;
    has_unit = 2 * pair + strip < strips;
    alive = has_unit && row < rows;
  }
};

// The longest of a tile's sequences.
SK_DEVICE int64_t steps_of_tile(const ClusterArgs& args, Global<const Link> links, int64_t tile) {
  int64_t most = 0;
  for (int64_t b = tile * args.rows; b < (tile + 1) * args.rows && b < args.layer.B; ++b) {
    const Link link = links[args.layer.rows + b];
    most = link.prev > most ? link.prev : most;
  }
  return most;
}

// What a warp multiplies with: of 16 units its share of K, kTiles times (forward: for each gate).
template <class S, int kTiles, int kHeld>
struct Factors {
  // Sums of few tiles are cut, so that fewer of the matrix instructions wait for each other.
  static constexpr int kChains = kTiles == 1 ? 4 : 1;
  Words held[kHeld][kTiles][2];
  Shared<S> rest;
  int first, count;  // blocks
  int mine, step;    // where in a slot this lane reads its first block, and from a block to the next

  // Piece `piece(tile, block)` of a strip.
  template <class PieceOf>
  SK_DEVICE Factors(const ClusterArgs& args, const Post<S>& post, int blocks, Shared<S> of_warps, PieceOf piece) {
    const int most = static_cast<int>(blocks_of_warp(blocks)), pieces = kTiles * blocks;
    first = post.part * most;
    count = blocks - first < most ? blocks - first : most;
    if (count < 0 || post.idle) count = 0;
    step = 4 * column_size<S>(post.rows);
    mine = first * step + post.t * column_size<S>(post.rows) + (post.g & (post.rows - 1)) * kPiece<S>;
    rest =
        of_warps + static_cast<int64_t>(warp_index()) * (most > kHeld ? most - kHeld : 0) * kTiles * 2 * kBlockSize<S>;
    const int64_t size = static_cast<int64_t>(args.layer.directions) * post.strips * pieces * kBlockSize<S>;
    const Global<const S> from = global<const S>(args.weights, size);
    const int64_t strip0 = static_cast<int64_t>(post.direction) * post.strips + 2 * post.pair;
    const auto at = [&](int block, int tile, int half) {
      return ((strip0 + half) * pieces + piece(tile, first + block)) * kBlockSize<S> + post.lane * kPiece<S>;
    };
    const auto there = [&](int half) { return 2 * post.pair + half < post.strips; };
    SK_UNROLL
    for (int block = 0; block < kHeld; ++block) {
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
          held[block][tile][half] = Words{};
          if (block < count && there(half)) held[block][tile][half] = load_words<S>(from, at(block, tile, half));
        }
      }
    }
    for (int block = kHeld; block < count; ++block) {
      for (int tile = 0; tile < kTiles; ++tile) {
        for (int half = 0; half < 2; ++half) {
          Piece<S> piece_of{};
          if (there(half)) piece_of = load_vec<kPiece<S>, Cache::kReadOnly>(from, at(block, tile, half));
          store_vec(rest, place(block, tile, half) + post.lane * kPiece<S>, piece_of);
        }
      }
    }
  }

  // sum[tile]: units g and g + 8 of the group, rows 2t and 2t + 1 of the tile. Rows that the tile has not repeat
  // others.
  SK_DEVICE void times(const Post<S>& post, Shared<S> slot, float (&sum)[kTiles][4]) const {
    const Shared<S> from = slot + mine;
    float chains[kTiles][kChains][4] = {};
    SK_UNROLL
    for (int block = 0; block < kHeld; ++block) {
      if (block >= count) continue;
      const Words right = load_words<S>(from, block * step);
      SK_UNROLL
      for (int half = 0; half < 2; ++half) {
        SK_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply<S>(chains[tile][(block % 2 * 2 + half) % kChains], held[block][tile][0], held[block][tile][1], right,
                      half);
        }
      }
    }
    // Two blocks at a time, so that the chain of each is known.
    for (int block = kHeld; block < count; block += 2) {
      SK_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (block + i >= count) continue;
        const Words right = load_words<S>(from, (block + i) * step);
        SK_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          const Words low = load_words<S>(rest, place(block + i, tile, 0) + post.lane * kPiece<S>);
          const Words high = load_words<S>(rest, place(block + i, tile, 1) + post.lane * kPiece<S>);
          SK_UNROLL
          for (int half = 0; half < 2; ++half) {
            multiply<S>(chains[tile][(i * 2 + half) % kChains], low, high, right, half);
          }
        }
      }
    }
    SK_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SK_UNROLL
      for (int k = 0; k < 4; ++k) {
        sum[tile][k] = chains[tile][0][k];
        if constexpr (kChains == 4) {
          sum[tile][k] = (chains[tile][0][k] + chains[tile][1][k]) + (chains[tile][2][k] + chains[tile][3][k]);
        }
      }
    }
  }

 private:
  SK_DEVICE static int place(int block, int tile, int half) {
    return (((block - kHeld) * kTiles + tile) * 2 + half) * kBlockSize<S>;
  }
};

// Where the sums of a group's warps meet: each lane gets those of its unit and row.
template <class S, int kTiles>
struct Meeting {
  Shared<float> mine, others;  // where this lane writes its first sum, and reads its first

  SK_DEVICE Meeting(const Post<S>& post, Shared<float> partial) {
    const Shared<float> of_group = partial + post.group * kGroupWarps * kTiles * kSums;
    mine = of_group + post.part * kTiles * kSums + 2 * post.t * kUnits + post.g;
    others = of_group + (post.strip * kClusterRows + post.row) * kUnits + post.lane % kUnits;
  }
  SK_DEVICE void operator()(const Post<S>& post, const float (&sum)[kTiles][4], float (&total)[kTiles]) const {
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (2 * post.t + i >= post.rows) continue;
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        mine[tile * kSums + i * kUnits] = sum[tile][i];
        mine[tile * kSums + i * kUnits + kSums / 2] = sum[tile][2 + i];
      }
    }
    named_sync(1 + post.group, kGroupThreads);
    SK_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) total[tile] = 0.0f;
    if (!post.alive) return;
    SK_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SK_UNROLL
      for (int part = 0; part < kGroupWarps; ++part) {
        const float value = others[(part * kTiles + tile) * kSums];
        total[tile] = part == 0 ? value : total[tile] + value;
      }
    }
  }
};

// Pushes a warp's values, one of each lane and gate, to all blocks of the cluster: rows first, so that what goes to one
// block lies side by side.
template <class S, int kGates>
struct Pusher {
  static constexpr int kColumns = kUnits / kPiece<S>;  // of a strip
  static constexpr int kPasses = 2;                    // a pass serves 8 blocks or more
  Remote<S> to[kPasses];
  Remote<MBarrier> full[kPasses];
  bool serves[kPasses];
  Shared<S> in, out;  // of the stage
  int column, of_gate;
  bool silent;  // the whole warp

  // of_gate: columns from a gate to the next.
  SK_DEVICE Pusher(const Post<S>& post, Shared<S> stages, Shared<S> slots, Shared<MBarrier> barriers, int columns) {
    const int first = post.part % 2 * 4, rows = post.rows - first < 4 ? post.rows - first : 4;
    silent = rows <= 0 || !post.has_unit;
    column = column_size<S>(post.rows);
    of_gate = columns * column;
    const int row_bits = rows / 2, row = post.lane & (rows - 1), in_strip = post.lane % kUnits;  // rows: a power of 2
    const Shared<S> stage = stages + warp_index() * kGates * 4 * kUnits;
    in = stage + (in_strip / kPiece<S> * 4 + post.lane / kUnits) * kPiece<S> + in_strip % kPiece<S>;
    out = stage + row * kPiece<S>;
    SK_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int peer = silent ? 0 : (post.lane >> row_bits) + pass * (kWarp >> row_bits);
      serves[pass] = !silent && peer < post.blocks_of_cluster;
      const int rank = serves[pass] ? peer : 0;
      to[pass] = remote(slots, rank) + ((2 * post.pair + post.strip) * kColumns * column + (first + row) * kPiece<S>);
      full[pass] = remote(barriers, rank);
    }
  }
  SK_DEVICE void operator()(int slot_start, int slot, const S (&values)[kGates]) const {
    if (silent) return;
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) in[gate * 4 * kUnits] = values[gate];
    warp_sync();  // and a lane's push stands for what the whole warp has read
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      SK_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const Piece<S> piece = load_vec<kPiece<S>>(out, (gate * kColumns + c) * 4 * kPiece<S>);
        SK_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
          if (serves[pass]) store_async(to[pass], slot_start + gate * of_gate + c * column, piece, full[pass] + slot);
        }
      }
    }
  }
};

// The extra arguments of a cell, all of them off.
template <class T>
SK_DEVICE Extra<T> no_extra() {
  const T infinity = static_cast<T>(INFINITY);
  return {T(0), T(0), T(1), T(1), infinity, infinity, T(0), T(1), T(1), {T(0), T(0), T(0)}};
}

// An element of what a caller brought; zero where there is nothing.
template <class S>
SK_DEVICE float value_at(const void* from, int64_t at, int64_t count) {
  if (from == nullptr) return 0.0f;
  return widen(load<Cache::kReadOnly>(global<const S>(from, count), at));
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------

// Grid: a cluster for each tile of each direction. H is a multiple of 8.
template <class Cell, int kGroups>
SK_KERNEL(kGroups* kGroupThreads, 1)
cluster_forward_kernel(const SK_GRID_CONSTANT ClusterForwardArgs args) {
  if constexpr (kHasClusters) {
    using S = typename Cell::Storage;
    constexpr int kGates = Cell::kGates, kHeld = kept_blocks<S>(kGroups, kGates);
    constexpr bool kHasC = Cell::kStates > 1;
    const LayerArgs& layer = args.layer;
    const int64_t H = layer.H;
    const int blocks = static_cast<int>(blocks_of<S>(H)), most = static_cast<int>(blocks_of_warp(blocks));
    const Post<S> post(args);
    const int d = post.direction, threads = block_threads(), column = column_size<S>(post.rows);
    SharedArena arena;
    using Memory = ClusterMemory<S, kGroups, SharedArena>;
    const Memory memory(arena, post.rows, blocks, most - kHeld, kGates, 1, kGates);
    const int slot_size = blocks * 4 * column;
    const int bytes = static_cast<int>(H * post.rows * sizeof(S));

    const Global<const Link> links = global<const Link>(layer.links, layer.link_count()) + d * (layer.rows + layer.B);
    const Global<const S> h0 = global<const S>(layer.h0, layer.h0 == nullptr ? 0 : layer.states());
    const Global<const float> from_x = global<const float>(args.from_x, layer.directions * layer.rows * kGates * H);
    const int64_t tile = block_index() / post.blocks_of_cluster % args.tiles;
    const int64_t steps = steps_of_tile(args, links, tile);

    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i) mbarrier_init(memory.full, i, 1);
      mbarrier_init_fence();
      for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(memory.full, i, bytes);
    }
    const Factors<S, kGates, kHeld> factors(args, post, blocks, memory.weights,
                                            [&](int gate, int block) { return gate * blocks + block; });
    for (int i = thread_index(); i < blocks * 4 * post.rows; i += threads) {
      const int64_t b = tile * post.rows + i % post.rows, unit = i / post.rows * kPiece<S>;
      const int at = i / post.rows * column + i % post.rows * kPiece<S>;
      Piece<S> piece{};
      if (h0 && b < layer.B) {
        SK_UNROLL
        for (int e = 0; e < kPiece<S>; ++e) {
          if (unit + e < H) piece[e] = operand(load<Cache::kReadOnly>(h0, (d * layer.B + b) * H + unit + e), true);
        }
      }
      store_vec(memory.slots, at, piece);
      store_vec(memory.slots, slot_size + at, Piece<S>{});
    }

    float c = 0.0f, h = 0.0f;
    const auto state = [&] { return (d * layer.B + post.sequence) * H + post.unit; };
    int64_t at[kRing] = {kNobody};  // the row of this step and of those after it
    if (post.alive && post.sequence < layer.B) {
      const Link link = links[layer.rows + post.sequence];
      at[0] = link.next;
      h = value_at<S>(layer.h0, state(), layer.states());
      if (kHasC) c = value_at<S>(layer.c0, state(), layer.states());
    }
    const auto follow = [&](int64_t link) -> int64_t {
      if (link < 0) return kNobody;
      const Link of = links[link & ~kCut];
      return of.next;
    };
    // What a step addresses begins where this lane's unit does.
    constexpr int kStage = kGates * Memory::kThreads;
    const Shared<float> ring = memory.ring + thread_index();
    const Global<const float> x_of = from_x + (d * layer.rows * kGates * H + post.unit);
    const int64_t of_outputs = d * H + post.unit, output_step = layer.directions * H;
    const auto fetch = [&](int at_stage, int64_t link) {
      if (link >= 0) {
        const Global<const float> of_row = x_of + (link & ~kCut) * (kGates * H);
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          copy_async<4>(ring + (at_stage + gate * Memory::kThreads), of_row + gate * H);
        }
      }
      copy_async_commit();
    };
    SK_UNROLL
    for (int i = 1; i < kRing; ++i) at[i] = follow(at[i - 1]);
    SK_UNROLL
    for (int i = 0; i < kRing - 1; ++i) fetch(i * kStage, at[i]);
    float bias[kGates] = {};
    if (Cell::kSeparate && layer.bias_h[d] != nullptr && post.has_unit) {
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        bias[gate] = value_at<S>(layer.bias_h[d], gate * H + post.unit, kGates * H);
      }
    }
    const Meeting<S, kGates> meet(post, memory.partial);
    const Pusher<S, 1> push(post, memory.stage, memory.slots, memory.full, 0);
    cluster_sync();

    const Extra<float> e = no_extra<float>();
    int stage = 0;  // of the ring, where it begins
    for (int64_t s = 0; s < steps; ++s) {
      const int slot = static_cast<int>(s) & 1;
      fetch(stage == 0 ? (kRing - 1) * kStage : stage - kStage, at[kRing - 1]);
      const int64_t ahead = follow(at[kRing - 1]);
      if (s > 0) {
        mbarrier_wait(memory.full, slot, (static_cast<int>(s) - 1) >> 1 & 1);
        if (thread_index() == 0) mbarrier_arrive_expect(memory.full, slot, bytes);
      }
      float sum[kGates][4], product[kGates];
      factors.times(post, memory.slots + slot * slot_size, sum);
      if (!post.idle) meet(post, sum, product);
      copy_async_wait<kRing - 1>();  // of this step

      float saved[Cell::kSaved];
      const int64_t link = at[0];
      if (link >= 0) {
        const bool anew = starts_anew(link);
        float of_x[kGates], of_h[kGates];
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          const float x = ring[stage + gate * Memory::kThreads];
          of_x[gate] = x;
          of_h[gate] = (anew ? 0.0f : product[gate]) + bias[gate];
        }
        if (anew) c = h = 0.0f;
        h = rounded<S>(Cell::forward(of_x, of_h, e, h, c, saved));
      }
      const S now = narrow<S>(h);
      if (s + 1 < steps) {
        const S values[1] = {operand(now, true)};
        push((1 - slot) * slot_size, 1 - slot, values);
      }

      if (link >= 0) {
        const int64_t row = link & ~kCut, out = row * output_step + of_outputs;
        global<S>(layer.y, layer.outputs())[out] = now;
        if (kHasC && layer.cells != nullptr) {
          store<Cache::kStreaming>(global<S>(layer.cells, layer.outputs()), out, narrow<S>(c));
        }
        if (layer.saved != nullptr && layer.saved_width > 0) {
          const Global<S> to = global<S>(layer.saved, layer.directions * layer.rows * layer.saved_width) +
                               ((d * layer.rows + row) * layer.saved_width + post.unit);
          SK_UNROLL
          for (int k = 0; k < Cell::kSaved; ++k) store<Cache::kStreaming>(to, k * H, narrow<S>(saved[k]));
        }
        if (at[1] == kNobody && args.h_n != nullptr) {
          global<S>(args.h_n, layer.states())[state()] = now;
          if (kHasC && args.c_n != nullptr) global<S>(args.c_n, layer.states())[state()] = narrow<S>(c);
        }
      }
      SK_UNROLL
      for (int i = 0; i + 1 < kRing; ++i) at[i] = at[i + 1];
      at[kRing - 1] = ahead;
      stage = stage == (kRing - 1) * kStage ? 0 : stage + kStage;
    }
    copy_async_wait<0>();
    cluster_sync();  // nobody leaves while others push to it
  }
}

// ---- backward
// --------------------------------------------------------------------------------------------------------

// The walk the other way: the gradients of the gates of all units are pushed, G times as many values as h, and a group
// multiplies them with the columns of W_hh of its units.
template <class Cell, int kGroups>
SK_KERNEL(kGroups* kGroupThreads, 1)
cluster_backward_kernel(const SK_GRID_CONSTANT ClusterBackwardArgs args) {
  if constexpr (kHasClusters) {
    using S = typename Cell::Storage;
    constexpr int kGates = Cell::kGates, kHeld = kept_blocks<S>(kGroups, 1);
    constexpr bool kHasC = Cell::kStates > 1;
    const LayerArgs& layer = args.layer;
    const int64_t H = layer.H;
    const int of_gate = static_cast<int>(blocks_of<S>(H)), blocks = of_gate * kGates;
    const int most = static_cast<int>(blocks_of_warp(blocks));
    const Post<S> post(args);
    const int d = post.direction, threads = block_threads(), column = column_size<S>(post.rows);
    SharedArena arena;
    const ClusterMemory<S, kGroups, SharedArena> memory(arena, post.rows, blocks, most - kHeld, 1, kGates, 0);
    const int slot_size = blocks * 4 * column;
    const int bytes = static_cast<int>(H * post.rows * kGates * sizeof(S));

    const Global<const Link> links = global<const Link>(layer.links, layer.link_count()) + d * (layer.rows + layer.B);
    const int64_t tile = block_index() / post.blocks_of_cluster % args.tiles;
    const int64_t steps = steps_of_tile(args, links, tile);

    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i) mbarrier_init(memory.full, i, 1);
      mbarrier_init_fence();
      for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(memory.full, i, bytes);
    }
    const Factors<S, 1, kHeld> factors(args, post, blocks, memory.weights, [](int, int block) { return block; });
    // What no strip fills of the last blocks stays zero.
    for (int i = thread_index(); i < 2 * blocks * 4 * post.rows; i += threads) {
      store_vec(memory.slots, i / post.rows * column + i % post.rows * kPiece<S>, Piece<S>{});
    }

    float dc = 0.0f, direct = 0.0f;          // of the state of the row to come; direct: not by way of the product
    bool cut = true;                         // that nothing comes by way of the product
    int64_t at = kNobody, before = kNobody;  // the row of this step, and its link to the row before
    const auto state = [&] { return (d * layer.B + post.sequence) * H + post.unit; };
    const auto link_of = [&](int64_t row) -> int64_t {
      if (row < 0 || row >= layer.rows) return kNobody;
      const Link link = links[row];
      return link.prev;
    };
    if (post.alive && post.sequence < layer.B) {
      const Link link = links[layer.rows + post.sequence];
      at = link.last == kNobody ? layer.rows + post.sequence : link.last;
      before = link_of(at);
      direct = value_at<S>(args.dh_n, state(), layer.states());
      if (kHasC) dc = value_at<S>(args.dc_n, state(), layer.states());
    }
    const Meeting<S, 1> meet(post, memory.partial);
    const Pusher<S, kGates> push(post, memory.stage, memory.slots, memory.full, of_gate * 4);
    const int64_t of_outputs = d * H + post.unit, output_step = layer.directions * H;
    cluster_sync();

    const Extra<float> e = no_extra<float>();
    for (int64_t s = 0; s <= steps; ++s) {
      const int slot = static_cast<int>(s) & 1;
      // What this step reads is on its way while the product is made.
      float saved[Cell::kSaved] = {}, dy = 0.0f, dcells = 0.0f, c = 0.0f, c_prev = 0.0f, h_prev = 0.0f;
      int64_t ahead = kNobody;
      if (at >= 0 && at < layer.rows) {
        const int64_t out = at * output_step + of_outputs, prev = before & ~kCut;
        const int64_t prev_out = prev * output_step + of_outputs;
        const bool anew = starts_anew(before), initial = prev >= layer.rows;
        const auto previous = [&](const void* every, const void* start) {
          if (anew) return 0.0f;
          return initial ? value_at<S>(start, state(), layer.states()) : value_at<S>(every, prev_out, layer.outputs());
        };
        ahead = link_of(prev);
        if (!initial && post.lane % kUnits == 0) {  // one lane for the 16 bytes or more of a row's strip
          if (args.dy != nullptr) prefetch_l2(global<const S>(args.dy, layer.outputs()), prev_out);
          if (layer.saved_width > 0) {
            SK_UNROLL
            for (int k = 0; k < Cell::kSaved; ++k) {
              prefetch_l2(global<const S>(layer.saved, layer.directions * layer.rows * layer.saved_width),
                          (d * layer.rows + prev) * layer.saved_width + k * H + post.unit);
            }
          }
        }
        dy = value_at<S>(args.dy, out, layer.outputs());
        if constexpr (kHasC) {
          dcells = value_at<S>(args.dcells, out, layer.outputs());
          c = value_at<S>(layer.cells, out, layer.outputs());
          c_prev = previous(layer.cells, layer.c0);
        }
        if (Cell::kReadsH) h_prev = previous(layer.y, layer.h0);
        SK_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) {
          saved[k] = layer.saved_width == 0
                         ? value_at<S>(layer.y, out, layer.outputs())
                         : value_at<S>(layer.saved, (d * layer.rows + at) * layer.saved_width + k * H + post.unit,
                                       layer.directions * layer.rows * layer.saved_width);
        }
      }
      float product = 0.0f;
      if (s > 0) {
        mbarrier_wait(memory.full, slot, (static_cast<int>(s) - 1) >> 1 & 1);
        if (thread_index() == 0) mbarrier_arrive_expect(memory.full, slot, bytes);
        float sum[1][4], total[1];
        factors.times(post, memory.slots + slot * slot_size, sum);
        if (!post.idle) {
          meet(post, sum, total);
          product = total[0];
        }
      }

      float by_x[kGates] = {}, by_h[kGates] = {};
      const float dh = (cut ? 0.0f : product) + direct;
      if (at >= layer.rows) {  // initial states
        if (args.dh0 != nullptr) global<S>(args.dh0, layer.states())[state()] = narrow<S>(dh);
        if (kHasC && args.dc0 != nullptr) global<S>(args.dc0, layer.states())[state()] = narrow<S>(dc);
      } else if (at >= 0) {
        StepGradient<float> step;
        dc += dcells;
        Cell::backward(saved, e, 0.0f, h_prev, c, c_prev, dh + dy, dc, step);
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          by_x[gate] = step.x[gate];
          by_h[gate] = Cell::kSeparate ? step.h[gate] : step.x[gate];
        }
        direct = step.direct;
      }
      if (s < steps) {
        S values[kGates];
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) values[gate] = operand(narrow<S>(by_h[gate]), true);
        push((1 - slot) * slot_size, 1 - slot, values);
      }

      if (at >= 0 && at < layer.rows) {
        const int64_t size = layer.directions * layer.rows * kGates * H;
        const int64_t to = (d * layer.rows + at) * (kGates * H) + post.unit;
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          global<S>(args.dgates_x, size)[to + gate * H] = narrow<S>(by_x[gate]);
          if (Cell::kSeparate) global<S>(args.dgates_h, size)[to + gate * H] = narrow<S>(by_h[gate]);
        }
        cut = starts_anew(before);
        at = before & ~kCut;
        before = ahead;
        if (cut) direct = dc = 0.0f;
      } else {
        at = kNobody;
      }
    }
    cluster_sync();
  }
}

}  // namespace seqkernels::cuda
