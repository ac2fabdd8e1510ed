// Forward pass of attention: softmax(Q K^T) V by blocks of queries and keys that fit into the L1 cache, with an online
// softmax. Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention",
// 2022.
//
// Keys are processed in chunks of kChunkKeys, counted from a sequence's first key. Each chunk has an online softmax of
// its own, and chunks are merged in order. A chunk may therefore be a separate task (few queries, many keys), and a row
// has the same bits in both cases.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/cpu/blocks.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/tiles.h"
#include "common/memory.h"
#include "common/packing.h"
#include "common/products.h"
#include "common/schedule.h"

namespace seqkernels::SEQKERNELS_ISA {

AttentionKernels attention_kernels();
void attention_backward(const AttentionBackwardArgs& args);
void attention_weights(const AttentionArgs& args, void* weights);
void attention_mean_weights(const AttentionArgs& args, void* mean);

namespace {

// State of an online softmax: per row the largest score, the sum of exponentials (per lane) and the weighted values.
template <class T>
struct SoftmaxState {
  T* top;     // [kRows]
  T* sum;     // [kRows][kLanes]
  T* values;  // [kRows][ldv]
};

template <class S>
class Forward {
 public:
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kWidth = kLanes<T>;

  Forward(const AttentionArgs& args, void* weights_of_block)
      : a(args),
        weights(static_cast<T*>(weights_of_block)),
        scores(args),
        dropout(args),
        ldq(leading<T>(args.D)),
        ldv(leading<T>(args.Dv)),
        stripsv(ceil_div(maximum(args.Dv, int64_t{1}), kStrip<T>)),
        factor(scores.left_scale()) {}

  void run() {
    const int64_t threads = threads_for(a), groups = a.B * a.Hk;
    int64_t longest = 0;
    double pairs = 0;
    for (int64_t b = 0; b < a.B; ++b) {
      longest = maximum(longest, a.sequences[b].k_length);
      pairs += cost_of(a, a.sequences[b]) * double(a.Hk);
    }
    const double nanoseconds = attention::nanoseconds(pairs, a.D, a.Dv);
    if (!attention::group_is_task(groups, threads)) return run_few_groups(threads, longest, nanoseconds);
    Tasks tasks(groups);
    for (int64_t g = 0; g < groups; ++g) tasks.set(g, cost_of(a, a.sequences[g / a.Hk]));
    tasks.sort();
    run_tasks<T>(threads, groups, scratch_size() + packed_size(longest), nanoseconds, [&](int64_t task, T* memory) {
      const int64_t g = tasks.at(task), b = g / a.Hk, hk = g % a.Hk;
      const Blocks blocks(a, b);
      Scratch& s = carve(memory);
      fill_padding(b, hk);
      if (blocks.count == 0) return;
      QueryBlock q;
      if (blocks.count == 1) {
        blocks.set(q, a, hk, 0);
        return write_results(q, softmax_block(q, hk, nullptr, s), s);
      }
      const Packed packed = packed_at(memory, longest);
      const KeyRange keys = blocks.keys(a);
      for (int64_t j0 = keys.lo / kKeys * kKeys; j0 < keys.hi; j0 += kKeys) pack_block(b, hk, j0, packed);
      for (int64_t i = 0; i < blocks.count; ++i) {
        blocks.set(q, a, hk, i);
        write_results(q, softmax_block(q, hk, &packed, s), s);
      }
    });
  }

 private:
  const AttentionArgs& a;
  T* const weights;  // [B, Hq, Tq, Tk], of at most kKeys keys; or null
  const Scores<S> scores;
  const Dropout dropout;
  const int64_t ldq, ldv, stripsv;
  const T factor;  // scale of a difference of tile values

  // Scratch memory, in elements of T.

  static int64_t padded_size(int64_t n) { return round_up(n, 64 / int64_t(sizeof(T))); }
  struct Packed {
    T* keys;       // strips of kStrip keys, [D][kStrip] each
    T* values;     // [n][ldv]
    T* finite;     // [blocks of kKeys] whether all values of a block are finite: 1 or 0
    int64_t from;  // the first key
  };
  struct Scratch {
    T *q, *tile, *alpha;
    Packed block;  // one block of keys
    SoftmaxState<T>*chunk, *total;
    SoftmaxState<T> runs[2];
  };
  int64_t state_size() const { return padded_size(kRows) + padded_size(kRows * kWidth) + padded_size(kRows * ldv); }
  int64_t scratch_size() const {
    return padded_size(kRows * ldq) + padded_size(kRows * kKeys) + padded_size(kRows) + packed_size(kKeys) +
           2 * state_size() + padded_size(sizeof(Scratch) / sizeof(T) + 1);
  }
  int64_t packed_size(int64_t n) const {
    const int64_t whole = round_up(n, kKeys);
    return padded_size(whole * a.D) + padded_size(whole * ldv) + padded_size(whole / kKeys);
  }
  SoftmaxState<T> take_state(T*& at) const {
    SoftmaxState<T> r;
    r.top = take(at, kRows);
    r.sum = take(at, kRows * kWidth);
    r.values = take(at, kRows * ldv);
    return r;
  }
  Scratch& carve(T*& at) const {
    Scratch& s = *reinterpret_cast<Scratch*>(take(at, sizeof(Scratch) / sizeof(T) + 1));
    s.q = take(at, kRows * ldq);
    s.tile = take(at, kRows * kKeys);
    s.alpha = take(at, kRows);
    s.block = packed_at(at, kKeys);
    s.runs[0] = take_state(at);
    s.runs[1] = take_state(at);
    s.chunk = &s.runs[0];
    s.total = &s.runs[1];
    return s;
  }
  Packed packed_at(T*& at, int64_t n) const {
    const int64_t whole = round_up(n, kKeys);
    Packed p;
    p.keys = take(at, whole * a.D);
    p.values = take(at, whole * ldv);
    p.finite = take(at, whole / kKeys);
    p.from = 0;
    return p;
  }
  void pack_block(int64_t b, int64_t hk, int64_t j0, const Packed& p) const {
    const AttentionSequence& s = a.sequences[b];
    const int64_t n = min(kKeys, s.k_length - j0), at = j0 - p.from;
    pack_strips(row_of<S>(a.k, b, hk, s.k_begin + j0), a.k.t, a.k.d, n, a.D, p.keys + at * a.D);
    p.finite[at / kKeys] =
        T(pack_rows(row_of<S>(a.v, b, hk, s.k_begin + j0), a.v.t, a.v.d, n, a.Dv, p.values + at * ldv, ldv));
  }

  // One block of keys.

  void load_queries(const QueryBlock& q, T* to) const {
    const AttentionSequence& s = a.sequences[q.b];
    for (int64_t r = 0; r < q.n; ++r) {
      pack_rows(row_of<S>(a.q, q.b, q.head[r], s.q_begin + q.i[r]), a.q.t, a.q.d, 1, a.D, to + r * ldq, ldq);
    }
  }

  // Updates the running maximum of each row.
  template <bool kWhole>
  static void row_tops(int64_t n, KeyRange columns, const T* tile, const T* before, T* top) {
    const int64_t end = (kWhole ? kKeys : columns.hi) - (kWhole ? 0 : columns.lo);
    if (!kWhole) tile += columns.lo;
    int64_t r = 0;
    for (; r + kWidth <= n; r += kWidth) {
      V most[kWidth];
      for (int l = 0; l < kWidth; ++l) {
        const T* row = tile + (r + l) * kKeys;
        V m = load(row);
#pragma GCC unroll 16
        for (int64_t j = kWidth; j < end; j += kWidth) {
          const V x = load(row + j);
          m = x > m ? x : m;
        }
        most[l] = m;
      }
      transpose_block(most);
      V m = load(before + r);
      for (int l = 0; l < kWidth; ++l) m = most[l] > m ? most[l] : m;
      store(top + r, m);
    }
    for (; r < n; ++r) {
      const T* row = tile + r * kKeys;
      V m = load(row);
#pragma GCC unroll 16
      for (int64_t j = kWidth; j < end; j += kWidth) {
        const V x = load(row + j);
        m = x > m ? x : m;
      }
      T lanes[kWidth], most = before[r];
      store(lanes, m);
      for (int l = 0; l < kWidth; ++l) most = maximum(lanes[l], most);
      top[r] = most;
    }
  }

  // Replaces top by next; alpha receives the factor by which earlier sums must be multiplied.
  void rescale(int64_t n, T* top, const T* next, T* alpha) const {
    const V minus_infinity = broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t r = 0; r < n; r += kWidth) {  // in whole vectors, possibly past the last row
      const V after = load(next + r);
      const V safe = after == minus_infinity ? V{} : after;
      store(alpha + r, exp<T>((load(top + r) - safe) * factor));
      store(top + r, after);
    }
  }

  // Turns scores into unnormalised weights, and updates the running sums.
  template <bool kWhole>
  void softmax(const QueryBlock& q, int64_t j0, KeyRange columns, bool first, const Scratch& s) const {
    const int64_t begin = kWhole ? 0 : columns.lo, end = kWhole ? kKeys : columns.hi;
    const SoftmaxState<T>& run = *s.chunk;
    const T minus_infinity = -std::numeric_limits<T>::infinity();
    alignas(64) T next[kRows];
    if (first) {
      for (int64_t r = 0; r < kRows; ++r) run.top[r] = minus_infinity;
    }
    row_tops<kWhole>(q.n, columns, s.tile, run.top, next);
    rescale(q.n, run.top, next, s.alpha);
    for (int64_t r = 0; r < q.n; ++r) {
      T* row = s.tile + r * kKeys;
      const V top = broadcast(run.top[r] == minus_infinity ? T(0) : run.top[r]), by = broadcast(factor);
      V sum = {};
#pragma GCC unroll 8
      for (int64_t j = begin; j < end; j += kWidth) {
        const V e = exp<T>((load(row + j) - top) * by);
        sum += e;
        store(row + j, e);
      }
      T* sums = run.sum + r * kWidth;
      store(sums, first ? sum : fma(load(sums), broadcast(s.alpha[r]), sum));
    }
    if (dropout.on) {
      for (int64_t r = 0; r < q.n; ++r) {
        uint32_t words[kKeys];
        dropout.draw(q, r, j0, words);
        T* row = s.tile + r * kKeys;
        for (int64_t j = begin; j < end; j += kWidth) {
          store(row + j, keep_mask<T>(words + j, dropout.threshold) ? load(row + j) : V{});
        }
      }
    }
  }

  // values: rows of ld elements.
  void keys_block(const QueryBlock& q, int64_t j0, int64_t n, bool some, bool first, const T* keys, const T* values,
                  int64_t ld, bool finite, const Scratch& s) const {
    const SoftmaxState<T>& run = *s.chunk;
    const KeyRange columns = Scores<S>::columns(q, j0);
    score_product(q, j0, a.D, s.q, ldq, RightOperand<T>{keys, kStrip<T>, a.D * kStrip<T>}, s.tile);
    scores.finish(q, j0, n, some, columns, s.tile, nullptr);
    uint64_t visible[kRows];
    const bool masked = !finite && (some || !q.all_visible(j0) || a.mask_kind == MaskKind::kFloat);
    if (masked) Scores<S>::visible_words(q.n, columns, s.tile, visible);
    if (columns.hi - columns.lo == kKeys) {
      softmax<true>(q, j0, columns, first, s);
    } else {
      softmax<false>(q, j0, columns, first, s);
    }
    const Update update = first ? Update::kReplace : Update::kScale;
    if (masked) {
      masked_product<LeftLayout::kRows>(q.n, n, s.tile, kKeys, visible, values, ld, stripsv * kStrip<T>, run.values,
                                        ldv, update, s.alpha);
    } else {
      value_product(q, j0, n, s.tile, RightOperand<T>{values, ld, kStrip<T>}, stripsv, run.values, ldv, update,
                    s.alpha);
    }
  }

  // Whether values can be read in place: few rows, and all keys of the block visible.
  bool in_place(const QueryBlock& q, int64_t j0) const {
    return sizeof(S) == sizeof(T) && q.n <= kHeight && q.all_visible(j0) && a.mask_kind != MaskKind::kFloat &&
           a.v.d == 1 && a.Dv == stripsv * kStrip<T>;
  }

  // Processes the keys of a chunk; returns whether any key was visible. `packed` is null if keys are packed block by
  // block.
  bool process_chunk(const QueryBlock& q, int64_t hk, int64_t chunk, const Packed* packed, const Scratch& s) const {
    const int64_t lo = maximum(chunk * kChunkKeys, q.any_keys.lo / kKeys * kKeys),
                  hi = min((chunk + 1) * kChunkKeys, q.any_keys.hi), end = a.sequences[q.b].k_length;
    bool first = true;
    for (int64_t j0 = lo; j0 < hi; j0 += kKeys) {
      const Visibility visible = scores.visibility(q, j0, min(kKeys, q.any_keys.hi - j0));
      if (visible == Visibility::kNone) continue;
      const int64_t n = min(kKeys, end - j0);
      const bool some = visible == Visibility::kSome;
      if (packed != nullptr) {
        const int64_t at = j0 - packed->from;
        keys_block(q, j0, n, some, first, packed->keys + at * a.D, packed->values + at * ldv, ldv,
                   packed->finite[at / kKeys] != 0, s);
      } else if (!some && in_place(q, j0)) {
        const AttentionSequence& of = a.sequences[q.b];
        pack_strips(row_of<S>(a.k, q.b, hk, of.k_begin + j0), a.k.t, a.k.d, n, a.D, s.block.keys);
        if constexpr (sizeof(S) == sizeof(T)) {
          keys_block(q, j0, n, some, first, s.block.keys, row_of<S>(a.v, q.b, hk, of.k_begin + j0), a.v.t, true, s);
        }
      } else {
        Packed here = s.block;
        here.from = j0;
        pack_block(q.b, hk, j0, here);
        keys_block(q, j0, n, some, first, here.keys, here.values, ldv, here.finite[0] != 0, s);
      }
      first = false;
    }
    return !first;
  }

  // Merges the state of a later chunk into total.
  void merge(int64_t n, const SoftmaxState<T>& total, const SoftmaxState<T>& state) const {
    alignas(64) T top[kRows] = {}, alpha[kRows], beta[kRows];
    for (int64_t r = 0; r < n; ++r) top[r] = maximum(state.top[r], total.top[r]);
    rescale(n, state.top, top, beta);
    rescale(n, total.top, top, alpha);
    for (int64_t r = 0; r < n; ++r) {
      const V of_total = broadcast(alpha[r]), of_found = broadcast(beta[r]);
      const auto add = [&](T* to, const T* from) { store(to, fma(load(to), of_total, load(from) * of_found)); };
      add(total.sum + r * kWidth, state.sum + r * kWidth);
      for (int64_t d = 0; d < stripsv * kStrip<T>; d += kWidth) {
        add(total.values + r * ldv + d, state.values + r * ldv + d);
      }
    }
  }

  // The softmax state of a block of queries; null if no key was visible.
  const SoftmaxState<T>* softmax_block(const QueryBlock& q, int64_t hk, const Packed* packed,
                                       const Scratch& scratch) const {
    if (q.any_keys.lo >= q.any_keys.hi) return nullptr;
    Scratch s = scratch;
    load_queries(q, s.q);
    bool any = false;
    for (int64_t c = q.any_keys.lo / kChunkKeys; c * kChunkKeys < q.any_keys.hi; ++c) {
      if (!process_chunk(q, hk, c, packed, s)) continue;
      if (any) {
        merge(q.n, *s.total, *s.chunk);
      } else {
        SoftmaxState<T>* const state = s.chunk;
        s.chunk = s.total;
        s.total = state;
      }
      any = true;
    }
    return any ? s.total : nullptr;
  }

  // Results.

  void write_results(const QueryBlock& q, const SoftmaxState<T>* state, const Scratch& s) const {
    write_output(q, state);
    if (weights != nullptr) write_weights(q, state, s.tile);
  }

  // Normalises the tile of the only block of keys. Its columns outside of `columns` are not computed.
  void write_weights(const QueryBlock& q, const SoftmaxState<T>* state, const T* tile) const {
    const KeyRange columns = Scores<S>::columns(q, 0);
    const int64_t end = min(columns.hi, a.Tk);
    for (int64_t r = 0; r < q.n; ++r, tile += kKeys) {
      T* const to = weights + ((q.b * a.Hq + q.head[r]) * a.Tq + q.i[r]) * a.Tk;
      const T sum = state == nullptr ? T(0) : sum_of<T>(load(state->sum + r * kWidth));
      if (sum == 0) {
        memset(static_cast<void*>(to), 0, size_t(a.Tk) * sizeof(T));
        continue;
      }
      const V by = broadcast(T(dropout.on ? dropout.inverse : 1)), over = broadcast(sum);
      for (int64_t j = 0; j < columns.lo; ++j) to[j] = 0;
      for (int64_t j = columns.lo; j < end; j += kWidth) store(to + j, load(tile + j) * by / over, end - j);
      for (int64_t j = end; j < a.Tk; ++j) to[j] = 0;
    }
  }

  void write_output(const QueryBlock& q, const SoftmaxState<T>* state) const {
    const AttentionSequence& s = a.sequences[q.b];
    const T scale_of_top = scores.left_scale();
    for (int64_t r = 0; r < q.n; ++r) {
      const int64_t at = s.q_begin + q.i[r];
      S* out = mutable_row_of<S>(a.out, q.b, q.head[r], at);
      S* low = a.out_low.data == nullptr ? nullptr : mutable_row_of<S>(a.out_low, q.b, q.head[r], at);
      T& lse = static_cast<T*>(a.lse)[q.b * a.lse_b + q.head[r] * a.lse_h + at];
      const T sum = state == nullptr ? T(0) : sum_of<T>(load(state->sum + r * kWidth));
      if (sum == 0) {
        for (int64_t d = 0; d < a.Dv; ++d) out[d * a.out.d] = S{};
        for (int64_t d = 0; low != nullptr && d < a.Dv; ++d) low[d] = S{};
        lse = -std::numeric_limits<T>::infinity();
        continue;
      }
      lse = T(double(state->top[r]) * double(scale_of_top) + log(double(sum)));
      const V by = broadcast(T(dropout.on ? dropout.inverse : 1)), over = broadcast(sum);
      for (int64_t d = 0; d < a.Dv; d += kWidth) {
        V v = load(state->values + r * ldv + d);
        if (dropout.on) v *= by;
        v = v / over;
        const int64_t valid = min(kWidth, a.Dv - d);
        if (a.out.d == 1 && low == nullptr) {
          store(out + d, v, valid);
          continue;
        }
        S lanes[kWidth];
        store(lanes, v);
        for (int64_t l = 0; l < valid; ++l) out[(d + l) * a.out.d] = lanes[l];
        if (low == nullptr) continue;
        const V rest = v - load(lanes);                          // infinite or NaN where the output overflows
        store(low + d, rest - rest == V{} ? rest : V{}, valid);  // the op allocates it with contiguous columns
      }
    }
  }

  // Fills the rows past the sequence length.
  void fill_padding(int64_t b, int64_t hk) const {
    if (a.packed) return;
    for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
      for (int64_t i = a.sequences[b].q_length; i < a.Tq; ++i) {
        S* out = mutable_row_of<S>(a.out, b, h, i);
        for (int64_t d = 0; d < a.Dv; ++d) out[d * a.out.d] = S{};
        if (a.out_low.data != nullptr)
          memset(static_cast<void*>(mutable_row_of<S>(a.out_low, b, h, i)), 0, size_t(a.Dv) * sizeof(S));
        static_cast<T*>(a.lse)[b * a.lse_b + h * a.lse_h + i] = -std::numeric_limits<T>::infinity();
      }
    }
  }

  // Few groups: tasks are blocks, or, for groups of one block, chunks of keys.

  struct Task {
    int64_t g, block, chunk;  // chunk -1: all chunks
  };
  void run_few_groups(int64_t threads, int64_t longest, double nanoseconds) const {
    const int64_t groups = a.B * a.Hk, size = packed_size(longest);
    int64_t packing = 0, count = 0, parts = 0;
    bool any_packed = false;
    for (int64_t g = 0; g < groups; ++g) {
      const Blocks blocks(a, g / a.Hk);
      const int64_t keys = a.sequences[g / a.Hk].k_length, chunks = attention::chunks_of(keys);
      packing += 1 + (blocks.count > 1 ? chunks : 0);
      any_packed |= blocks.count > 1;
      count += attention::tasks_of_group(blocks.count, keys);
      parts += blocks.count == 1 ? chunks : 0;
    }
    // Fills and packs.
    const Memory packed_memory(any_packed ? size_t(groups * size) * sizeof(T) : 64);
    const auto packed_of = [&](int64_t g) {
      T* at = reinterpret_cast<T*>(packed_memory.get()) + g * size;
      return packed_at(at, longest);
    };
    const Memory first_memory(size_t(packing + count) * sizeof(Task));
    Task* const first = reinterpret_cast<Task*>(first_memory.get());
    int64_t n = 0;
    for (int64_t g = 0; g < groups; ++g) {
      first[n++] = {g, 0, -1};
      if (Blocks(a, g / a.Hk).count <= 1) continue;
      for (int64_t c = 0; c * kChunkKeys < a.sequences[g / a.Hk].k_length; ++c) first[n++] = {g, 0, c};
    }
    run_tasks<T>(threads, n, 0, 0.3 * double(groups * longest * (a.D + a.Dv)), [&](int64_t task, T*) {
      const auto [g, block, chunk] = first[task];
      const int64_t b = g / a.Hk, hk = g % a.Hk;
      if (chunk < 0) return fill_padding(b, hk);
      const KeyRange keys = Blocks(a, b).keys(a);
      const int64_t lo = maximum(keys.lo / kKeys * kKeys, chunk * kChunkKeys);
      for (int64_t j0 = lo; j0 < min(keys.hi, (chunk + 1) * kChunkKeys); j0 += kKeys)
        pack_block(b, hk, j0, packed_of(g));
    });
    // Computes attention.
    Task* const second = first + packing;
    Tasks tasks(count);
    const Memory parts_memory(size_t(parts * state_size() + 64) * sizeof(T));
    const Memory found_memory(size_t(parts + 1));
    const auto part_of = [&](int64_t part) {
      T* at = reinterpret_cast<T*>(parts_memory.get()) + part * state_size();
      return take_state(at);
    };
    const Memory begin_memory(size_t(groups + 1) * sizeof(int64_t));
    int64_t* const begin = reinterpret_cast<int64_t*>(begin_memory.get());
    n = parts = 0;
    QueryBlock q;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t b = g / a.Hk, hk = g % a.Hk;
      const Blocks blocks(a, b);
      begin[g] = parts;
      if (blocks.count == 1) {
        const int64_t chunks = attention::chunks_of(a.sequences[b].k_length);
        if (chunks == 0) {
          tasks.set(n, 0);
          second[n++] = {g, 0, -1};
        }
        for (int64_t c = 0; c < chunks; ++c) {
          tasks.set(n, kChunkKeys);
          second[n++] = {g, 0, c};
        }
        parts += chunks;
        continue;
      }
      for (int64_t i = 0; i < blocks.count; ++i) {
        blocks.set(q, a, hk, i);
        tasks.set(n, double(q.any_keys.hi - q.any_keys.lo) * double(q.n));
        second[n++] = {g, i, -1};
      }
    }
    begin[groups] = parts;
    tasks.sort();
    run_tasks<T>(threads, count, scratch_size(), nanoseconds, [&](int64_t place, T* memory) {
      const auto [g, i, c] = second[tasks.at(place)];
      const int64_t b = g / a.Hk, hk = g % a.Hk;
      Scratch& s = carve(memory);
      QueryBlock mine;
      const Blocks blocks(a, b);
      blocks.set(mine, a, hk, i);
      if (c < 0) {
        const Packed packed = packed_of(g);
        return write_results(mine, softmax_block(mine, hk, blocks.count == 1 ? nullptr : &packed, s), s);
      }
      SoftmaxState<T> part = part_of(begin[g] + c);
      s.chunk = &part;
      load_queries(mine, s.q);
      const bool any = process_chunk(mine, hk, c, nullptr, s);
      found_memory.get()[begin[g] + c] = any;
      if (weights != nullptr) write_weights(mine, any ? &part : nullptr, s.tile);  // of the only chunk
    });
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t b = g / a.Hk, hk = g % a.Hk;
      if (begin[g] == begin[g + 1]) continue;
      Blocks(a, b).set(q, a, hk, 0);
      SoftmaxState<T> total;
      bool any = false;
      for (int64_t part = begin[g]; part < begin[g + 1]; ++part) {
        if (!found_memory.get()[part]) continue;
        const SoftmaxState<T> state = part_of(part);
        if (any) {
          merge(q.n, total, state);
        } else {
          total = state;
        }
        any = true;
      }
      write_output(q, any ? &total : nullptr);
    }
  }
};

void attention_forward(const AttentionArgs& args, void* weights) {
  dispatch(args.dtype, [&](auto s) { Forward<decltype(s)>(args, weights).run(); });
}

}  // namespace

AttentionKernels attention_kernels() {
  return {&attention_forward, &attention_weights, &attention_mean_weights, &attention_backward};
}

}  // namespace seqkernels::SEQKERNELS_ISA
