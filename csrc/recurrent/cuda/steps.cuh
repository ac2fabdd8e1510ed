// One step of a layer on a GPU, forward and backward: the recurrent product and the cell in one kernel.
//
// A block owns 8 hidden units (all their gates) of up to 64 sequences of one direction. Its warps split the recurrent
// product along K, which suits few sequences: each warp streams its part of the weights. Partial sums are stored in
// shared memory and added in the order of the warps; then the cell runs on them.
//
// The product reads h, or the gradients of the gates, in fragment order from one of two slots; the cell writes the
// other slot, which the next step reads. Both slots start with the initial states, so a sequence may start at any step.
#pragma once

#include "recurrent/cuda/arithmetic.cuh"
#include "recurrent/cuda/products.cuh"

namespace seqkernels::cuda {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarp;
constexpr int kUnits = 8;      // units per block: one strip of the product
constexpr int kTileRows = 16;  // rows of a matrix instruction
constexpr int kStepTiles = 4;  // tiles per block, at most

// Arguments shared by all kernels of a layer.
struct LayerArgs {
  int64_t rows, B, H;
  int directions;
  bool tf32;
  const Link* links;          // [directions, rows + B], or null for a single step, see link_of
  const void* h0;             // [directions, B, H] or null
  const void* c0[kMaxCells];  // the same, each
  const void* bias_h[2];      // [G * H] bias of the recurrent product, in cells whose products have separate gradients
  const void* peephole[2];    // [kPeepholes * H] or null
  const void* variational;    // [directions, B, H] or null
  const uint8_t *zoneout_h, *zoneout_c, *candidate;  // [rows, directions * H] or null
  double zoneout_h_rate, zoneout_c_rate, candidate_scale, cell_clip, gate_clip;
  double sigmoid_low, sigmoid_high, tanh_high;  // activations at -gate_clip and gate_clip
  int64_t saved_width;
  void* y;                 // [rows, directions * H]
  void* cells[kMaxCells];  // the same each, or null
  void* saved;             // [directions, rows, saved_width], or null

  SK_HOST_DEVICE int64_t link_count() const { return directions * (rows + B); }
  SK_HOST_DEVICE int64_t states() const { return directions * B * H; }
  SK_HOST_DEVICE int64_t outputs() const { return rows * directions * H; }
};

// The rows of a step: for direction d, count[d] rows from first[d], one for each of the first count[d] sequences.
struct StepRows {
  int64_t first[2], count[2];
};

// The link of a row. A dense layer of one step has no links in memory: each row is the first and last of its sequence.
SK_DEVICE Link link_of(const LayerArgs& layer, int direction, int64_t row) {
  if (layer.links != nullptr) {
    return global<const Link>(layer.links, layer.link_count())[direction * (layer.rows + layer.B) + row];
  }
  if (row < layer.rows) return {layer.rows + row, kNone, row, kNone};
  const int64_t sequence = row - layer.rows;
  return {1, sequence, sequence, sequence};
}

template <class S>
struct UnitOfRow {  // one unit of one row
  const LayerArgs& layer;
  int direction;
  int64_t row, unit;
  Link link;

  SK_DEVICE int64_t state() const { return (direction * layer.B + link.sequence) * layer.H + unit; }  // in h0, h_n
  SK_DEVICE int64_t output(int64_t of_row) const {  // in y, cells and the masks
    return (of_row * layer.directions + direction) * layer.H + unit;
  }
  SK_DEVICE int64_t saved(int k) const {
    return (direction * layer.rows + row) * layer.saved_width + k * layer.H + unit;
  }
  SK_DEVICE Compute<S> state_at(const void* from) const {  // [directions, B, H], or null: zeros
    if (from == nullptr) return Compute<S>(0);
    const S value = global<const S>(from, layer.states())[state()];
    return widen(value);
  }
  // A state before this row, from the states of every row or the initial states.
  SK_DEVICE Compute<S> before(const void* every, const void* initial) const {
    if (is_reset(link.prev)) return Compute<S>(0);
    if (link.prev >= layer.rows) return state_at(initial);
    const S value = global<const S>(every, layer.outputs())[output(link.prev)];
    return widen(value);
  }
  // The mask values of this row, a byte each, loaded early to hide the latency; and all options of this row.
  SK_DEVICE uint32_t masks() const {
    const int64_t at = output(row);
    uint32_t bytes = 0;
    const auto take = [&](const uint8_t* mask, int byte) {
      if (mask == nullptr) return;
      const uint8_t value = load<Cache::kReadOnly>(global<const uint8_t>(mask, layer.outputs()), at);
      bytes |= static_cast<uint32_t>(value) << 8 * byte;
    };
    take(layer.zoneout_h, 0);
    take(layer.zoneout_c, 1);
    take(layer.candidate, 2);
    return bytes;
  }
  template <int kPeepholes>
  SK_DEVICE UnitOptions<ScalarArithmetic<S>> options(uint32_t masks) const {
    using T = Compute<S>;
    UnitOptions<ScalarArithmetic<S>> e;
    const auto mask = [&](const uint8_t* of, int byte, double otherwise) {
      return of == nullptr ? static_cast<T>(otherwise) : static_cast<T>(masks >> 8 * byte & 0xff);
    };
    e.zoneout_h = mask(layer.zoneout_h, 0, layer.zoneout_h_rate);
    e.zoneout_c = mask(layer.zoneout_c, 1, layer.zoneout_c_rate);
    e.candidate =
        layer.candidate == nullptr ? T(1) : mask(layer.candidate, 2, 1) * static_cast<T>(layer.candidate_scale);
    e.recurrent = layer.variational == nullptr ? T(1) : state_at(layer.variational);
    e.cell_clip = static_cast<T>(layer.cell_clip);
    e.gate_clip = static_cast<T>(layer.gate_clip);
    e.sigmoid_low = static_cast<T>(layer.sigmoid_low);
    e.sigmoid_high = static_cast<T>(layer.sigmoid_high);
    e.tanh_high = static_cast<T>(layer.tanh_high);
    const void* weights = layer.peephole[direction];
    SK_UNROLL
    for (int k = 0; k < 3; ++k) {
      e.peephole[k] = T(0);
      if (k < kPeepholes && weights != nullptr) {
        e.peephole[k] =
            widen(load<Cache::kReadOnly>(global<const S>(weights, kPeepholes * layer.H), k * layer.H + unit));
      }
    }
    return e;
  }
};

// ---- the product of a step ----

// partial[warp][row][kN * 8]: the part of A B^T over the blocks of K of each warp.
template <Arithmetic kHow, class S, int kN>
SK_OUTLINE void step_product(Global<const S> a, int64_t tile_size, int tiles, Global<const S> b, int64_t strip_size,
                             int64_t blocks, Shared<Compute<S>> partial) {
  using T = Compute<S>;
  T sum[kStepTiles][kN][4] = {};
  for (int64_t i = warp_index(); i < blocks; i += kStepWarps) {
    add_block<kHow, S>(sum, tiles, a + i * 2 * kBlockSize<S>, tile_size, b + i * kBlockSize<S>, strip_size);
  }
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const Shared<T> to = partial + warp_index() * tiles * kTileRows * kN * kUnits;
  SK_UNROLL
  for (int m = 0; m < kStepTiles; ++m) {
    if (m >= tiles) continue;
    SK_UNROLL
    for (int n = 0; n < kN; ++n) {
      SK_UNROLL
      for (int r = 0; r < 2; ++r) {
        store_vec(to, ((m * kTileRows + r * 8 + g) * kN + n) * kUnits + 2 * t,
                  Vec<T, 2>{{sum[m][n][2 * r], sum[m][n][2 * r + 1]}});
      }
    }
  }
}

// The operands of a step's product: slots and packed weights, both in fragment order.
struct StepOperands {
  const void* slots;    // [directions, tiles of 16 sequences, slot_blocks, 2, 32] pieces
  const void* weights;  // [directions, strips of 8 units, weight_blocks, 32] pieces
  int64_t tiles, slot_blocks, weight_blocks;
  int64_t slot_first, weight_first;  // block
  int64_t blocks;                    // of K
  int64_t strip;                     // distance between the blocks of two gates
};

template <class S, int kN>
SK_DEVICE void make_product(const LayerArgs& layer, const StepOperands& of, int64_t tile0, int tiles,
                            Shared<Compute<S>> partial) {
  const int64_t direction = block_index_z(), strips = (layer.H + kUnits - 1) / kUnits;
  const Global<const S> a =
      global<const S>(of.slots, layer.directions * of.tiles * of.slot_blocks * 2 * kBlockSize<S>) +
      ((direction * of.tiles + tile0) * of.slot_blocks + of.slot_first) * 2 * kBlockSize<S>;
  const Global<const S> b = global<const S>(of.weights, layer.directions * strips * of.weight_blocks * kBlockSize<S>) +
                            ((direction * strips + block_index()) * of.weight_blocks + of.weight_first) * kBlockSize<S>;
  const int64_t tile_size = of.slot_blocks * 2 * kBlockSize<S>, strip_size = of.strip * kBlockSize<S>;
  if constexpr (sizeof(S) == 2) {
    step_product<Arithmetic::kMatrix, S, kN>(a, tile_size, tiles, b, strip_size, of.blocks, partial);
  } else {
    if constexpr (sizeof(S) == 4) {
      if (layer.tf32) {
        step_product<Arithmetic::kMatrix, S, kN>(a, tile_size, tiles, b, strip_size, of.blocks, partial);
        return;
      }
    }
    step_product<Arithmetic::kExact, S, kN>(a, tile_size, tiles, b, strip_size, of.blocks, partial);
  }
}

// The sum over warps for (row in the block, strip, unit in the block).
template <class T, int kN>
struct Partial {
  Shared<T> sums;
  int rows;
  SK_DEVICE T operator()(int row, int strip, int unit) const {
    T sum = T(0);
    SK_UNROLL
    for (int w = 0; w < kStepWarps; ++w) {
      const T value = sums[((w * rows + row) * kN + strip) * kUnits + unit];
      sum = w == 0 ? value : sum + value;
    }
    return sum;
  }
};

// Offset of a sequence's (gate, unit) in a slot.
template <class S>
SK_DEVICE int64_t slot_place(const StepOperands& of, int direction, int64_t sequence, int64_t block, int64_t unit) {
  return ((direction * of.tiles + sequence / kTileRows) * of.slot_blocks + block) * 2 * kBlockSize<S> +
         sequence % kTileRows / 8 * kBlockSize<S> + place_in_tile<S>(sequence % 8, unit);
}

// ---- forward ----

struct ForwardStepArgs {
  LayerArgs layer;
  StepRows visit;
  const void* from_x;  // [directions, from_x_rows, G * H] of the compute type: x W_ih^T with its biases
  int64_t from_x_rows, from_x_first[2];  // the row of the layer that its first row corresponds to
  StepOperands product;                  // of the first or the second stage
  void* slots_out;                       // like product.slots: h as the products read it (first of two stages: q)
  // Precomputed product: [directions, from_h_rows, gates * H], starting at the visited rows; null: zeros.
  const void* from_h;
  int64_t from_h_rows;
  void* c[kMaxCells];    // [directions, B, H] each, of the compute type, or null: read from `cells`
  void* carried;         // [directions, B, H] of the compute type: passed from the first to the second stage
  void* q;               // [directions, from_h_rows, H] or null: q, starting at the visited rows
  void* h_n;             // [directions, B, H] or null
  void* c_n[kMaxCells];  // the same, each
  bool leaves_states;    // false: only `saved` is written
};

// One stage of a cell for one unit of a row. product: the recurrent products of its gates.
template <class Cell, bool kSecond>
SK_DEVICE void forward_unit(const ForwardStepArgs& args, const UnitOfRow<typename Cell::Storage>& row_unit,
                            int64_t visited, const Compute<typename Cell::Storage>* product) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  constexpr bool kStages = Cell::kFirst < Cell::kGates;
  constexpr int kGate = kSecond ? Cell::kFirst : 0, kGates = kSecond ? Cell::kGates - Cell::kFirst : Cell::kFirst;
  const LayerArgs& layer = args.layer;
  const int d = row_unit.direction;
  T x[kGates], h[kGates], saved[Cell::kSaved];
  const Global<const T> from_x =
      global<const T>(args.from_x, layer.directions * args.from_x_rows * Cell::kGates * layer.H);
  const int64_t x_at =
      ((d * args.from_x_rows + row_unit.row - args.from_x_first[d]) * Cell::kGates + kGate) * layer.H + row_unit.unit;
  SK_UNROLL
  for (int g = 0; g < kGates; ++g) {
    x[g] = load<Cache::kStreaming>(from_x, x_at + g * layer.H);
    h[g] = is_reset(row_unit.link.prev) ? T(0) : product[g];  // after a reset the states are zero
    if (Cell::kSeparate && layer.bias_h[d] != nullptr) {
      h[g] += widen(load<Cache::kReadOnly>(global<const S>(layer.bias_h[d], Cell::kGates * layer.H),
                                           (kGate + g) * layer.H + row_unit.unit));
    }
  }
  const UnitOptions<typename Cell::Arithmetic> e = row_unit.template options<Cell::kPeepholes>(row_unit.masks());
  T h_prev = T(0);
  if (Cell::kPassesH || e.zoneout_h != T(0)) h_prev = row_unit.before(layer.y, layer.h0);
  const auto keep = [&](int first, int count) {
    if (layer.saved == nullptr || layer.saved_width == 0) return;
    const Global<S> to = global<S>(layer.saved, layer.directions * layer.rows * layer.saved_width);
    SK_UNROLL
    for (int k = 0; k < count; ++k) to[row_unit.saved(first + k)] = narrow<S>(saved[k]);
  };
  const int64_t state = row_unit.state();
  T hidden = T(0), c[Cell::kCellArray] = {};
  if constexpr (kStages && !kSecond) {
    static_assert(Cell::kFactors == 1 && Cell::kCarried == 1, "one input of the second product, one carried value");
    T q_carried[2];
    Cell::forward_first(x, h, e, h_prev, c, saved, q_carried, q_carried + 1);
    const T q = q_carried[0];
    keep(0, Cell::kSavedFirst);
    if (args.carried != nullptr) global<T>(args.carried, layer.states())[state] = q_carried[1];
    if (args.slots_out != nullptr) {
      const StepOperands& of = args.product;
      global<S>(args.slots_out, layer.directions * of.tiles * of.slot_blocks * 2 *
                                    kBlockSize<S>)[slot_place<S>(of, d, row_unit.link.sequence, 0, row_unit.unit)] =
          operand(narrow<S>(q), layer.tf32);
    }
    if (args.q != nullptr) {
      global<S>(args.q, layer.directions * args.from_h_rows *
                            layer.H)[(d * args.from_h_rows + visited) * layer.H + row_unit.unit] = narrow<S>(q);
    }
    return;
  } else if constexpr (kStages) {
    T carried;
    if (args.carried != nullptr) {
      carried = load<Cache::kDefault>(global<const T>(args.carried, layer.states()), state);
    } else {  // recomputation needs only the saved values
      carried = T(0);
    }
    hidden = Cell::forward_second(x, h, e, h_prev, &carried, c, saved);
    keep(Cell::kSavedFirst, Cell::kSaved - Cell::kSavedFirst);
  } else {
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) {
      if (args.c[k] == nullptr) {
        c[k] = row_unit.before(layer.cells[k], layer.c0[k]);
      } else if (!is_reset(row_unit.link.prev)) {
        c[k] = load<Cache::kDefault>(global<const T>(args.c[k], layer.states()), state);
      }
    }
    hidden = Cell::forward(x, h, e, h_prev, c, saved);
    keep(0, Cell::kSaved);
  }
  if (!args.leaves_states) return;
  const S h_now = narrow<S>(zoneout_h(e, h_prev, hidden));
  SK_UNROLL
  for (int k = 0; k < Cell::kCells; ++k) {
    if (args.c[k] != nullptr) global<T>(args.c[k], layer.states())[state] = c[k];
    if (layer.cells[k] != nullptr)
      global<S>(layer.cells[k], layer.outputs())[row_unit.output(row_unit.row)] = narrow<S>(c[k]);
  }
  global<S>(layer.y, layer.outputs())[row_unit.output(row_unit.row)] = h_now;
  if (args.slots_out != nullptr) {
    const StepOperands& of = args.product;
    const S fed = layer.variational == nullptr ? h_now : narrow<S>(recurrent_input(e, widen(h_now)));
    global<S>(args.slots_out, layer.directions * of.tiles * of.slot_blocks * 2 *
                                  kBlockSize<S>)[slot_place<S>(of, d, row_unit.link.sequence, 0, row_unit.unit)] =
        operand(fed, layer.tf32);
  }
  if (row_unit.link.next == kNone && args.h_n != nullptr) {
    global<S>(args.h_n, layer.states())[state] = h_now;
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) {
      if (args.c_n[k] != nullptr) global<S>(args.c_n[k], layer.states())[state] = narrow<S>(c[k]);
    }
  }
}

// Grid: strips of 8 units x groups of sequences x directions.
template <class Cell, bool kSecond>
SK_KERNEL(kStepThreads, 2)
forward_step_kernel(const SK_GRID_CONSTANT ForwardStepArgs args, int row_tiles) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  constexpr int kN = kSecond ? Cell::kGates - Cell::kFirst : Cell::kFirst;
  const LayerArgs& layer = args.layer;
  const int d = static_cast<int>(block_index_z());
  const int64_t sequence0 = block_index_y() * row_tiles * kTileRows, count = args.visit.count[d] - sequence0;
  if (count <= 0) return;
  const int64_t needed = (count + kTileRows - 1) / kTileRows;
  const int tiles = needed < row_tiles ? static_cast<int>(needed) : row_tiles, rows = tiles * kTileRows;
  SharedArena arena;
  const Shared<T> sums = arena.array<T>(kStepWarps * row_tiles * kTileRows * kN * kUnits);
  make_product<S, kN>(layer, args.product, sequence0 / kTileRows, tiles, sums);
  block_sync();
  const Partial<T, kN> partial{sums, rows};
  const Global<const Link> links = global<const Link>(layer.links, layer.link_count());
  for (int i = thread_index(); i < rows * kUnits; i += kStepThreads) {
    const int in_block = i / kUnits, in_strip = i % kUnits;
    const int64_t unit = block_index() * kUnits + in_strip;
    if (in_block >= count || unit >= layer.H) continue;
    const int64_t row = args.visit.first[d] + sequence0 + in_block;
    const Link link = links[d * (layer.rows + layer.B) + row];
    if (link.prev == kNone) continue;
    T product[kN];
    SK_UNROLL
    for (int n = 0; n < kN; ++n) product[n] = partial(in_block, n, in_strip);
    forward_unit<Cell, kSecond>(args, UnitOfRow<S>{layer, d, row, unit, link}, 0, product);
  }
}

// The cell alone, on products in memory: for a single step, and to recompute saved values for backward.
// Grid: rows and their units x directions.
template <class Cell, bool kSecond>
SK_KERNEL(kStepThreads)
forward_rows_kernel(const SK_GRID_CONSTANT ForwardStepArgs args) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  constexpr int kN = kSecond ? Cell::kGates - Cell::kFirst : Cell::kFirst;
  const LayerArgs& layer = args.layer;
  const int d = static_cast<int>(block_index_y());
  const Global<const T> from_h =
      global<const T>(args.from_h, args.from_h == nullptr ? 0 : layer.directions * args.from_h_rows * kN * layer.H);
  for (int64_t i = grid_thread_index(); i < args.visit.count[d] * layer.H; i += grid_threads()) {
    const int64_t visited = i / layer.H, unit = i % layer.H, row = args.visit.first[d] + visited;
    const Link link = link_of(layer, d, row);
    if (link.prev == kNone) continue;
    T product[kN] = {};
    if (from_h) {
      SK_UNROLL
      for (int n = 0; n < kN; ++n) {
        product[n] = load<Cache::kStreaming>(from_h, ((d * args.from_h_rows + visited) * kN + n) * layer.H + unit);
      }
    }
    forward_unit<Cell, kSecond>(args, UnitOfRow<S>{layer, d, row, unit, link}, visited, product);
  }
}

// ---- backward ----

struct BackwardStepArgs {
  LayerArgs layer;
  StepRows visit;                      // rows from layer.rows on: the initial states
  const void *dy, *dcells[kMaxCells];  // like y, or null
  const void *dh_n, *dc_n[kMaxCells];  // [directions, B, H] or null
  StepOperands product;       // dgates W_hh of the following step; second launch of two stages: the gradient of q
  const void* to_h;           // precomputed product: [directions, B, H] of the compute type
  void* slots_out;            // like product.slots: gradients of the gates, as the products read them; or null
  void *dgates_x, *dgates_h;  // [directions, rows, G * H]; one buffer if they are equal
  void* q;                    // [directions, rows, H], with two stages
  // [directions, B, H] of the compute type. In: gradient of this row's cell; out: of the cell before. Null: the result
  // is written to dc0.
  void* dc[kMaxCells];
  void* direct;                // likewise, the gradient of h except through the product; or null
  void* partial_gates;         // [directions, B, kFirst * H] of the compute type, between the two launches
  void* dpeephole;             // [directions, rows, kPeepholes * H] of the compute type or null
  void *dh0, *dc0[kMaxCells];  // [directions, B, H] or null
  // Initial states: this launch processes sequences whose first step wrote the slot of this parity, since in backward
  // the first step of a sequence may precede the last launch.
  int parity;
  int64_t last_step;  // T - 1
};

template <class Cell>
SK_DEVICE void put_gates(const BackwardStepArgs& args, const UnitOfRow<typename Cell::Storage>& row_unit, int gate,
                         Compute<typename Cell::Storage> by_x, Compute<typename Cell::Storage> by_h) {
  using S = typename Cell::Storage;
  const LayerArgs& layer = args.layer;
  const int64_t at = ((row_unit.direction * layer.rows + row_unit.row) * Cell::kGates + gate) * layer.H + row_unit.unit;
  const int64_t size = layer.directions * layer.rows * Cell::kGates * layer.H;
  const S of_h = narrow<S>(by_h);
  global<S>(args.dgates_x, size)[at] = narrow<S>(by_x);
  if (Cell::kSeparate) global<S>(args.dgates_h, size)[at] = of_h;
  if (args.slots_out == nullptr) return;
  const StepOperands& of = args.product;
  global<S>(args.slots_out, layer.directions * of.tiles * of.slot_blocks * 2 * kBlockSize<S>)[slot_place<S>(
      of, row_unit.direction, row_unit.link.sequence, gate * blocks_of<S>(layer.H), row_unit.unit)] =
      operand(of_h, layer.tf32);
}

template <class Cell>
SK_DEVICE void backward_unit(const BackwardStepArgs& args, const UnitOfRow<typename Cell::Storage>& row_unit,
                             Compute<typename Cell::Storage> product) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  constexpr bool kStages = Cell::kFirst < Cell::kGates;
  constexpr int kArray = Cell::kCellArray;
  const LayerArgs& layer = args.layer;
  const int64_t state = row_unit.state(), out = row_unit.output(row_unit.row);
  const auto of_state = [&](const void* from, int64_t at, int64_t count) {
    return from == nullptr ? T(0) : widen(load<Cache::kDefault>(global<const S>(from, count), at));
  };
  const auto carried = [&](const void* from) {
    return from == nullptr ? T(0) : load<Cache::kDefault>(global<const T>(from, layer.states()), state);
  };
  T dh = T(0), dc[kArray] = {};
  if (row_unit.link.next == kNone) {  // the last step of a sequence
    dh = of_state(args.dh_n, state, layer.states());
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) dc[k] = of_state(args.dc_n[k], state, layer.states());
  } else if (!is_reset(row_unit.link.next)) {
    dh = layer.variational == nullptr ? product : product * row_unit.state_at(layer.variational);
    dh += carried(args.direct);
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) dc[k] = carried(args.dc[k]);
  }
  if (row_unit.row >= layer.rows) {  // initial states
    if (args.dh0 != nullptr) global<S>(args.dh0, layer.states())[state] = narrow<S>(dh);
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) {
      if (args.dc0[k] != nullptr) global<S>(args.dc0[k], layer.states())[state] = narrow<S>(dc[k]);
    }
    return;
  }
  const UnitOptions<typename Cell::Arithmetic> e = row_unit.template options<Cell::kPeepholes>(row_unit.masks());
  dh += of_state(args.dy, out, layer.outputs());
  T c[kArray] = {}, c_prev[kArray] = {}, h_prev = T(0), saved[Cell::kSaved];
  SK_UNROLL
  for (int k = 0; k < Cell::kCells; ++k) {
    dc[k] += of_state(args.dcells[k], out, layer.outputs());
    c[k] = of_state(layer.cells[k], out, layer.outputs());
    c_prev[k] = row_unit.before(layer.cells[k], layer.c0[k]);
  }
  if (Cell::kReadsH) h_prev = row_unit.before(layer.y, layer.h0);
  if (layer.saved_width == 0) {
    saved[0] = of_state(layer.y, out, layer.outputs());
  } else {
    const Global<const S> from = global<const S>(layer.saved, layer.directions * layer.rows * layer.saved_width);
    SK_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = widen(load<Cache::kDefault>(from, row_unit.saved(k)));
  }
  const T kept_h = dh * e.zoneout_h;
  dh = dh - kept_h;
  T direct;
  if constexpr (kStages) {
    T d[Cell::kFirst] = {}, last[1];
    Cell::backward_second(saved, e, h_prev, c, c_prev, dh, dc, d, last, direct);
    put_gates<Cell>(args, row_unit, Cell::kFirst, last[0], last[0]);
    const Global<T> to = global<T>(args.partial_gates, layer.states() * Cell::kFirst);
    SK_UNROLL
    for (int g = 0; g < Cell::kFirst; ++g) to[state * Cell::kFirst + g] = d[g];
  } else {
    StepGradient<T> step;
    Cell::backward(saved, e, h_prev, c, c_prev, dh, dc, step);
    SK_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      put_gates<Cell>(args, row_unit, g, step.x[g], Cell::kSeparate ? step.h[g] : step.x[g]);
    direct = step.direct;
    SK_UNROLL
    for (int k = 0; k < Cell::kCells; ++k) {
      if (args.dc[k] != nullptr) {
        global<T>(args.dc[k], layer.states())[state] = dc[k];
      } else if (args.dc0[k] != nullptr) {
        global<S>(args.dc0[k], layer.states())[state] = narrow<S>(dc[k]);
      }
    }
    if constexpr (Cell::kPeepholes > 0) {
      if (args.dpeephole != nullptr) {
        const Global<T> to = global<T>(args.dpeephole, layer.directions * layer.rows * Cell::kPeepholes * layer.H);
        SK_UNROLL
        for (int k = 0; k < Cell::kPeepholes; ++k) {
          to[((row_unit.direction * layer.rows + row_unit.row) * Cell::kPeepholes + k) * layer.H + row_unit.unit] =
              step.peephole[k];
        }
      }
    }
  }
  if (args.direct != nullptr) global<T>(args.direct, layer.states())[state] = direct + kept_h;
}

// The second launch of a cell with two stages. product: the gradient of q.
template <class Cell>
SK_DEVICE void backward_first_unit(const BackwardStepArgs& args, const UnitOfRow<typename Cell::Storage>& row_unit,
                                   Compute<typename Cell::Storage> product) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  const LayerArgs& layer = args.layer;
  const int64_t state = row_unit.state();
  const UnitOptions<typename Cell::Arithmetic> e = row_unit.template options<Cell::kPeepholes>(row_unit.masks());
  T saved[Cell::kSavedFirst], d[Cell::kFirst], q, none[Cell::kCellArray] = {};
  const Global<const S> from = global<const S>(layer.saved, layer.directions * layer.rows * layer.saved_width);
  SK_UNROLL
  for (int k = 0; k < Cell::kSavedFirst; ++k) saved[k] = widen(load<Cache::kDefault>(from, row_unit.saved(k)));
  const Global<const T> partial = global<const T>(args.partial_gates, layer.states() * Cell::kFirst);
  SK_UNROLL
  for (int g = 0; g < Cell::kFirst; ++g) d[g] = partial[state * Cell::kFirst + g];
  const Global<T> direct_at = global<T>(args.direct, layer.states());
  T direct = direct_at[state];
  Cell::backward_first(saved, e, row_unit.before(layer.y, layer.h0), none, &product, none, d, direct, &q);
  SK_UNROLL
  for (int g = 0; g < Cell::kFirst; ++g) put_gates<Cell>(args, row_unit, g, d[g], d[g]);
  direct_at[state] = direct;
  if (args.q != nullptr) {
    global<S>(args.q, layer.directions * layer.rows *
                          layer.H)[(row_unit.direction * layer.rows + row_unit.row) * layer.H + row_unit.unit] =
        narrow<S>(q);
  }
}

// Grid: strips of 8 units of h x groups of sequences x directions.
template <class Cell, bool kSecond>
SK_KERNEL(kStepThreads, 2)
backward_step_kernel(const SK_GRID_CONSTANT BackwardStepArgs args, int row_tiles) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  const LayerArgs& layer = args.layer;
  const int d = static_cast<int>(block_index_z());
  const int64_t sequence0 = block_index_y() * row_tiles * kTileRows, count = args.visit.count[d] - sequence0;
  if (count <= 0) return;
  const int64_t needed = (count + kTileRows - 1) / kTileRows;
  const int tiles = needed < row_tiles ? static_cast<int>(needed) : row_tiles, rows = tiles * kTileRows;
  SharedArena arena;
  const Shared<T> sums = arena.array<T>(kStepWarps * row_tiles * kTileRows * kUnits);
  make_product<S, 1>(layer, args.product, sequence0 / kTileRows, tiles, sums);
  block_sync();
  const Partial<T, 1> partial{sums, rows};
  const Global<const Link> links = global<const Link>(layer.links, layer.link_count());
  for (int i = thread_index(); i < rows * kUnits; i += kStepThreads) {
    const int in_block = i / kUnits, in_strip = i % kUnits;
    const int64_t unit = block_index() * kUnits + in_strip;
    if (in_block >= count || unit >= layer.H) continue;
    const int64_t row = args.visit.first[d] + sequence0 + in_block;
    const Link link = links[d * (layer.rows + layer.B) + row];
    if (row < layer.rows) {
      if (link.prev == kNone) continue;
    } else if ((d == 0 ? args.last_step : link.prev - 1) % 2 != args.parity && link.next != kNone) {
      continue;
    }
    const UnitOfRow<S> row_unit{layer, d, row, unit, link};
    if constexpr (kSecond) {
      backward_first_unit<Cell>(args, row_unit, partial(in_block, 0, in_strip));
    } else {
      backward_unit<Cell>(args, row_unit, partial(in_block, 0, in_strip));
    }
  }
}

// The cell alone, for a single step: on the rows, then on the initial states if their gradient is more than a product.
// Grid: rows and their units x directions.
template <class Cell, bool kSecond>
SK_KERNEL(kStepThreads)
backward_rows_kernel(const SK_GRID_CONSTANT BackwardStepArgs args) {
  using S = typename Cell::Storage;
  using T = Compute<S>;
  const LayerArgs& layer = args.layer;
  const int d = static_cast<int>(block_index_y());
  const Global<const T> to_h = global<const T>(args.to_h, args.to_h == nullptr ? 0 : layer.states());
  for (int64_t i = grid_thread_index(); i < args.visit.count[d] * layer.H; i += grid_threads()) {
    const int64_t unit = i % layer.H, row = args.visit.first[d] + i / layer.H;
    const UnitOfRow<S> row_unit{layer, d, row, unit, link_of(layer, d, row)};
    const T product = to_h ? load<Cache::kDefault>(to_h, row_unit.state()) : T(0);
    if constexpr (kSecond) {
      backward_first_unit<Cell>(args, row_unit, product);
    } else {
      backward_unit<Cell>(args, row_unit, product);
    }
  }
}

}  // namespace seqkernels::cuda
