// The grid tier: the whole device runs all steps of a layer in one cooperative launch, for layers whose weights exceed
// a cluster (compute capability 8.0). Every block stays on its multiprocessor.
//
// Blocks form teams. A team processes some of the tiles, of up to 8 sequences each, of one direction; each of its
// blocks owns 16 or 32 units (one or two pairs of strips) with all their gates for all steps. Fewer tiles per team are
// better, so the device is divided into as many teams as fit. The 8 warps of a block split the sum over K. Weights are
// held in registers, then in shared memory; the rest is read from the L2 cache at every step. A team with several tiles
// alternates between them at each step, so that the communication of one tile overlaps the products of the next.
//
// Blocks exchange h, or in backward the gradients of the gates, through slots in global memory in fragment order. Each
// warp reads its part of K from there, bypassing the L1 cache. Every pair has a flag that its four warps increment when
// they have published their values of a tile; a warp waits for the pairs that publish its part of K. There is no grid
// barrier.
//
// A cell with two products in a row has two such rounds per step: the input of the second product is published first.
// In the argument below a step is a round.
//
// Two slots suffice. Step s of a tile reads slot s % 2, whose values were published at step s - 1 (or before the first
// step), and publishes to slot (s + 1) % 2. A block publishes step s after its block barrier of step s. Each of its
// warps reaches that barrier after it has waited for its part of the values of step s - 1, and the parts together cover
// all pairs. Each of these pairs published step s - 1 after its own block's barrier of step s - 1, which all warps of
// that block reach after their products, the last reads of slot (s - 1) % 2 = (s + 1) % 2. Hence, when values of step s
// are written, every warp of the team has finished reading the values they overwrite. In the same way, no warp of a
// pair is counted for step s while another warp of the pair is not counted for step s - 1, since the barrier of step s
// separates them. So a flag of 4 n means that all four warps have published n times.
//
// Partial sums alternate between two buffers: a warp writes a buffer again two products later, after the barrier of the
// product in between, which all readers of the buffer have reached.
#pragma once

#include "recurrent/cuda/persistent.cuh"

namespace seqkernels::cuda {

constexpr int kGridWarps = 8;  // warps of a block, which split K
constexpr int kGridThreads = kGridWarps * kWarp;
constexpr int kMostPairs = 2;  // pairs per block
static_assert(kMostPairs * kPairWarps <= kGridWarps, "each pair has warps for its units");

// Blocks of K of each product that a lane holds in registers: up to 128 of the 255 registers of a thread; 96 with a
// second pair and for TF32, whose math functions need registers; fewer with options or a second product.
template <class S>
SK_HOST_DEVICE constexpr int grid_pieces(int pairs) {
  return sizeof(S) == 4 || pairs > 1 ? 24 : 32;
}
template <class S>
SK_HOST_DEVICE constexpr int grid_forward_blocks(int pairs, int gates, bool options) {
  const int blocks = (grid_pieces<S>(pairs) - (options ? 12 : 0)) / (2 * pairs * gates);
  return blocks > 0 ? blocks : 1;
}
template <class S>
SK_HOST_DEVICE constexpr int grid_backward_blocks(int pairs, bool two_products) {
  return (grid_pieces<S>(pairs) - (two_products ? 8 : 0)) / (2 * pairs) / (two_products ? 2 : 1);
}
// Whether weights that are not resident are streamed. Kernels of half types with one pair do not: 160 KiB of shared
// memory hold all their weights, and they need the registers.
template <class S>
SK_HOST_DEVICE constexpr bool grid_streams(int pairs) {
  return sizeof(S) == 4 || pairs > 1;
}
// Prefetch distance, in blocks, of a lane's pieces of a slot, which come from the L2 cache.
SK_HOST_DEVICE constexpr int grid_ahead(int tiles) { return tiles > 4 ? 2 : tiles > 2 ? 4 : 6; }

struct GridLayout {
  void* slots;       // [2, directions, tiles, blocks of K, 32] pieces, zeros beyond the last unit
  uint32_t* flags;   // [directions, tiles, pairs], zeros
  int direction;     // of the first team
  int teams;         // teams per direction
  int blocks;        // blocks per team
  int in_shared[2];  // blocks of K per warp in shared memory, for each product
};
struct GridForwardArgs : PersistentForwardArgs {
  GridLayout place;
};
struct GridBackwardArgs : PersistentBackwardArgs {
  GridLayout place;
};

// Shared memory of a block. tiles: 16-unit tiles multiplied at once; turns: tiles of sequences; rest: blocks of K of a
// warp that are not in registers, for both products. Per thread with a unit: pre-activations of `gates` gates, `biases`
// biases, `states_` states and `links` rows per turn, and values that would otherwise occupy registers.
template <class S, class Arena>
struct GridMemory {
  Shared<S> weights;      // [kGridWarps, rest, 2, 32] pieces, those of the first product first
  Shared<float> ring;     // [kRing, gates, threads]
  Shared<float> bias;     // [biases, threads]
  Shared<float> partial;  // [2, kGridWarps, tiles, kSums]
  Shared<float> states;   // [states, turns, threads]
  Shared<int64_t> rows;   // [links, turns, threads]
  Shared<int> units;      // [2, threads]: the unit, and its offset in a slot
  Shared<int> steps;      // [turns]
  SK_HOST_DEVICE GridMemory(Arena& arena, int pairs, int64_t rest, int64_t tiles, int64_t turns, int64_t gates,
                            int64_t biases, int64_t links, int64_t states_)
      : weights(arena.template array<S>(kGridWarps * rest * 2 * kBlockSize<S>, 128)),
        ring(arena.template array<float>(kRing * gates * pairs * kSums)),
        bias(arena.template array<float>(biases * pairs * kSums)),
        partial(arena.template array<float>(2 * kGridWarps * tiles * kSums)),
        states(arena.template array<float>(states_ * turns * pairs * kSums)),
        rows(arena.template array<int64_t>(links * turns * pairs * kSums)),
        units(arena.template array<int>(2 * pairs * kSums)),
        steps(arena.template array<int>(turns)) {}
};

// Mapping of a lane to the grid: [directions from place.direction on, teams, blocks per team].
struct GridLaneMap : LaneMap {
  int team, first_pair, pairs;  // first pair of the block; pairs of the layer
  bool has_unit, alive;         // alive: the lane owns a unit of a row of each tile, which may have no sequence
  int turns;                    // tiles per team

  SK_DEVICE GridLaneMap(const PersistentArgs& args, const GridLayout& place, int pairs_of_block) {
    const int64_t of_teams = block_index() / place.blocks;
    team = static_cast<int>(of_teams % place.teams);
    first_pair = static_cast<int>(block_index() % place.blocks) * pairs_of_block;
    const int of_block = warp_index() / kPairWarps;
    assign(args, place.direction + static_cast<int>(of_teams / place.teams), first_pair + of_block);
    pairs = (strips + 1) / 2;
    has_unit = of_block < pairs_of_block && unit < args.layer.H;
    alive = has_unit && row < rows;
    turns = static_cast<int>((args.tiles - team + place.teams - 1) / place.teams);
  }
  SK_DEVICE int tile(const GridLayout& place, int turn) const { return team + turn * place.teams; }
};

// Exchange between the blocks of a team: kGates values per unit; those of a block of units are contiguous.
template <class S, int kGates>
struct Exchange {
  static constexpr int kPairsOfBlock = kBlockK<S> / kPairUnits;  // pairs whose units form a block of K
  static_assert(kPairsOfBlock * kPairUnits == kBlockK<S>, "whole pairs");
  const GridLayout& place;
  int64_t slot_size, of_direction;  // elements per slot, and offset of the direction
  int tile_size, first_flag, pairs;
  int theirs;      // offset in a tile of the lane's piece of its warp's first block
  int first, end;  // pairs that publish the warp's part of K

  // blocks: blocks of K per slot. The warp reads blocks [first_block, first_block + count).
  SK_DEVICE Exchange(const PersistentArgs& args, const GridLayout& of, const GridLaneMap& lanes, int blocks,
                     int first_block, int count)
      : place(of),
        slot_size(args.layer.directions * args.tiles * blocks * kBlockSize<S>),
        of_direction(lanes.direction * args.tiles * blocks * kBlockSize<S>),
        tile_size(blocks * kBlockSize<S>),
        first_flag(static_cast<int>(lanes.direction * args.tiles) * lanes.pairs),
        pairs(lanes.pairs),
        theirs(first_block * kBlockSize<S> + ((lanes.g & (lanes.rows - 1)) * 4 + lanes.t) * kPiece<S>),
        first(first_block / kGates * kPairsOfBlock),
        end((first_block + count + kGates - 1) / kGates * kPairsOfBlock) {
    if (end > pairs) end = pairs;
    if (count == 0) end = first;
  }
  // Offset of the lane's unit in a tile.
  SK_DEVICE static int place_of(const GridLaneMap& lanes) {
    return lanes.unit / kBlockK<S> *
           (kGates * kBlockSize<S>)+static_cast<int>(place_in_strip<S>(lanes.row, lanes.unit % kBlockK<S>));
  }
  // mine: offset of the lane's unit; kNowhere: the lane has no unit. Called by all lanes of a warp of `pair`.
  SK_DEVICE void publish(int tile, int slot, int pair, int mine, const S (&values)[kGates]) const {
    if (mine >= 0) {
      const Global<S> to = slots(tile, slot) + mine;
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) store<Cache::kL2>(to, gate * kBlockSize<S>, values[gate]);
    }
    warp_sync();
    if (lane_index() == 0 && pair < pairs) add_release(flags(), first_flag + tile * pairs + pair, uint32_t{1});
  }
  // Waits until the warp's part of K has been published `times` times.
  SK_DEVICE void wait_published(int tile, uint32_t times) const {
    for (int pair = first + lane_index(); pair < end; pair += kWarp) {
      wait_acquire(flags(), first_flag + tile * pairs + pair, times * kPairWarps);
    }
    warp_sync();
  }
  SK_DEVICE Global<const S> share(int tile, int slot) const { return slots(tile, slot) + theirs; }

 private:
  SK_DEVICE Global<S> slots(int tile, int slot) const {
    return global<S>(place.slots, 2 * slot_size) +
           (of_direction + static_cast<int64_t>(tile) * tile_size + (slot == 0 ? 0 : slot_size));
  }
  SK_DEVICE Global<uint32_t> flags() const { return global<uint32_t>(place.flags, slot_size / tile_size * pairs); }
};
constexpr int kNowhere = -1;

// The weights of a warp and their product with its part of a slot. Blocks of K are ordered by units, then gates, so
// that a part has few publishers. kSummed: gates along the rows of the weights, each with its own sum; kOfK: gates
// along K.
template <class S, int kPairs, int kSummed, int kOfK, int kHeld>
struct GridFactors {
  static constexpr int kTiles = kPairs * kSummed;
  static constexpr int kAhead = grid_ahead(kTiles);
  Global<const S> weights;  // of the direction, offset to the lane's first piece
  int first_strip, last_strip, of_gate, of_strip;
  // One or two chains per sum: the halves of each block. The order of a sum is independent of the division into teams.
  Factors<S, kTiles, kHeld, kSummed == 1 ? 2 : 1> factors;

  // of_gate: blocks per gate. The product covers gates from first_gate of the `gates` gates of a strip.
  SK_DEVICE GridFactors(const PersistentArgs& args, const GridLaneMap& lanes, int of_gate_, int first_gate, int gates,
                        int in_shared, Shared<S> of_block)
      : weights(
            global<const S>(args.weights, static_cast<int64_t>(args.layer.directions) * lanes.strips * gates *
                                              of_gate_ * kBlockSize<S>) +
            ((static_cast<int64_t>(lanes.direction) * lanes.strips * gates + first_gate) * of_gate_ * kBlockSize<S> +
             lanes.lane * kPiece<S>)),
        first_strip(2 * lanes.first_pair),
        last_strip(lanes.strips - 1),
        of_gate(of_gate_),
        of_strip(gates * of_gate_),
        factors(warp_index(), kGridWarps, of_gate_ * kOfK, lanes.lane,
                of_block + static_cast<int64_t>(warp_index()) * in_shared * kTiles * 2 * kBlockSize<S>, in_shared,
                weights, [this](int block, int tile, int half) { return piece(block, tile, half); }) {}
  SK_DEVICE void operator()(Global<const S> share, float (&sum)[kTiles][4]) const {
    factors.template times_ahead<kAhead, grid_streams<S>(kPairs)>(
        [&](int block) {
          return bit_cast<Words>(load_vec<kPiece<S>, Cache::kL2>(share, static_cast<int64_t>(block) * kBlockSize<S>));
        },
        weights, [this](int block, int tile, int half) { return piece(block, tile, half); }, sum);
  }

 private:
  // A strip beyond the last reads the last one; its results are not used.
  SK_DEVICE int piece(int block, int tile, int half) const {
    int strip = first_strip + 2 * (tile / kSummed) + half;
    strip = strip < last_strip ? strip : last_strip;
    const int gate = kOfK > 1 ? block % kOfK : tile % kSummed;
    return (strip * of_strip + gate * of_gate + block / kOfK) * kBlockSize<S>;
  }
};

// One product of a step: the weights of the block, the exchange of its operand, and the reduction over its warps.
template <class S, int kPairs, int kSummed, int kOfK, int kHeld>
struct GridProduct {
  static constexpr int kTiles = kPairs * kSummed;
  GridFactors<S, kPairs, kSummed, kOfK, kHeld> multiply;
  Exchange<S, kOfK> exchange;
  PartialSums<kGridWarps, kTiles, kSummed> partial_sums;

  // slot_blocks: blocks of K per slot, the larger of both products.
  SK_DEVICE GridProduct(const PersistentArgs& args, const GridLayout& place, const GridLaneMap& lanes, int of_gate,
                        int first_gate, int gates, int slot_blocks, int in_shared, Shared<S> weights,
                        Shared<float> partial)
      : multiply(args, lanes, of_gate, first_gate, gates, in_shared, weights),
        exchange(args, place, lanes, slot_blocks, multiply.factors.first, multiply.factors.count),
        partial_sums(lanes, warp_index(), warp_index() / kPairWarps * kSummed, partial) {}
  // Called by all threads of the block. partial: offset of the buffer of partial sums in use.
  SK_DEVICE void operator()(const GridLaneMap& lanes, int tile, int slot, int partial,
                            float (&product)[kSummed]) const {
    float sum[kTiles][4];
    multiply(exchange.share(tile, slot), sum);
    partial_sums.put(lanes, partial, sum);
    block_sync();
    if (lanes.alive) partial_sums.take(partial, product);
  }
};
template <class S, int kPairs, int kSummed, int kOfK, int kHeld>
struct ProductIfAny {
  using Type = GridProduct<S, kPairs, kSummed, kOfK, kHeld>;
};
template <class S, int kPairs, int kOfK, int kHeld>
struct ProductIfAny<S, kPairs, 0, kOfK, kHeld> {
  using Type = NoProduct;
};
template <class S, int kPairs, int kSummed, int kHeld>
struct ProductIfAny<S, kPairs, kSummed, 0, kHeld> {
  using Type = NoProduct;
};
template <class S, int kPairs, int kSummed, int kOfK, int kHeld>
using GridProductIfAny = typename ProductIfAny<S, kPairs, kSummed, kOfK, kHeld>::Type;

// Gates of the two products, and blocks of K in registers. A cell with one product has all its gates in the first.
template <class Cell, int kPairs>
struct GridForward {
  static constexpr int kFirst = Cell::kFirst, kSecond = Cell::kGates - kFirst;
  static constexpr int kHeld = grid_forward_blocks<typename Cell::Storage>(kPairs, Cell::kGates, Cell::kOptions);
};
template <class Cell, int kPairs>
struct GridBackward {
  static constexpr int kFirst = Cell::kFirst, kSecond = Cell::kGates - kFirst;
  static constexpr int kHeld = grid_backward_blocks<typename Cell::Storage>(kPairs, kSecond > 0);
};

// ---- forward ----

// Grid, one-dimensional: directions, or one of them, x teams x blocks per team.
template <class Cell, int kPairs>
SK_KERNEL(kGridThreads, 1)
grid_forward_kernel(const SK_GRID_CONSTANT GridForwardArgs args) {
  using S = typename Cell::Storage;
  using Of = GridForward<Cell, kPairs>;
  constexpr int kGates = Cell::kGates, kThreads = kPairs * kSums;
  constexpr int kFirst = Of::kFirst, kSecond = Of::kSecond, kHeld = Of::kHeld, kRounds = kSecond > 0 ? 2 : 1;
  constexpr int kTiles = kPairs * kFirst, kPlace = kGridWarps * kTiles * kSums;
  const GridLayout& place = args.place;
  const GridLaneMap lanes(args, place, kPairs);
  const int turns = lanes.turns, most_turns = static_cast<int>((args.tiles + place.teams - 1) / place.teams);
  const int blocks = static_cast<int>(blocks_of<S>(args.layer.H));
  SharedArena arena;
  const int64_t rest = place.in_shared[0] * kTiles;
  const GridMemory<S, SharedArena> memory(arena, kPairs, rest + place.in_shared[1] * kPairs * kSecond, kTiles,
                                          most_turns, kGates, Cell::kSeparate ? kGates : 0, kRing + 1,
                                          1 + Cell::kCells);
  const int thread = thread_index(), stride = most_turns * kThreads;
  const bool works = thread < kThreads;

  using Unit = ForwardUnit<Cell, kThreads>;
  const GridProduct<S, kPairs, kFirst, 1, kHeld> multiply(args, place, lanes, blocks, 0, kGates, blocks,
                                                          place.in_shared[0], memory.weights, memory.partial);
  const GridProductIfAny<S, kPairs, kSecond, 1, kHeld> multiply_q(
      args, place, lanes, blocks, kFirst, kGates, blocks, place.in_shared[1],
      memory.weights + kGridWarps * rest * 2 * kBlockSize<S>, memory.partial);
  // For each turn: h and the cells, the row of its next step and of those after it.
  const Shared<float> h_of = memory.states + thread, c_of = h_of + stride;
  const Shared<int64_t> at_of = memory.rows + thread;
  const Shared<int> unit_of = memory.units + thread;
  const auto sequence_of = [&](int turn) {
    return static_cast<int64_t>(lanes.tile(place, turn)) * lanes.rows + lanes.row;
  };
  // Pre-activations are prefetched two turns ahead; with fewer turns, steps of the same tile.
  const int depth = turns == 1 ? 2 * stride : turns == 2 ? stride : 0;
  const Unit at_start(args, lanes.direction, lanes.unit, memory.ring);
  if (thread < turns)
    memory.steps[thread] = static_cast<int>(steps_of_tile(args, at_start.links, lanes.tile(place, thread)));
  if (works) {
    const int mine = lanes.alive ? multiply.exchange.place_of(lanes) : kNowhere;
    unit_of[0] = lanes.unit;
    unit_of[kThreads] = mine;
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      if (Cell::kSeparate) memory.bias[gate * kThreads + thread] = lanes.has_unit ? at_start.bias(gate) : 0.0f;
    }
    for (int turn = 0; turn < turns; ++turn) {
      float h = 0.0f, c[Cell::kCellArray] = {};
      int64_t at = kNone;
      S seen{};
      if (lanes.alive && sequence_of(turn) < args.layer.B) {
        at = at_start.start(sequence_of(turn), h, c);
        seen = at_start.seen_at_start(narrow<S>(h), at_start.state(sequence_of(turn)));
      }
      h_of[turn * kThreads] = h;
      SK_UNROLL
      for (int k = 0; k < Cell::kCells; ++k) c_of[k * stride + turn * kThreads] = c[k];
      SK_UNROLL
      for (int i = 0; i < kRing; ++i) {
        at_of[i * stride + turn * kThreads] = at;
        at = at_start.follow(at);
      }
      const S values[1] = {seen};
      multiply.exchange.publish(lanes.tile(place, turn), 0, lanes.pair, mine, values);
    }
    const int64_t first = at_of[0], second = turns > 1 ? at_of[kThreads] : at_of[stride];
    at_start.fetch(0, first);
    at_start.fetch(Unit::kStage, second);
  }
  block_sync();
  int most = 0;
  for (int turn = 0; turn < turns; ++turn) {
    const int steps = memory.steps[turn];
    most = steps > most ? steps : most;
  }

  int stage = 0;  // of the ring, where it begins
  int partial = 0;
  for (int s = 0; s < most; ++s) {
    const int round = s * kRounds, slot = slot_of(round), next_slot = slot_of(round + kRounds);
    SK_NO_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      const int tile = lanes.tile(place, turn), steps = memory.steps[turn];
      int64_t ahead = kNone;
      uint32_t masks = 0;
      if (works) {
        const Unit unit(args, lanes.direction, unit_of[0], memory.ring);
        int later = turn + 2;
        while (later >= turns) later -= turns;
        const int64_t asked = at_of[depth + later * kThreads], last = at_of[(kRing - 1) * stride + turn * kThreads];
        unit.fetch(stage == 0 ? (kRing - 1) * Unit::kStage : stage - Unit::kStage, asked);
        ahead = unit.follow(last);
        masks = unit.masks_of(at_of[turn * kThreads]);
      }
      if (s < steps) {
        float product[kFirst] = {}, saved[Cell::kSaved] = {}, carried = 0.0f, of_q[1] = {};
        multiply.exchange.wait_published(tile, round + 1);
        if (works) at_of[kRing * stride + turn * kThreads] = ahead;  // kept in shared memory during the product
        multiply(lanes, tile, slot, partial, product);
        partial = kPlace - partial;
        if (works) copy_async_wait<kRing - 1>();  // of this turn
        if constexpr (kSecond > 0) {
          if (works) {
            const Unit unit(args, lanes.direction, unit_of[0], memory.ring);
            const int64_t link = at_of[turn * kThreads];
            const typename Unit::Options options = unit.options_of(masks, link, sequence_of(turn));
            float h = h_of[turn * kThreads];
            S q[1] = {S{}};
            if (link >= 0) q[0] = unit.first(stage, link, product, options, h, carried, saved);
            multiply_q.exchange.publish(tile, other_slot(slot), lanes.pair, unit_of[kThreads], q);
          }
          multiply_q.exchange.wait_published(tile, round + 2);
          multiply_q(lanes, tile, other_slot(slot), partial, of_q);
          partial = kPlace - partial;
        }
        if (works) {
          const Unit unit(args, lanes.direction, unit_of[0], memory.ring);
          const int mine = unit_of[kThreads];
          const int64_t link = at_of[turn * kThreads], next = at_of[stride + turn * kThreads];
          float bias[kGates] = {}, h = h_of[turn * kThreads], c[Cell::kCellArray] = {};
          SK_UNROLL
          for (int k = 0; k < Cell::kCells; ++k) {
            const float value = c_of[k * stride + turn * kThreads];
            c[k] = value;
          }
          SK_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            if (Cell::kSeparate) bias[gate] = memory.bias[gate * kThreads + thread];
          }
          const typename Unit::Options options = unit.options_of(masks, link, sequence_of(turn));
          if constexpr (kSecond > 0) {
            if (link >= 0) unit.second(stage, link, of_q[0], options, carried, h, saved);
          } else {
            if (link >= 0) unit.step(stage, link, product, bias, options, h, c, saved);
          }
          const S now = narrow<S>(h);
          if (s + 1 < steps) {
            const S values[1] = {unit.seen(now, options)};
            multiply.exchange.publish(tile, next_slot, lanes.pair, mine, values);
          }
          if (link >= 0) unit.store_step(link, next == kNone, sequence_of(turn), now, c, saved);
          SK_UNROLL
          for (int i = 0; i < kRing; ++i) {
            const int64_t after = at_of[(i + 1) * stride + turn * kThreads];
            at_of[i * stride + turn * kThreads] = after;
          }
          h_of[turn * kThreads] = h;
          SK_UNROLL
          for (int k = 0; k < Cell::kCells; ++k) c_of[k * stride + turn * kThreads] = c[k];
        }
      }
      stage = stage == (kRing - 1) * Unit::kStage ? 0 : stage + Unit::kStage;
    }
  }
  copy_async_wait<0>();
}

// ---- backward ----

// Backward publishes the gradients of the gates of all units, G times as many values as h; a block multiplies them with
// the columns of W_hh of its units.
template <class Cell, int kPairs>
SK_KERNEL(kGridThreads, 1)
grid_backward_kernel(const SK_GRID_CONSTANT GridBackwardArgs args) {
  using S = typename Cell::Storage;
  using Of = GridBackward<Cell, kPairs>;
  constexpr int kGates = Cell::kGates, kThreads = kPairs * kSums;
  constexpr int kFirst = Of::kFirst, kSecond = Of::kSecond, kHeld = Of::kHeld, kRounds = kSecond > 0 ? 2 : 1;
  constexpr int kTiles = kPairs, kPlace = kGridWarps * kTiles * kSums;
  const GridLayout& place = args.place;
  const GridLaneMap lanes(args, place, kPairs);
  const int turns = lanes.turns, most_turns = static_cast<int>((args.tiles + place.teams - 1) / place.teams);
  const int of_gate = static_cast<int>(blocks_of<S>(args.layer.H)), blocks = of_gate * kFirst;
  SharedArena arena;
  const int64_t rest = place.in_shared[0] * kTiles;
  const GridMemory<S, SharedArena> memory(arena, kPairs, rest + (kSecond > 0 ? place.in_shared[1] * kTiles : 0), kTiles,
                                          most_turns, 0, 0, 3, 1 + Cell::kCells);
  const int thread = thread_index(), stride = most_turns * kThreads;
  const bool works = thread < kThreads;

  using Unit = BackwardUnit<Cell>;
  const GridProduct<S, kPairs, 1, kFirst, kHeld> multiply(args, place, lanes, of_gate, 0, kGates, blocks,
                                                          place.in_shared[0], memory.weights, memory.partial);
  const GridProductIfAny<S, kPairs, 1, kSecond, kHeld> multiply_q(
      args, place, lanes, of_gate, kFirst, kGates, blocks, place.in_shared[1],
      memory.weights + kGridWarps * rest * 2 * kBlockSize<S>, memory.partial);
  const Unit at_start(args, lanes.direction, lanes.unit);
  if (thread < turns)
    memory.steps[thread] = static_cast<int>(steps_of_tile(args, at_start.links, lanes.tile(place, thread)));
  const Shared<int> unit_of = memory.units + thread;
  const auto sequence_of = [&](int turn) {
    return static_cast<int64_t>(lanes.tile(place, turn)) * lanes.rows + lanes.row;
  };
  // For each turn, the position of its sequence; the reset flag is stored with the row.
  const Shared<float> floats = memory.states + thread;
  const Shared<int64_t> rows = memory.rows + thread;
  const auto put = [&](int turn, const typename Unit::State& of) {
    floats[turn * kThreads] = of.direct;
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) floats[(1 + k) * stride + turn * kThreads] = of.dc[k];
    rows[turn * kThreads] = of.at >= 0 && of.cut ? of.at | kResetFlag : of.at;
    rows[stride + turn * kThreads] = of.before;
  };
  const auto take = [&](int turn, typename Unit::State& of) {
    const int64_t at = rows[turn * kThreads], before = rows[stride + turn * kThreads];
    const float direct = floats[turn * kThreads];
    of.direct = direct;
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) {
      const float dc = floats[(1 + k) * stride + turn * kThreads];
      of.dc[k] = dc;
    }
    of.cut = at < 0 || is_reset(at);
    of.at = at < 0 ? at : at & ~kResetFlag;
    of.before = before;
  };
  if (works) {
    unit_of[0] = lanes.unit;
    unit_of[kThreads] = lanes.alive ? multiply.exchange.place_of(lanes) : kNowhere;
    for (int turn = 0; turn < turns; ++turn) {
      typename Unit::State walk;
      if (lanes.alive && sequence_of(turn) < args.layer.B) at_start.start(sequence_of(turn), walk);
      put(turn, walk);
    }
  }
  block_sync();
  int most = 0;
  for (int turn = 0; turn < turns; ++turn) {
    const int steps = memory.steps[turn];
    most = steps > most ? steps : most;
  }

  int partial = 0;
  for (int s = 0; s <= most; ++s) {
    const int round = s * kRounds, slot = slot_of(round), next_slot = slot_of(round + kRounds);
    SK_NO_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      const int tile = lanes.tile(place, turn), steps = memory.steps[turn];
      if (s > steps) continue;
      typename Unit::State walk;  // loaded twice, so that it stays in shared memory during the product
      typename Unit::Read read;
      if (works) {
        take(turn, walk);
        const Unit unit(args, lanes.direction, unit_of[0]);
        unit.read(walk, sequence_of(turn), lanes.lane, read);
      }
      float product[1] = {};
      if (s > 0) multiply.exchange.wait_published(tile, round);
      if (works) rows[2 * stride + turn * kThreads] = read.ahead;  // kept in shared memory during the product
      if (s > 0) {
        multiply(lanes, tile, slot, partial, product);
        partial = kPlace - partial;
      }
      float by_x[kGates], by_h[kGates];
      if constexpr (kSecond > 0) {
        if (works) {
          const Unit unit(args, lanes.direction, unit_of[0]);
          take(turn, walk);
          unit.second(walk, sequence_of(turn), read, product[0], by_x);
          if (s < steps) {
            const S last[1] = {operand(narrow<S>(by_x[kFirst]), true)};
            const int mine = unit_of[kThreads], block = unit_of[0] / kBlockK<S>;
            const int of_last = mine < 0 ? kNowhere : mine - block * (kFirst - 1) * kBlockSize<S>;
            multiply_q.exchange.publish(tile, other_slot(slot), lanes.pair, of_last, last);
          }
        }
        if (s < steps) {
          float of_q[1] = {};
          multiply_q.exchange.wait_published(tile, round + 1);
          multiply_q(lanes, tile, other_slot(slot), partial, of_q);
          partial = kPlace - partial;
          if (works) {
            const Unit unit(args, lanes.direction, unit_of[0]);
            unit.first(walk, sequence_of(turn), read, of_q[0], by_x);
          }
        }
        SK_UNROLL
        for (int gate = 0; gate < kGates; ++gate) by_h[gate] = by_x[gate];
      }
      if (works) {
        const Unit unit(args, lanes.direction, unit_of[0]);
        const int mine = unit_of[kThreads];
        if constexpr (kSecond == 0) {
          take(turn, walk);
          unit.step(walk, sequence_of(turn), read, product[0], by_x, by_h);
        }
        if (s < steps) {
          S values[kFirst];
          SK_UNROLL
          for (int gate = 0; gate < kFirst; ++gate) values[gate] = operand(narrow<S>(by_h[gate]), true);
          multiply.exchange.publish(tile, next_slot, lanes.pair, mine, values);
        }
        const int64_t ahead = rows[2 * stride + turn * kThreads];
        unit.store_step(walk, ahead, by_x, by_h);
        put(turn, walk);
      }
    }
  }
}

}  // namespace seqkernels::cuda
