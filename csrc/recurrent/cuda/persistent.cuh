// Shared by the persistent kernels, which run all steps of a layer in one launch: the weights of a warp, the reduction
// of partial sums, and the work of a lane on its unit at every step.
//
// The 16 rows of a matrix instruction are the weights of 16 hidden units, a pair of strips; its 8 columns are up to 8
// sequences, a tile. Several warps split the sum over K. The weights of a warp are resident: the first kHeld blocks of
// K in registers, the others in shared memory. Partial sums are added in shared memory in the order of the warps; each
// lane then owns one unit of one row.
//
// Each sequence follows its own links between rows. A sequence that has ended keeps its last values; a tile ends with
// its longest sequence.
#pragma once

#include "recurrent/cuda/steps.cuh"

namespace seqkernels::cuda {

constexpr int kMostRows = 8;                   // rows per tile
constexpr int kPairUnits = 16;                 // two strips
constexpr int kSums = kPairUnits * kMostRows;  // of a warp, a pair and a tile: [2 strips, 8 rows, 8 units]
constexpr int kPairWarps = kSums / kWarp;      // warps whose lanes each own a unit of a row
constexpr int kRing = 3;                       // steps of pre-activations in flight

struct PersistentArgs {
  LayerArgs layer;
  const void* weights;  // [directions, strips, gates, blocks, 32] pieces
  int64_t tiles;        // of `rows` sequences
  int rows;             // 1, 2, 4 or 8
};

struct PersistentForwardArgs : PersistentArgs {
  const void* from_x;  // [directions, rows, G * H] of the compute type
  void *h_n, *c_n[kMaxCells];
};

struct PersistentBackwardArgs : PersistentArgs {
  const void *dy, *dcells[kMaxCells];  // like y, or null
  const void *dh_n, *dc_n[kMaxCells];  // [directions, B, H] or null
  void *dgates_x, *dgates_h;           // [directions, rows, G * H]
  void* q;                             // [directions, rows, H] of cells with two products
  void* dpeephole;                     // [directions, rows, kPeepholes * H] of the compute type or null
  void *dh0, *dc0[kMaxCells];          // [directions, B, H] or null
};

// Steps of the longest sequence of a tile.
SK_DEVICE int64_t steps_of_tile(const PersistentArgs& args, Global<const Link> links, int64_t tile) {
  int64_t most = 0;
  for (int64_t b = tile * args.rows; b < (tile + 1) * args.rows && b < args.layer.B; ++b) {
    const Link link = links[args.layer.rows + b];
    most = link.prev > most ? link.prev : most;
  }
  return most;
}

// Mapping of a lane to direction, units and rows.
struct LaneMap {
  int direction, lane, g, t;  // g, t: position in the fragments of the matrix instructions
  int rows;                   // rows per tile
  int pair, strips;           // after the reduction its warp owns strips 2 * pair and 2 * pair + 1
  // Unit and row owned by this lane after the reduction: a warp owns 8 units of four rows.
  int strip, unit, row;

  SK_DEVICE void assign(const PersistentArgs& args, int of_direction, int of_pair) {
    const int part = warp_index() % kPairWarps;
    lane = lane_index();
    g = lane / 4;
    t = lane % 4;
    rows = args.rows;
    direction = of_direction;
    pair = of_pair;
    strips = static_cast<int>((args.layer.H + kUnits - 1) / kUnits);
    strip = part / 2;
    unit = (2 * pair + strip) * kUnits + lane % kUnits;
    row = part % 2 * 4 + lane / kUnits;
  }
};

// The weights of a warp: its part of K for 16 units, kTiles times (for each gate, for each pair). Each sum is split
// into kChains independent chains, which hides the latency of the matrix instructions when there are few tiles.
template <class S, int kTiles, int kHeld, int kChains>
struct Factors {
  Words held[kHeld][kTiles][2];
  Shared<S> rest;          // the warp's [blocks, kTiles, 2] pieces of all lanes, in the order of left_of
  int first, count, upto;  // blocks of K; the first `upto` of `count` are resident

  SK_DEVICE Factors() {}
  // The blocks are divided among `parts` warps. piece(block, tile, half): offset of the lane's piece of a strip.
  template <class PieceOf>
  SK_DEVICE Factors(int part, int parts, int blocks, int lane, Shared<S> of_warp, int in_shared, Global<const S> from,
                    PieceOf piece)
      : rest(of_warp + lane * kPiece<S>) {
    const int most = (blocks + parts - 1) / parts;
    first = part * most;
    count = blocks - first < most ? blocks - first : most;
    if (count < 0) count = 0;
    upto = count < kHeld + in_shared ? count : kHeld + in_shared;
    SK_UNROLL
    for (int block = 0; block < kHeld; ++block) {
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        SK_UNROLL
        for (int half = 0; half < 2; ++half) {
          held[block][tile][half] = Words{};
          if (block < count) held[block][tile][half] = load_words<S>(from, piece(first + block, tile, half));
        }
      }
    }
    for (int block = kHeld; block < upto; ++block) {
      for (int tile = 0; tile < kTiles; ++tile) {
        keep(block, tile, load_vec<kPiece<S>, Cache::kReadOnly>(from, piece(first + block, tile, 0)),
             load_vec<kPiece<S>, Cache::kReadOnly>(from, piece(first + block, tile, 1)));
      }
    }
  }

  // sum[tile]: units g and g + 8 of the pair, rows 2t and 2t + 1 of the tile. right_of(block): the lane's piece of the
  // right operand, from shared memory.
  template <class Right>
  SK_DEVICE void times(Right right_of, float (&sum)[kTiles][4]) const {
    float chains[kTiles][kChains][4] = {};
    SK_UNROLL
    for (int block = 0; block < kHeld; ++block) {
      if (block >= count) continue;
      const Words right = right_of(block);
      add_held(chains, block, right);
    }
    // With chains, two blocks per iteration, so that the chain of each is a compile-time constant.
    constexpr int kAtOnce = kChains > 1 ? 2 : 1;
    SK_NO_UNROLL
    for (int block = kHeld; block < count; block += kAtOnce) {
      SK_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i >= count) continue;
        const Words right = right_of(block + i);
        add(chains, i, right, [&](int tile, int half) { return load_words<S>(rest, place(block + i, tile, half)); });
      }
    }
    add_up(chains, sum);
  }

  // The same with the right operand in global memory: it is loaded kAhead blocks before its use. With kStreams, weights
  // that are not resident are loaded from global memory, several blocks at a time.
  template <int kAhead, bool kStreams, class Right, class PieceOf>
  SK_DEVICE void times_ahead(Right right_of, Global<const S> from, PieceOf piece, float (&sum)[kTiles][4]) const {
    float chains[kTiles][kChains][4] = {};
    Words right[kAhead];  // of block b in place b % kAhead
    const auto ask = [&](int slot, int block) {
      if (block < upto) right[slot] = right_of(block);
    };
    SK_UNROLL
    for (int i = 0; i < kAhead; ++i) ask(i, i);
    SK_UNROLL
    for (int block = 0; block < kHeld; ++block) {
      if (block >= upto) continue;
      add_held(chains, block, right[block % kAhead]);
      ask(block % kAhead, block + kAhead);
    }
    SK_NO_UNROLL
    for (int block = kHeld; block < upto; block += kAhead) {
      SK_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (block + i >= upto) continue;
        add(chains, i, right[(kHeld + i) % kAhead],
            [&](int tile, int half) { return load_words<S>(rest, place(block + i, tile, half)); });
        ask((kHeld + i) % kAhead, block + i + kAhead);
      }
    }
    constexpr int kAtOnce = kTiles < 4 ? 2 : 1;
    SK_NO_UNROLL
    for (int block = kStreams ? upto : count; block < count; block += kAtOnce) {
      SK_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i >= count) continue;
        const Words streamed = right_of(block + i);
        Words pieces[kTiles][2];
        SK_UNROLL
        for (int k = 0; k < 2 * kTiles; ++k) {
          pieces[k / 2][k % 2] =
              bit_cast<Words>(load_vec<kPiece<S>, Cache::kReadOnly>(from, piece(first + block + i, k / 2, k % 2)));
        }
        add(chains, i, streamed, [&](int tile, int half) { return left_of(pieces[tile][0], pieces[tile][1], half); });
      }
    }
    add_up(chains, sum);
  }

  // Stores the pieces of a block's two strips to `rest`.
  SK_DEVICE void keep(int block, int tile, const Piece<S>& low, const Piece<S>& high) const {
    SK_UNROLL
    for (int half = 0; half < 2; ++half) {
      store_vec(rest, place(block, tile, half),
                bit_cast<Piece<S>>(left_of(bit_cast<Words>(low), bit_cast<Words>(high), half)));
    }
  }
  // Offset of a piece in `rest`.
  SK_DEVICE static int place(int block, int tile, int half) {
    return (((block - kHeld) * kTiles + tile) * 2 + half) * kBlockSize<S>;
  }

 private:
  SK_DEVICE void add_held(float (&chains)[kTiles][kChains][4], int block, const Words& right) const {
    SK_UNROLL
    for (int half = 0; half < 2; ++half) {
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        const Words left = left_of(held[block][tile][0], held[block][tile][1], half);
        multiply<S>(chains[tile][(block % 2 * 2 + half) % kChains], left, right, half);
      }
    }
  }
  // left(tile, half): the result of left_of.
  template <class Left>
  SK_DEVICE static void add(float (&chains)[kTiles][kChains][4], int i, const Words& right, Left left) {
    SK_UNROLL
    for (int half = 0; half < 2; ++half) {
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply<S>(chains[tile][(i * 2 + half) % kChains], left(tile, half), right, half);
      }
    }
  }
  SK_DEVICE static void add_up(const float (&chains)[kTiles][kChains][4], float (&sum)[kTiles][4]) {
    SK_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SK_UNROLL
      for (int k = 0; k < 4; ++k) {
        if constexpr (kChains == 4) {
          sum[tile][k] = (chains[tile][0][k] + chains[tile][1][k]) + (chains[tile][2][k] + chains[tile][3][k]);
        } else if constexpr (kChains == 2) {
          sum[tile][k] = chains[tile][0][k] + chains[tile][1][k];
        } else {
          sum[tile][k] = chains[tile][0][k];
        }
      }
    }
  }
};

// Reduction of the sums of kParts warps over kTiles tiles: each lane gets the kMine sums of its unit and row.
// partial: [kParts, kTiles, kSums]. A barrier of the warps must separate put and take.
template <int kParts, int kTiles, int kMine>
struct PartialSums {
  Shared<float> mine, others;  // where this lane writes and reads its first sum

  SK_DEVICE PartialSums(const LaneMap& lanes, int part, int first_tile, Shared<float> partial)
      : mine(partial + (part * kTiles * kSums + 2 * lanes.t * kUnits + lanes.g)),
        others(partial + (first_tile * kSums + (lanes.strip * kMostRows + lanes.row) * kUnits + lanes.lane % kUnits)) {}
  // start: offset of the `partial` in use.
  SK_DEVICE void put(const LaneMap& lanes, int start, const float (&sum)[kTiles][4]) const {
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (2 * lanes.t + i >= lanes.rows) continue;
      SK_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        mine[start + tile * kSums + i * kUnits] = sum[tile][i];
        mine[start + tile * kSums + i * kUnits + kSums / 2] = sum[tile][2 + i];
      }
    }
  }
  SK_DEVICE void take(int start, float (&total)[kMine]) const {
    SK_UNROLL
    for (int tile = 0; tile < kMine; ++tile) {
      SK_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const float value = others[start + (part * kTiles + tile) * kSums];
        total[tile] = part == 0 ? value : total[tile] + value;
      }
    }
  }
};

// Placeholder for the second product of cells that have one product.
struct NoProduct {
  template <class... Args>
  SK_DEVICE explicit NoProduct(const Args&...) {}
};

// An element of an optional array; zero if it is absent.
template <class S>
SK_DEVICE float value_at(const void* from, int64_t at, int64_t count) {
  if (from == nullptr) return 0.0f;
  return widen(load<Cache::kReadOnly>(global<const S>(from, count), at));
}

// The unit of a lane, in both passes.
template <class Cell>
struct Unit {
  using S = typename Cell::Storage;
  using Options = typename Cell::Options;
  static constexpr int kGates = Cell::kGates, kCells = Cell::kCells, kArray = Cell::kCellArray;
  const LayerArgs& layer;
  Global<const Link> links;  // of the direction
  int direction, unit;
  int64_t of_outputs, output_step;  // offset of the unit in a row of y, and row stride

  SK_DEVICE Unit(const LayerArgs& of, int of_direction, int of_unit)
      : layer(of),
        links(global<const Link>(of.links, of.link_count()) + of_direction * (of.rows + of.B)),
        direction(of_direction),
        unit(of_unit),
        of_outputs(of_direction * of.H + of_unit),
        output_step(of.directions * of.H) {}
  SK_DEVICE int64_t state(int64_t sequence) const { return (direction * layer.B + sequence) * layer.H + unit; }
  SK_DEVICE int64_t output(int64_t row) const { return row * output_step + of_outputs; }
  SK_DEVICE int64_t saved(int64_t row) const { return (direction * layer.rows + row) * layer.saved_width + unit; }
  SK_DEVICE int64_t saved_size() const { return layer.directions * layer.rows * layer.saved_width; }

  // Options: the mask values of a row, loaded before the product; all options of a row; the factor of h in the
  // products; a prefetch of the masks of a row.
  SK_DEVICE uint32_t masks(int64_t row) const {
    if constexpr (Cell::kOptions) return row_unit(row, 0).masks();
    return 0;
  }
  SK_DEVICE Options options(uint32_t masks, int64_t row, int64_t sequence) const {
    if constexpr (Cell::kOptions) {
      return row_unit(row, sequence).template options<Cell::kPeepholes>(masks);
    } else {
      return {};
    }
  }
  SK_DEVICE float factor(int64_t of_state) const {
    if (!Cell::kOptions || layer.variational == nullptr) return 1.0f;
    return value_at<S>(layer.variational, of_state, layer.states());
  }
  SK_DEVICE void ask_for_masks(int64_t row) const {
    if constexpr (Cell::kOptions) {
      const auto ask = [&](const uint8_t* mask) {
        if (mask != nullptr) prefetch_l2(global<const uint8_t>(mask, layer.outputs()), output(row));
      };
      ask(layer.zoneout_h);
      ask(layer.zoneout_c);
      ask(layer.candidate);
    }
  }

 private:
  SK_DEVICE UnitOfRow<S> row_unit(int64_t row, int64_t sequence) const {
    return {layer, direction, row, unit, Link{kNone, kNone, sequence, kNone}};
  }
};

// ---- forward ----

// kThreads: threads of a block that own units.
template <class Cell, int kThreads>
struct ForwardUnit : Unit<Cell> {
  using Base = Unit<Cell>;
  using Base::direction, Base::kArray, Base::kCells, Base::kGates, Base::layer, Base::links, Base::output,
      Base::saved_size, Base::state, Base::unit;
  using typename Base::Options, typename Base::S;
  static constexpr int kStage = kGates * kThreads;  // of the ring
  const PersistentForwardArgs& args;
  Shared<float> ring;          // [kRing, kGates, kThreads], offset to this thread
  Global<const float> from_x;  // of row 0

  SK_DEVICE ForwardUnit(const PersistentForwardArgs& of, int of_direction, int of_unit, Shared<float> of_block)
      : Base(of.layer, of_direction, of_unit),
        args(of),
        ring(of_block + thread_index()),
        from_x(global<const float>(of.from_x, of.layer.directions * of.layer.rows * kGates * of.layer.H) +
               (of_direction * of.layer.rows * kGates * of.layer.H + of_unit)) {}

  // Bias of the recurrent product, in cells whose products have separate gradients. The unit must exist.
  SK_DEVICE float bias(int gate) const {
    return Cell::kSeparate ? value_at<S>(layer.bias_h[direction], gate * layer.H + unit, kGates * layer.H) : 0.0f;
  }
  // Loads the initial states; returns the first row.
  SK_DEVICE int64_t start(int64_t sequence, float& h, float (&c)[kArray]) const {
    const Link link = links[layer.rows + sequence];
    h = value_at<S>(layer.h0, state(sequence), layer.states());
    SK_UNROLL
    for (int k = 0; k < kCells; ++k) c[k] = value_at<S>(layer.c0[k], state(sequence), layer.states());
    return link.next;
  }
  SK_DEVICE int64_t follow(int64_t link) const {
    if (link < 0) return kNone;
    const Link of = links[link & ~kResetFlag];
    return of.next;
  }
  SK_DEVICE void fetch(int at_stage, int64_t link) const {
    if (link >= 0) {
      const Global<const float> of_row = from_x + (link & ~kResetFlag) * (kGates * layer.H);
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        copy_async<4>(ring + (at_stage + gate * kThreads), of_row + gate * layer.H);
      }
      if (lane_index() % kUnits == 0) this->ask_for_masks(link & ~kResetFlag);
    }
    copy_async_commit();
  }
  SK_DEVICE uint32_t masks_of(int64_t link) const { return link < 0 ? 0 : this->masks(link & ~kResetFlag); }
  SK_DEVICE Options options_of(uint32_t masks, int64_t link, int64_t sequence) const {
    if (link < 0) return {};
    return this->options(masks, link & ~kResetFlag, sequence);
  }
  // h as the products read it.
  SK_DEVICE S seen(S h, const Options& e) const {
    return operand(Cell::kOptions ? narrow<S>(recurrent_input(e, widen(h))) : h, true);
  }
  SK_DEVICE S seen_at_start(S h, int64_t of_state) const {
    return operand(Cell::kOptions ? narrow<S>(this->factor(of_state) * widen(h)) : h, true);
  }
  SK_DEVICE void step(int at_stage, int64_t link, const float (&product)[kGates], const float (&bias)[kGates],
                      const Options& e, float& h, float (&c)[kArray], float (&saved)[Cell::kSaved]) const {
    const bool anew = is_reset(link);
    float of_x[kGates], of_h[kGates];
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const float x = ring[at_stage + gate * kThreads];
      of_x[gate] = x;
      of_h[gate] = anew ? 0.0f : product[gate];
      if (Cell::kSeparate) of_h[gate] += bias[gate];
    }
    if (anew) {
      h = 0.0f;
      SK_UNROLL
      for (int k = 0; k < kArray; ++k) c[k] = 0.0f;
    }
    h = zoneout_h(e, h, Cell::forward(of_x, of_h, e, h, c, saved));
  }
  // Cells with two products in a row: q, the input of the second product; then the rest of the step.
  SK_DEVICE S first(int at_stage, int64_t link, const float (&product)[Cell::kFirst], const Options& e, float& h,
                    float& carried, float (&saved)[Cell::kSaved]) const {
    const bool anew = is_reset(link);
    float of_x[Cell::kFirst], of_h[Cell::kFirst];
    SK_UNROLL
    for (int gate = 0; gate < Cell::kFirst; ++gate) {
      const float x = ring[at_stage + gate * kThreads];
      of_x[gate] = x;
      of_h[gate] = anew ? 0.0f : product[gate];
    }
    if (anew) h = 0.0f;
    float q, none[kArray] = {};
    Cell::forward_first(of_x, of_h, e, h, none, saved, &q, &carried);
    return operand(narrow<S>(q), true);
  }
  SK_DEVICE void second(int at_stage, int64_t link, float product, const Options& e, float carried, float& h,
                        float (&saved)[Cell::kSaved]) const {
    const bool anew = is_reset(link);
    const float x = ring[at_stage + Cell::kFirst * kThreads], of_q = anew ? 0.0f : product;
    if (anew) h = 0.0f;
    float none[kArray] = {};
    h = zoneout_h(e, h, Cell::forward_second(&x, &of_q, e, h, &carried, none, saved + Cell::kSavedFirst));
  }
  // Stores the results of a step.
  SK_DEVICE void store_step(int64_t link, bool last, int64_t sequence, S h, const float (&c)[kArray],
                            const float (&saved)[Cell::kSaved]) const {
    const int64_t row = link & ~kResetFlag, out = output(row);
    global<S>(layer.y, layer.outputs())[out] = h;
    SK_UNROLL
    for (int k = 0; k < kCells; ++k) {
      if (layer.cells[k] == nullptr) continue;
      store<Cache::kStreaming>(global<S>(layer.cells[k], layer.outputs()), out, narrow<S>(c[k]));
    }
    if (layer.saved != nullptr && layer.saved_width > 0) {
      const Global<S> to = global<S>(layer.saved, saved_size()) + this->Base::saved(row);
      SK_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) store<Cache::kStreaming>(to, k * layer.H, narrow<S>(saved[k]));
    }
    if (last && args.h_n != nullptr) {
      global<S>(args.h_n, layer.states())[state(sequence)] = h;
      SK_UNROLL
      for (int k = 0; k < kCells; ++k) {
        if (args.c_n[k] != nullptr) global<S>(args.c_n[k], layer.states())[state(sequence)] = narrow<S>(c[k]);
      }
    }
  }
};

// ---- backward ----

// Position of a sequence in the backward loop.
template <int kCells>
struct BackwardState {
  float dc[kCells] = {},
        direct = 0.0f;  // gradients of the states of the next row to process; direct: except through the product
  bool cut = true;      // no gradient arrives through the product
  int64_t at = kNone, before = kNone;  // row of this step, and its link to the row before
};

template <class Cell>
struct BackwardUnit : Unit<Cell> {
  using Base = Unit<Cell>;
  using Base::direction, Base::kArray, Base::kCells, Base::kGates, Base::layer, Base::links, Base::output, Base::saved,
      Base::saved_size, Base::state, Base::unit;
  using typename Base::Options, typename Base::S;
  const PersistentBackwardArgs& args;

  using State = BackwardState<kArray>;
  struct Read {  // of a row
    float saved[Cell::kSaved] = {}, dy = 0.0f, h_prev = 0.0f;
    float dcells[kArray] = {}, c[kArray] = {}, c_prev[kArray] = {};
    int64_t ahead = kNone;
    uint32_t masks = 0;
  };

  SK_DEVICE BackwardUnit(const PersistentBackwardArgs& of, int of_direction, int of_unit)
      : Base(of.layer, of_direction, of_unit), args(of) {}

  SK_DEVICE int64_t link_of(int64_t row) const {
    if (row < 0 || row >= layer.rows) return kNone;
    const Link link = links[row];
    return link.prev;
  }
  SK_DEVICE void start(int64_t sequence, State& from) const {
    const Link link = links[layer.rows + sequence];
    from.at = link.last == kNone ? layer.rows + sequence : link.last;
    from.before = link_of(from.at);
    from.direct = value_at<S>(args.dh_n, state(sequence), layer.states());
    SK_UNROLL
    for (int k = 0; k < kCells; ++k) from.dc[k] = value_at<S>(args.dc_n[k], state(sequence), layer.states());
  }
  // Loads the operands of a step before the product, to hide their latency.
  SK_DEVICE void read(const State& of, int64_t sequence, int lane, Read& to) const {
    if (of.at < 0 || of.at >= layer.rows) return;
    const int64_t out = output(of.at), prev = of.before & ~kResetFlag, prev_out = output(prev);
    const bool anew = is_reset(of.before), initial = prev >= layer.rows;
    const auto previous = [&](const void* every, const void* start) {
      if (anew) return 0.0f;
      return initial ? value_at<S>(start, state(sequence), layer.states())
                     : value_at<S>(every, prev_out, layer.outputs());
    };
    to.ahead = link_of(prev);
    to.masks = this->masks(of.at);
    if (!initial && lane % kUnits == 0) {  // one lane prefetches the 16 bytes or more of a row's strip
      this->ask_for_masks(prev);
      if (args.dy != nullptr) prefetch_l2(global<const S>(args.dy, layer.outputs()), prev_out);
      if (layer.saved_width > 0) {
        SK_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) {
          prefetch_l2(global<const S>(layer.saved, saved_size()), saved(prev) + k * layer.H);
        }
      }
    }
    to.dy = value_at<S>(args.dy, out, layer.outputs());
    SK_UNROLL
    for (int k = 0; k < kCells; ++k) {
      to.dcells[k] = value_at<S>(args.dcells[k], out, layer.outputs());
      to.c[k] = value_at<S>(layer.cells[k], out, layer.outputs());
      to.c_prev[k] = previous(layer.cells[k], layer.c0[k]);
    }
    if (Cell::kReadsH) to.h_prev = previous(layer.y, layer.h0);
    SK_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k) {
      to.saved[k] = layer.saved_width == 0 ? value_at<S>(layer.y, out, layer.outputs())
                                           : value_at<S>(layer.saved, saved(of.at) + k * layer.H, saved_size());
    }
  }
  // by_x, by_h: gradients of the gates.
  SK_DEVICE void step(State& of, int64_t sequence, const Read& read, float product, float (&by_x)[kGates],
                      float (&by_h)[kGates]) const {
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) by_x[gate] = by_h[gate] = 0.0f;
    float dh, kept;
    Options options;
    if (!gather(of, sequence, read, product, options, dh, kept)) return;
    StepGradient<float> step;
    Cell::backward(read.saved, options, read.h_prev, read.c, read.c_prev, dh, of.dc, step);
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      by_x[gate] = step.x[gate];
      by_h[gate] = Cell::kSeparate ? step.h[gate] : step.x[gate];
    }
    of.direct = Cell::kOptions ? step.direct + kept : step.direct;
    if constexpr (Cell::kOptions && Cell::kPeepholes > 0) store_peepholes(of.at, step.peephole);
  }
  // Cells with two products in a row: the gradient of the last gate and, partially, of the others; then, with the
  // product of the last gate's gradient, the rest of the others.
  SK_DEVICE void second(State& of, int64_t sequence, const Read& read, float product, float (&by)[kGates]) const {
    SK_UNROLL
    for (int gate = 0; gate < kGates; ++gate) by[gate] = 0.0f;
    float dh, kept;
    Options options;
    if (!gather(of, sequence, read, product, options, dh, kept)) return;
    Cell::backward_second(read.saved, options, read.h_prev, read.c, read.c_prev, dh, of.dc, by, by + Cell::kFirst,
                          of.direct);
    of.direct += kept;
  }
  SK_DEVICE void first(State& of, int64_t sequence, const Read& read, float product, float (&by)[kGates]) const {
    if (of.at < 0 || of.at >= layer.rows) return;
    float q;
    Cell::backward_first(read.saved, this->options(read.masks, of.at, sequence), read.h_prev, read.c_prev, &product,
                         of.dc, by, of.direct, &q);
    if (args.q != nullptr) {
      store<Cache::kStreaming>(global<S>(args.q, layer.directions * layer.rows * layer.H),
                               (direction * layer.rows + of.at) * layer.H + unit, narrow<S>(q));
    }
  }
  // Stores the gradients and moves to the row before.
  SK_DEVICE void store_step(State& of, int64_t ahead, const float (&by_x)[kGates], const float (&by_h)[kGates]) const {
    if (of.at >= 0 && of.at < layer.rows) {
      const int64_t size = layer.directions * layer.rows * kGates * layer.H;
      const int64_t to = (direction * layer.rows + of.at) * (kGates * layer.H) + unit;
      SK_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        global<S>(args.dgates_x, size)[to + gate * layer.H] = narrow<S>(by_x[gate]);
        if (Cell::kSeparate) global<S>(args.dgates_h, size)[to + gate * layer.H] = narrow<S>(by_h[gate]);
      }
      of.cut = is_reset(of.before);
      of.at = of.before & ~kResetFlag;
      of.before = ahead;
      if (of.cut) {
        of.direct = 0.0f;
        SK_UNROLL
        for (int k = 0; k < kArray; ++k) of.dc[k] = 0.0f;
      }
    } else {
      of.at = kNone;
    }
  }

 private:
  // The gradient of the row's h, without the share kept by zoneout. Returns false without a row; gradients of the
  // initial states are stored.
  SK_DEVICE bool gather(State& of, int64_t sequence, const Read& read, float product, Options& options, float& dh,
                        float& kept) const {
    if (Cell::kOptions && !of.cut) product *= this->factor(state(sequence));
    dh = (of.cut ? 0.0f : product) + of.direct;
    kept = 0.0f;
    if (of.at >= layer.rows) {
      if (args.dh0 != nullptr) global<S>(args.dh0, layer.states())[state(sequence)] = narrow<S>(dh);
      SK_UNROLL
      for (int k = 0; k < kCells; ++k) {
        if (args.dc0[k] != nullptr) global<S>(args.dc0[k], layer.states())[state(sequence)] = narrow<S>(of.dc[k]);
      }
      return false;
    }
    if (of.at < 0) return false;
    SK_UNROLL
    for (int k = 0; k < kCells; ++k) of.dc[k] += read.dcells[k];
    dh += read.dy;
    if constexpr (Cell::kOptions) {
      options = this->options(read.masks, of.at, sequence);
      kept = dh * options.zoneout_h;
      dh -= kept;
    }
    return true;
  }
  SK_DEVICE void store_peepholes(int64_t row, const float (&gradients)[3]) const {
    if (args.dpeephole == nullptr) return;
    const Global<float> to = global<float>(args.dpeephole, layer.directions * layer.rows * Cell::kPeepholes * layer.H);
    SK_UNROLL
    for (int k = 0; k < Cell::kPeepholes; ++k) {
      store<Cache::kStreaming>(to, ((direction * layer.rows + row) * Cell::kPeepholes + k) * layer.H + unit,
                               gradients[k]);
    }
  }
};

}  // namespace seqkernels::cuda
