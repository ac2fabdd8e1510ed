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
#include "attention/cpu/softmax.h"
#include "attention/cpu/tiles.h"
#include "common/bytes.h"
#include "common/memory.h"
#include "common/packing.h"
#include "common/products.h"
#include "common/schedule.h"

namespace seqkernels::SEQKERNELS_ISA {

AttentionKernels attention_kernels();
void attention_decode(const DecodeArgs& args);
void attention_backward(const AttentionBackwardArgs& args);
void attention_weights(const AttentionArgs& args, void* weights);
void attention_mean_weights(const AttentionArgs& args, void* mean);

namespace {

template <class S>
class Forward : OnlineSoftmax<Compute<S>> {
 public:
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kWidth = kLanes<T>;

  Forward(const AttentionArgs& args, void* weights_of_block)
      : OnlineSoftmax<T>(args, Scores<S>(args).left_scale(), kRows),
        weights(static_cast<T*>(weights_of_block)),
        scores(args) {}

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
      Softmax::template fill_padding<S>(b, hk);
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
  using Softmax = OnlineSoftmax<T>;
  using Softmax::a, Softmax::dropout, Softmax::ldq, Softmax::ldv, Softmax::stripsv;
  using Softmax::merge, Softmax::padded_size, Softmax::state_size, Softmax::take_state;

  T* const weights;  // [B, Hq, Tq, Tk], of at most kKeys keys; or null
  const Scores<S> scores;

  // Scratch memory, in elements of T.

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
  int64_t scratch_size() const {
    return padded_size(kRows * ldq) + padded_size(kRows * kKeys) + padded_size(kRows) + packed_size(kKeys) +
           2 * state_size() + padded_size(sizeof(Scratch) / sizeof(T) + 1);
  }
  int64_t packed_size(int64_t n) const {
    const int64_t whole = round_up(n, kKeys);
    return padded_size(whole * a.D) + padded_size(whole * ldv) + padded_size(whole / kKeys);
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
      Softmax::template softmax<true>(q, j0, columns, first, s.tile, s.alpha, run);
    } else {
      Softmax::template softmax<false>(q, j0, columns, first, s.tile, s.alpha, run);
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

  // The softmax state of a block of queries; null if no key was visible.
  const SoftmaxState<T>* softmax_block(const QueryBlock& q, int64_t hk, const Packed* packed,
                                       const Scratch& scratch) const {
    if (q.any_keys.lo >= q.any_keys.hi) return nullptr;
    Scratch s = scratch;
    Softmax::template load_queries<S>(q, s.q);
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
    Softmax::template write_output<S>(q, state);
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
        zero_bytes(to, a.Tk * int64_t{sizeof(T)});
        continue;
      }
      const V by = broadcast(T(dropout.on ? dropout.inverse : 1)), over = broadcast(sum);
      for (int64_t j = 0; j < columns.lo; ++j) to[j] = 0;
      for (int64_t j = columns.lo; j < end; j += kWidth) store(to + j, load(tile + j) * by / over, end - j);
      for (int64_t j = end; j < a.Tk; ++j) to[j] = 0;
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
      if (chunk < 0) return Softmax::template fill_padding<S>(b, hk);
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
      Softmax::template load_queries<S>(mine, s.q);
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
      Softmax::template write_output<S>(q, any ? &total : nullptr);
    }
  }
};

void attention_forward(const AttentionArgs& args, void* weights) {
  dispatch(args.dtype, [&](auto s) { Forward<decltype(s)>(args, weights).run(); });
}

}  // namespace

AttentionKernels attention_kernels() {
  return {&attention_forward, &attention_decode, &attention_weights, &attention_mean_weights, &attention_backward};
}

}  // namespace seqkernels::SEQKERNELS_ISA
