// The cluster tier: clusters of thread blocks (compute capability 9.0) run all steps of a layer in one launch.
//
// A cluster processes a tile of up to 8 sequences of one direction. Fewer sequences per tile mean less communication
// between its blocks, so a batch is divided among as many clusters as the device can hold. The blocks of a cluster
// divide the hidden units: each group of four warps owns 16 units with all their gates for all steps, and its warps
// split the sum over K.
//
// After a step each warp pushes its results, h or in backward the gradients of its gates, to every block of the cluster
// through distributed shared memory. Each block counts the arriving bytes in its own mbarrier and waits only for them.
// Clusters are independent, so a layer may have more of them than the device can hold at once.
//
// A cell with two products in a row has two such rounds per step: the input of the second product is pushed first. In
// the argument below a step is a round.
//
// Two slots for the pushed values suffice. Step s reads slot s % 2 and pushes to slot (s + 1) % 2. A warp pushes the
// values of step s after it has waited for all values of step s - 1. A warp of any block pushes its values of step s -
// 1 after the barrier of its group, at which point all reads of slot (s - 1) % 2 = (s + 1) % 2 by its group are
// complete. Hence, when values of step s are pushed, every warp of the cluster has finished reading the values they
// overwrite. By the same argument the bytes of a slot's next use reach its mbarrier only after the phase of this use is
// complete: besides the bytes, a phase waits for one arrival, which the block itself performs after the previous phase.
// And the partial sums of the next step are written by warps that have waited for values pushed after the last read of
// the partial sums of this step.
//
// A sequence that has ended continues to push values, which are not used.
#pragma once

#include "recurrent/cuda/persistent.cuh"

namespace seqkernels::cuda {

constexpr int kClusterBlocks = 16;
constexpr int kGroupWarps = 4;  // warps that split K
constexpr int kGroupThreads = kGroupWarps * kWarp;
constexpr int kFewGroups = 2,
              kManyGroups = 3;  // groups per block: kernels are compiled for up to two and, without options, for three
static_assert(kGroupWarps == kPairWarps, "each lane of a group has a unit");

// Blocks of K of `tiles` times 16 units that a lane holds in registers: up to 128 of the 255 registers of a thread in
// blocks of two groups, 96 of 168 in blocks of three. Fewer for TF32, whose math functions need more registers, and
// for options.
template <class S>
SK_HOST_DEVICE constexpr int kept_blocks(int groups, int tiles, bool options) {
  const bool wide = sizeof(S) == 4;
  const int pieces = groups > kFewGroups ? (tiles > 1 ? (wide ? 8 : 24) : wide ? 16 : 20) : wide || options ? 24 : 32;
  return pieces / (2 * tiles);
}

// A slot is divided along K into columns of 16 bytes per row, so that the part of a group is contiguous: element (row,
// k) is in column k / kPiece. The distance between columns lets a warp read four columns without bank conflicts.
template <class S>
SK_HOST_DEVICE int column_size(int rows) {
  return (rows * 16 + (rows >= 4 ? 32 : 0)) / static_cast<int>(sizeof(S));
}

// Maximum number of blocks of K per warp of a group, and those of them that are not in registers.
SK_HOST_DEVICE int64_t blocks_of_warp(int64_t blocks) { return (blocks + kGroupWarps - 1) / kGroupWarps; }
SK_HOST_DEVICE int64_t rest_of_warp(int64_t blocks, int held) {
  const int64_t most = blocks_of_warp(blocks);
  return most > held ? most - held : 0;
}

// Shared memory of a block, for both passes. What every step addresses has strides that are known at compile time,
// those of kGroups groups and of eight rows.
struct ClusterSizes {
  int64_t blocks;      // of K of a slot
  int64_t rest;        // pairs of strips' blocks of a warp that are not in registers
  int64_t tiles;       // of 16 units that a group sums at once
  int64_t pushed;      // gates, at once
  int64_t ring_gates;  // pre-activations of a unit
};
template <class S, int kGroups, class Arena>
struct ClusterMemory {
  static constexpr int kThreads = kGroups * kGroupThreads;
  Shared<S> slots;        // [2, blocks of K, 4] columns
  Shared<S> weights;      // [warps, rest, 2, 32] pieces; of cells with two products, those of the first come first
  Shared<float> ring;     // [kRing, ring_gates, kThreads]
  Shared<float> partial;  // [groups, kGroupWarps, tiles, kSums]
  Shared<S> stage;        // [warps, pushed, 4 rows, kUnits], rows of a column together
  Shared<MBarrier> full;  // [2]
  SK_HOST_DEVICE ClusterMemory(Arena& arena, int64_t rows, const ClusterSizes& of)
      : slots(arena.template array<S>(2 * of.blocks * 4 * column_size<S>(static_cast<int>(rows)), 128)),
        weights(arena.template array<S>(kGroups * kGroupWarps * of.rest * 2 * kBlockSize<S>, 128)),
        ring(arena.template array<float>(kRing * of.ring_gates * kThreads)),
        partial(arena.template array<float>(kGroups * kGroupWarps * of.tiles * kSums)),
        stage(arena.template array<S>(kGroups * kGroupWarps * of.pushed * 4 * kUnits)),
        full(arena.template array<MBarrier>(2, 8)) {}
};

// Gates of the two products, and sizes. A cell with one product has all its gates in the first.
template <class Cell, int kGroups>
struct ClusterForward {
  using S = typename Cell::Storage;
  static constexpr int kFirst = Cell::kFirst, kSecond = Cell::kGates - kFirst;  // gates
  static constexpr int kHeld = kept_blocks<S>(kGroups, Cell::kGates, Cell::kOptions);
  static SK_HOST_DEVICE ClusterSizes sizes(int64_t H) {
    const int64_t blocks = blocks_of<S>(H);
    return {blocks, rest_of_warp(blocks, kHeld) * Cell::kGates, kFirst, 1, Cell::kGates};
  }
};
template <class Cell, int kGroups>
struct ClusterBackward {
  using S = typename Cell::Storage;
  static constexpr int kFirst = Cell::kFirst, kSecond = Cell::kGates - kFirst;
  static constexpr int kHeld = kept_blocks<S>(kGroups, 1, Cell::kOptions) / (kSecond > 0 ? 2 : 1);
  static SK_HOST_DEVICE ClusterSizes sizes(int64_t H) {
    const int64_t of_gate = blocks_of<S>(H);
    return {of_gate * kFirst, rest_of_warp(of_gate * kFirst, kHeld) + rest_of_warp(of_gate * kSecond, kHeld), 1, kFirst,
            0};
  }
};

// Mapping of a lane to its cluster, group and units.
struct ClusterLaneMap : LaneMap {
  int rank, blocks_of_cluster;
  int group, part;  // group in the block; warp in the group, which owns a pair of strips
  bool idle;        // the group has no pair: there are fewer pairs than groups
  int sequence;
  bool has_unit, alive;  // alive: the lane owns a unit of a row of the tile, which may have no sequence

  SK_DEVICE explicit ClusterLaneMap(const PersistentArgs& args) {
    rank = cluster_rank();
    blocks_of_cluster = cluster_blocks();
    const int64_t cluster = block_index() / blocks_of_cluster;
    group = warp_index() / kGroupWarps;
    part = warp_index() % kGroupWarps;
    assign(args, static_cast<int>(cluster / args.tiles), group * blocks_of_cluster + rank);
    idle = 2 * pair >= strips;
    sequence = static_cast<int>(cluster % args.tiles) * rows + row;
    has_unit = 2 * pair + strip < strips;
    alive = has_unit && row < rows;
  }
};

// The weights of the group, the lane's offset in a slot and the distance between blocks. A group without units has
// none.
template <class S, int kTiles, int kHeld>
struct ClusterFactors : Factors<S, kTiles, kHeld, kTiles == 1 ? 4 : 1> {
  using Base = Factors<S, kTiles, kHeld, kTiles == 1 ? 4 : 1>;
  int mine, step;

  // pieces: pieces per strip of both products. Filled here, not by the constructor of Factors, which would spill with
  // three groups and three gates.
  template <class PieceOf>
  SK_DEVICE ClusterFactors(const PersistentArgs& args, const ClusterLaneMap& lanes, int blocks, int pieces,
                           Shared<S> of_warps, PieceOf piece) {
    const int most = static_cast<int>(blocks_of_warp(blocks));
    int &first = this->first, &count = this->count;
    first = lanes.part * most;
    count = blocks - first < most ? blocks - first : most;
    if (count < 0 || lanes.idle) count = 0;
    this->upto = count;
    step = 4 * column_size<S>(lanes.rows);
    mine = first * step + lanes.t * column_size<S>(lanes.rows) + (lanes.g & (lanes.rows - 1)) * kPiece<S>;
    this->rest =
        of_warps + warp_index() * rest_of_warp(blocks, kHeld) * kTiles * 2 * kBlockSize<S> + lanes.lane * kPiece<S>;
    const int64_t size = static_cast<int64_t>(args.layer.directions) * lanes.strips * pieces * kBlockSize<S>;
    const Global<const S> from = global<const S>(args.weights, size);
    const int64_t strip0 = static_cast<int64_t>(lanes.direction) * lanes.strips + 2 * lanes.pair;
    const auto at = [&](int block, int tile, int half) {
      return ((strip0 + half) * pieces + piece(tile, first + block)) * kBlockSize<S> + lanes.lane * kPiece<S>;
    };
    const auto there = [&](int half) { return 2 * lanes.pair + half < lanes.strips; };
    SK_UNROLL
    for (int block = 0; block < kHeld; ++block) {
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
          this->held[block][tile][half] = Words{};
          if (block < count && there(half)) this->held[block][tile][half] = load_words<S>(from, at(block, tile, half));
        }
      }
    }
    for (int block = kHeld; block < count; ++block) {
      for (int tile = 0; tile < kTiles; ++tile) {
        Piece<S> pieces[2] = {};
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (there(half)) pieces[half] = load_vec<kPiece<S>, Cache::kReadOnly>(from, at(block, tile, half));
        }
        this->keep(block, tile, pieces[0], pieces[1]);
      }
    }
  }
  SK_DEVICE void operator()(Shared<S> slot, float (&sum)[kTiles][4]) const {
    const Shared<S> from = slot + mine;
    this->times([&](int block) { return load_words<S>(from, block * step); }, sum);
  }
};

// Pushes the values of a warp, one per lane and gate, to all blocks of the cluster: rows first, so that the values for
// one block are contiguous.
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
  SK_DEVICE Pusher(const ClusterLaneMap& lanes, Shared<S> stages, Shared<S> slots, Shared<MBarrier> barriers,
                   int columns) {
    const int first = lanes.part % 2 * 4, rows = lanes.rows - first < 4 ? lanes.rows - first : 4;
    silent = rows <= 0 || !lanes.has_unit;
    column = column_size<S>(lanes.rows);
    of_gate = columns * column;
    const int row_bits = rows / 2, row = lanes.lane & (rows - 1), in_strip = lanes.lane % kUnits;  // rows: a power of 2
    const Shared<S> stage = stages + warp_index() * kGates * 4 * kUnits;
    in = stage + (in_strip / kPiece<S> * 4 + lanes.lane / kUnits) * kPiece<S> + in_strip % kPiece<S>;
    out = stage + row * kPiece<S>;
    SK_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int peer = silent ? 0 : (lanes.lane >> row_bits) + pass * (kWarp >> row_bits);
      serves[pass] = !silent && peer < lanes.blocks_of_cluster;
      const int rank = serves[pass] ? peer : 0;
      to[pass] = remote(slots, rank) + ((2 * lanes.pair + lanes.strip) * kColumns * column + (first + row) * kPiece<S>);
      full[pass] = remote(barriers, rank);
    }
  }
  // Of the first kCount gates.
  template <int kCount>
  SK_DEVICE void operator()(int slot_start, int slot, const S (&values)[kCount]) const {
    static_assert(kCount <= kGates, "there is room for kGates");
    if (silent) return;
    SK_UNROLL
    for (int gate = 0; gate < kCount; ++gate) in[gate * 4 * kUnits] = values[gate];
    warp_sync();  // and the push of a lane follows the reads of the whole warp
    SK_UNROLL
    for (int gate = 0; gate < kCount; ++gate) {
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

// One product of a step: the weights of the group, and the reduction over its warps.
template <class S, int kTiles, int kHeld>
struct ClusterProduct {
  ClusterFactors<S, kTiles, kHeld> factors;
  PartialSums<kGroupWarps, kTiles, kTiles> partial_sums;

  // partial: of the group.
  template <class PieceOf>
  SK_DEVICE ClusterProduct(const PersistentArgs& args, const ClusterLaneMap& lanes, int blocks, int pieces,
                           Shared<S> weights, Shared<float> partial, PieceOf piece)
      : factors(args, lanes, blocks, pieces, weights, piece), partial_sums(lanes, lanes.part, 0, partial) {}
  SK_DEVICE void operator()(const ClusterLaneMap& lanes, Shared<S> slot, float (&product)[kTiles]) const {
    float sum[kTiles][4];
    factors(slot, sum);
    partial_sums.put(lanes, 0, sum);
    named_sync(1 + lanes.group, kGroupThreads);
    if (lanes.alive) partial_sums.take(0, product);
  }
};
template <class S, int kTiles, int kHeld>
using ClusterProductIfAny = std::conditional_t<(kTiles > 0), ClusterProduct<S, kTiles, kHeld>, NoProduct>;

// Arrival of pushed values: round r >= 1 fills slot r % 2.
struct Rounds {
  Shared<MBarrier> full;
  int bytes[2];  // of a slot

  // Called by all threads of the block; a barrier of the cluster must follow.
  SK_DEVICE Rounds(Shared<MBarrier> of, int bytes_even, int bytes_odd) : full(of), bytes{bytes_even, bytes_odd} {
    if (thread_index() != 0) return;
    for (int i = 0; i < 2; ++i) mbarrier_init(full, i, 1);
    mbarrier_init_fence();
    for (int i = 0; i < 2; ++i) mbarrier_arrive_expect(full, i, bytes[i]);
  }
  SK_DEVICE void wait(int round) const {
    const int slot = slot_of(round);
    mbarrier_wait(full, slot, (round - 1) >> 1 & 1);
    if (thread_index() == 0) mbarrier_arrive_expect(full, slot, slot == 0 ? bytes[0] : bytes[1]);
  }
};

// ---- forward ----

// Grid: a cluster for each tile of each direction. H is a multiple of 8.
template <class Cell, int kGroups>
SK_KERNEL(kGroups* kGroupThreads, 1)
cluster_forward_kernel(const SK_GRID_CONSTANT PersistentForwardArgs args) {
  if constexpr (kHasClusters) {
    using S = typename Cell::Storage;
    using Of = ClusterForward<Cell, kGroups>;
    constexpr int kGates = Cell::kGates, kFirst = Of::kFirst, kSecond = Of::kSecond, kHeld = Of::kHeld;
    const LayerArgs& layer = args.layer;
    const int64_t H = layer.H;
    const int blocks = static_cast<int>(blocks_of<S>(H));
    const ClusterLaneMap lanes(args);
    const int d = lanes.direction, threads = block_threads(), column = column_size<S>(lanes.rows);
    SharedArena arena;
    using Memory = ClusterMemory<S, kGroups, SharedArena>;
    const Memory memory(arena, lanes.rows, Of::sizes(H));
    const int slot_size = blocks * 4 * column;
    const int bytes = static_cast<int>(H * lanes.rows * sizeof(S));

    const Global<const S> h0 = global<const S>(layer.h0, layer.h0 == nullptr ? 0 : layer.states());
    using Unit = ForwardUnit<Cell, Memory::kThreads>;
    const Unit unit(args, d, lanes.unit, memory.ring);
    const int64_t tile = block_index() / lanes.blocks_of_cluster % args.tiles;
    // A group without units runs no steps: no other group waits for it, so it could fall behind by a whole use of a
    // slot.
    const int64_t steps = lanes.idle ? 0 : steps_of_tile(args, unit.links, tile);

    const Rounds rounds(memory.full, bytes, bytes);
    const Shared<float> partial = memory.partial + lanes.group * kGroupWarps * kFirst * kSums;
    const ClusterProduct<S, kFirst, kHeld> multiply(args, lanes, blocks, kGates * blocks, memory.weights, partial,
                                                    [&](int gate, int block) { return gate * blocks + block; });
    const ClusterProductIfAny<S, kSecond, kHeld> multiply_q(
        args, lanes, blocks, kGates * blocks,
        memory.weights + kGroups * kGroupWarps * rest_of_warp(blocks, kHeld) * kFirst * 2 * kBlockSize<S>, partial,
        [&](int gate, int block) { return (kFirst + gate) * blocks + block; });
    for (int i = thread_index(); i < blocks * 4 * lanes.rows; i += threads) {
      const int64_t b = tile * lanes.rows + i % lanes.rows, first = i / lanes.rows * kPiece<S>;
      const int at = i / lanes.rows * column + i % lanes.rows * kPiece<S>;
      Piece<S> piece{};
      if (h0 && b < layer.B) {
        SK_UNROLL
        for (int e = 0; e < kPiece<S>; ++e) {
          if (first + e >= H) continue;
          const int64_t of_state = (d * layer.B + b) * H + first + e;
          piece[e] = unit.seen_at_start(load<Cache::kReadOnly>(h0, of_state), of_state);
        }
      }
      store_vec(memory.slots, at, piece);
      store_vec(memory.slots, slot_size + at, Piece<S>{});
    }

    float c[Cell::kCellArray] = {}, h = 0.0f, bias[kGates] = {};
    if (lanes.has_unit) {
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) bias[gate] = unit.bias(gate);
    }
    int64_t at[kRing] = {kNone};  // the row of this step and of those after it
    if (lanes.alive && lanes.sequence < layer.B) at[0] = unit.start(lanes.sequence, h, c);
    SK_UNROLL
    for (int i = 1; i < kRing; ++i) at[i] = unit.follow(at[i - 1]);
    SK_UNROLL
    for (int i = 0; i < kRing - 1; ++i) unit.fetch(i * Unit::kStage, at[i]);
    const Pusher<S, 1> push(lanes, memory.stage, memory.slots, memory.full, 0);
    cluster_sync();

    int stage = 0;  // of the ring, where it begins
    for (int64_t s = 0; s < steps; ++s) {
      const int round = static_cast<int>(kSecond > 0 ? 2 * s : s), slot = slot_of(round);
      unit.fetch(stage == 0 ? (kRing - 1) * Unit::kStage : stage - Unit::kStage, at[kRing - 1]);
      const int64_t ahead = unit.follow(at[kRing - 1]), link = at[0];
      const uint32_t masks = unit.masks_of(link);
      if (s > 0) rounds.wait(round);
      float product[kFirst] = {};
      multiply(lanes, memory.slots + slot * slot_size, product);
      copy_async_wait<kRing - 1>();  // of this step

      const typename Unit::Options options = unit.options_of(masks, link, lanes.sequence);
      float saved[Cell::kSaved] = {};
      int next = other_slot(slot);
      if constexpr (kSecond > 0) {
        float carried = 0.0f, of_q[kSecond] = {};
        S q[1] = {S{}};
        if (link >= 0) q[0] = unit.first(stage, link, product, options, h, carried, saved);
        push(slot_size, 1, q);
        rounds.wait(round + 1);
        multiply_q(lanes, memory.slots + slot_size, of_q);
        if (link >= 0) unit.second(stage, link, of_q[0], options, carried, h, saved);
        next = 0;
      } else {
        if (link >= 0) unit.step(stage, link, product, bias, options, h, c, saved);
      }
      const S now = narrow<S>(h);
      if (s + 1 < steps) {
        const S values[1] = {unit.seen(now, options)};
        push(next * slot_size, next, values);
      }
      if (link >= 0) unit.store_step(link, at[1] == kNone, lanes.sequence, now, c, saved);
      SK_UNROLL
      for (int i = 0; i + 1 < kRing; ++i) at[i] = at[i + 1];
      at[kRing - 1] = ahead;
      stage = stage == (kRing - 1) * Unit::kStage ? 0 : stage + Unit::kStage;
    }
    copy_async_wait<0>();
    cluster_sync();  // a block must not exit while others push to it
  }
}

// ---- backward ----

// Backward pushes the gradients of the gates of all units, G times as many values as h; a group multiplies them with
// the columns of W_hh of its units.
template <class Cell, int kGroups>
SK_KERNEL(kGroups* kGroupThreads, 1)
cluster_backward_kernel(const SK_GRID_CONSTANT PersistentBackwardArgs args) {
  if constexpr (kHasClusters) {
    using S = typename Cell::Storage;
    using Of = ClusterBackward<Cell, kGroups>;
    constexpr int kGates = Cell::kGates, kFirst = Of::kFirst, kSecond = Of::kSecond, kHeld = Of::kHeld;
    const LayerArgs& layer = args.layer;
    const int64_t H = layer.H;
    const int of_gate = static_cast<int>(blocks_of<S>(H)), blocks = of_gate * kFirst;
    const ClusterLaneMap lanes(args);
    const int threads = block_threads(), column = column_size<S>(lanes.rows);
    SharedArena arena;
    const ClusterMemory<S, kGroups, SharedArena> memory(arena, lanes.rows, Of::sizes(H));
    const int slot_size = blocks * 4 * column;
    const int bytes = static_cast<int>(H * lanes.rows * sizeof(S));  // of a gate

    const BackwardUnit<Cell> unit(args, lanes.direction, lanes.unit);
    const int64_t tile = block_index() / lanes.blocks_of_cluster % args.tiles;
    // A group without units runs no steps: no other group waits for it, so it could fall behind by a whole use of a
    // slot.
    const int64_t steps = lanes.idle ? 0 : steps_of_tile(args, unit.links, tile);

    const Rounds rounds(memory.full, kFirst * bytes, kSecond > 0 ? bytes : kFirst * bytes);
    const Shared<float> partial = memory.partial + lanes.group * kGroupWarps * kSums;
    const ClusterProduct<S, 1, kHeld> multiply(args, lanes, blocks, of_gate * kGates, memory.weights, partial,
                                               [](int, int block) { return block; });
    const ClusterProductIfAny<S, (kSecond > 0 ? 1 : 0), kHeld> multiply_q(
        args, lanes, of_gate * kSecond, of_gate * kGates,
        memory.weights + kGroups * kGroupWarps * rest_of_warp(blocks, kHeld) * 2 * kBlockSize<S>, partial,
        [&](int, int block) { return blocks + block; });
    // The part of the last blocks that no strip fills stays zero.
    for (int i = thread_index(); i < 2 * blocks * 4 * lanes.rows; i += threads) {
      store_vec(memory.slots, i / lanes.rows * column + i % lanes.rows * kPiece<S>, Piece<S>{});
    }

    typename BackwardUnit<Cell>::State walk;
    if (lanes.alive && lanes.sequence < layer.B) unit.start(lanes.sequence, walk);
    const Pusher<S, kFirst> push(lanes, memory.stage, memory.slots, memory.full, of_gate * 4);
    cluster_sync();

    for (int64_t s = 0; s <= steps; ++s) {
      const int round = static_cast<int>(kSecond > 0 ? 2 * s : s), slot = slot_of(round);
      typename BackwardUnit<Cell>::Read read;
      unit.read(walk, lanes.sequence, lanes.lane, read);
      float product[1] = {};
      if (s > 0) {
        rounds.wait(round);
        multiply(lanes, memory.slots + slot * slot_size, product);
      }
      float by_x[kGates], by_h[kGates];
      int next = other_slot(slot);
      if constexpr (kSecond > 0) {
        unit.second(walk, lanes.sequence, read, product[0], by_x);
        if (s < steps) {
          const S last[1] = {operand(narrow<S>(by_x[kFirst]), true)};
          push(slot_size, 1, last);
          rounds.wait(round + 1);
          float of_q[1] = {};
          multiply_q(lanes, memory.slots + slot_size, of_q);
          unit.first(walk, lanes.sequence, read, of_q[0], by_x);
        }
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) by_h[gate] = by_x[gate];
        next = 0;
      } else {
        unit.step(walk, lanes.sequence, read, product[0], by_x, by_h);
      }
      if (s < steps) {
        S values[kFirst];
        SK_UNROLL
        for (int gate = 0; gate < kFirst; ++gate) values[gate] = operand(narrow<S>(by_h[gate]), true);
        push(next * slot_size, next, values);
      }
      unit.store_step(walk, read.ahead, by_x, by_h);
    }
    cluster_sync();
  }
}

}  // namespace seqkernels::cuda
