// Layers walked by the whole device, for those whose weights are too many for a cluster (compute capability 8.0): one
// cooperative launch for all steps, in which every block stays on its multiprocessor.
//
// Blocks form teams. A team has all the units of one direction, 16 or 32 to a block (one or two pairs of strips) with
// all their gates and for all steps, and some of the tiles of up to 8 sequences; the fewer tiles the better, so the
// device is cut in as many teams as it has room for. The 8 warps of a block share the sum over K. Weights stay in
// registers, then in shared memory; what fits in neither is read from the second-level cache again at every step. A
// team with several tiles takes them in turn at each step, so what one tile's blocks tell each other is under way while
// the next tile's products are made.
//
// What blocks tell each other, h (backward: the gradients of the gates), goes through slots in global memory, in
// fragment order, and each warp reads its share of K from there, past the first-level cache. Every pair counts in a
// flag of its own, once for each of its four warps, what it has published for a tile, and a warp waits for the pairs
// that its share of K comes from and for nobody else. There is no barrier of the grid.
//
// A cell of two products in a row has two such rounds in a step: what the second product is with is published first. In
// what follows a step is a round.
//
// Two slots suffice. Let step s of a tile read slot s % 2, whose values were published at step s - 1 (or before the
// first step), and publish into slot (s + 1) % 2. A block publishes step s after its barrier of step s. All its warps
// have come to that barrier, each when it had waited for its share of what was published at step s - 1, and together
// their shares are of all pairs. Each of these pairs published step s - 1 after its own block's barrier of step s - 1,
// to which all warps of that block had come with their products made, which were the last reads of slot (s - 1) % 2 =
// (s + 1) % 2. So when the values of step s are written, every warp of the team is done with what they overwrite. In
// the same way no warp of a pair is counted for step s while another one of that pair is not counted for step s - 1:
// the barrier of step s is between the two. So a flag that says 4 n says that all four have published n times.
//
// Partial sums have two places as well, used in turn: a warp writes a place again two products later, and the barrier
// of the product between has seen all who read it.
#pragma once

#include "recurrent/cuda/persistent.cuh"

namespace seqkernels::cuda {

constexpr int kGridWarps = 8;  // of a block, which share K
constexpr int kGridThreads = kGridWarps * kWarp;
constexpr int kMostPairs = 2;  // of a block
static_assert(kMostPairs * kPairWarps <= kGridWarps, "each pair has warps for its units");

// Blocks of K that a lane keeps in registers of each product: up to 128 registers of the 255 that a thread has; 96
// where a second pair has sums too, and of TF32, which computes with the library's functions; fewer where options or a
// second product take their share.
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
// Whether weights that do not fit are streamed: not by kernels of half types and one pair, which no multiprocessor with
// 160 KiB of shared memory would ask to, and which need the registers.
template <class S>
SK_HOST_DEVICE constexpr bool grid_streams(int pairs) {
  return sizeof(S) == 4 || pairs > 1;
}
// How many blocks ahead a lane asks for its pieces of a slot, which come from the second-level cache.
SK_HOST_DEVICE constexpr int grid_ahead(int tiles) { return tiles > 4 ? 2 : tiles > 2 ? 4 : 6; }

struct GridLayout {
  void* slots;       // [2, directions, tiles, blocks of K, 32] pieces, zeros where there is no unit
  uint32_t* flags;   // [directions, tiles, pairs], zeros
  int teams;         // of a direction
  int blocks;        // of a team
  int in_shared[2];  // blocks of K that a warp has in shared memory, of each product
};
struct GridForwardArgs : PersistentForwardArgs {
  GridLayout place;
};
struct GridBackwardArgs : PersistentBackwardArgs {
  GridLayout place;
};

// Shared memory of a block that multiplies at most `tiles` times 16 units at once and has `turns` tiles of sequences;
// `rest`: blocks of a warp's pairs of strips that are not in registers, of both products. Of each thread with a unit:
// pre-activations of `gates`, biases of `biases` of them, two numbers and `links` rows for each turn; and what would
// take registers from the weights all the while.
template <class S, class Arena>
struct GridMemory {
  Shared<S> weights;      // [kGridWarps, rest, 2, 32] pieces, those of the first product first
  Shared<float> ring;     // [kRing, gates, threads]
  Shared<float> bias;     // [biases, threads]
  Shared<float> partial;  // [2, kGridWarps, tiles, kSums]
  Shared<float> states;   // [states, turns, threads]
  Shared<int64_t> rows;   // [links, turns, threads]
  Shared<int> units;      // [2, threads]: the unit, and its place in a slot
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

// Where a lane stands in the grid: [directions, teams, blocks of a team].
struct GridLaneMap : LaneMap {
  int team, first_pair, pairs;  // of the block; of the layer
  bool has_unit, alive;         // alive: it has a unit of a row of each tile, if not of a sequence
  int turns;                    // tiles of the team

  SK_DEVICE GridLaneMap(const PersistentArgs& args, const GridLayout& place, int pairs_of_block) {
    const int64_t of_teams = block_index() / place.blocks;
    team = static_cast<int>(of_teams % place.teams);
    first_pair = static_cast<int>(block_index() % place.blocks) * pairs_of_block;
    const int of_block = warp_index() / kPairWarps;
    assign(args, static_cast<int>(of_teams / place.teams), first_pair + of_block);
    pairs = (strips + 1) / 2;
    has_unit = of_block < pairs_of_block && unit < args.layer.H;
    alive = has_unit && row < rows;
    turns = static_cast<int>((args.tiles - team + place.teams - 1) / place.teams);
  }
  SK_DEVICE int tile(const GridLayout& place, int turn) const { return team + turn * place.teams; }
};

// What a team's blocks tell each other: kGates values of each unit, those of a block of units side by side.
template <class S, int kGates>
struct Exchange {
  static constexpr int kPairsOfBlock = kBlockK<S> / kPairUnits;  // whose units are a block of K
  static_assert(kPairsOfBlock * kPairUnits == kBlockK<S>, "whole pairs");
  const GridLayout& place;
  int64_t slot_size, of_direction;  // elements of a slot, and before those of the direction
  int tile_size, first_flag, pairs;
  int theirs;      // in a tile: the lane's piece of its warp's first block
  int first, end;  // pairs that publish the warp's share

  // blocks: of K of a slot. The warp's share: blocks [first_block, first_block + count).
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
  // Where the lane's unit is in a tile.
  SK_DEVICE static int place_of(const GridLaneMap& lanes) {
    return lanes.unit / kBlockK<S> *
           (kGates * kBlockSize<S>)+static_cast<int>(place_in_strip<S>(lanes.row, lanes.unit % kBlockK<S>));
  }
  // mine: of the lane's unit; nowhere: it has none that anyone reads. All of a warp of `pair` come.
  SK_DEVICE void publish(int tile, int slot, int pair, int mine, const S (&values)[kGates]) const {
    if (mine >= 0) {
      const Global<S> to = slots(tile, slot) + mine;
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) store<Cache::kL2>(to, gate * kBlockSize<S>, values[gate]);
    }
    warp_sync();
    if (lane_index() == 0 && pair < pairs) add_release(flags(), first_flag + tile * pairs + pair, uint32_t{1});
  }
  // Until all of the warp's share was published so many times.
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

// The weights of a block's warp, and how it multiplies them with its share of a slot. Blocks of K go by units first and
// gates second, so that a share has few publishers. kSummed: gates of the 16 rows of weights, each with a sum of its
// own; kOfK: gates along K.
template <class S, int kPairs, int kSummed, int kOfK, int kHeld>
struct GridFactors {
  static constexpr int kTiles = kPairs * kSummed;
  static constexpr int kAhead = grid_ahead(kTiles);
  Global<const S> weights;  // of the direction, the lane's first piece
  int first_strip, last_strip, of_gate, of_strip;
  // One chain or two of every sum, the halves of each block: in the same order however the device is cut.
  Factors<S, kTiles, kHeld, kSummed == 1 ? 2 : 1> factors;

  // of_gate: blocks of a gate. The product is with gates from first_gate on, of `gates` that a strip has.
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
  // In place of a strip that is not there the last one is read, for units that nobody has.
  SK_DEVICE int piece(int block, int tile, int half) const {
    int strip = first_strip + 2 * (tile / kSummed) + half;
    strip = strip < last_strip ? strip : last_strip;
    const int gate = kOfK > 1 ? block % kOfK : tile % kSummed;
    return (strip * of_strip + gate * of_gate + block / kOfK) * kBlockSize<S>;
  }
};

// One of a step's products: the block's share of the weights, what the team tells each other for it, and where the sums
// of the block's warps partial_sums.
template <class S, int kPairs, int kSummed, int kOfK, int kHeld>
struct GridProduct {
  static constexpr int kTiles = kPairs * kSummed;
  GridFactors<S, kPairs, kSummed, kOfK, kHeld> multiply;
  Exchange<S, kOfK> exchange;
  PartialSums<kGridWarps, kTiles, kSummed> partial_sums;

  // slot_blocks: of K of a slot, whichever product needs more.
  SK_DEVICE GridProduct(const PersistentArgs& args, const GridLayout& place, const GridLaneMap& lanes, int of_gate,
                        int first_gate, int gates, int slot_blocks, int in_shared, Shared<S> weights,
                        Shared<float> partial)
      : multiply(args, lanes, of_gate, first_gate, gates, in_shared, weights),
        exchange(args, place, lanes, slot_blocks, multiply.factors.first, multiply.factors.count),
        partial_sums(lanes, warp_index(), warp_index() / kPairWarps * kSummed, partial) {}
  // All of the block come. partial: which of the two places of the sums.
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

// What the kernels of a cell are made of: gates, and blocks of K in registers. A cell of one product has all its gates
// in the first.
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

// ---- forward
// ---------------------------------------------------------------------------------------------------------

// Grid: blocks of a team x teams x directions, in one dimension.
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
  // Of each turn: h and the cells, the row of its next step and of those after it.
  const Shared<float> h_of = memory.states + thread, c_of = h_of + stride;
  const Shared<int64_t> at_of = memory.rows + thread;
  const Shared<int> unit_of = memory.units + thread;
  const auto sequence_of = [&](int turn) {
    return static_cast<int64_t>(lanes.tile(place, turn)) * lanes.rows + lanes.row;
  };
  // Pre-activations are asked for two turns ahead: of the same tile, where there are so few.
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
    const int round = s * kRounds, slot = round & 1, next_slot = (round + kRounds) & 1;
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
        if (works) at_of[kRing * stride + turn * kThreads] = ahead;  // there it waits for the product
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
            multiply_q.exchange.publish(tile, 1 - slot, lanes.pair, unit_of[kThreads], q);
          }
          multiply_q.exchange.wait_published(tile, round + 2);
          multiply_q(lanes, tile, 1 - slot, partial, of_q);
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

// ---- backward
// --------------------------------------------------------------------------------------------------------

// The walk the other way: the gradients of the gates of all units are published, G times as many values as h, and a
// block multiplies them with the columns of W_hh of its units.
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
  // Of each turn, where its sequence is; cut goes with the row.
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
    const int round = s * kRounds, slot = round & 1, next_slot = (round + kRounds) & 1;
    SK_NO_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      const int tile = lanes.tile(place, turn), steps = memory.steps[turn];
      if (s > steps) continue;
      typename Unit::State walk;  // taken twice, so that it waits for the product in shared memory
      typename Unit::Read read;
      if (works) {
        take(turn, walk);
        const Unit unit(args, lanes.direction, unit_of[0]);
        unit.read(walk, sequence_of(turn), lanes.lane, read);
      }
      float product[1] = {};
      if (s > 0) multiply.exchange.wait_published(tile, round);
      if (works) rows[2 * stride + turn * kThreads] = read.ahead;  // there it waits for the product
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
            multiply_q.exchange.publish(tile, 1 - slot, lanes.pair, of_last, last);
          }
        }
        if (s < steps) {
          float of_q[1] = {};
          multiply_q.exchange.wait_published(tile, round + 1);
          multiply_q(lanes, tile, 1 - slot, partial, of_q);
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
