// Backward pass of attention, and the attention weights. The scores are recomputed block by block.
//
//   P = e^(S - lse), V' = dropout(P);  dV = V'^T dO, dP = dropout(dO V^T), dS = P (dP - rowsum(dO O) + dlse),
//   dQ = scale dS K, dK = scale dS^T Q.   Dao et al., "FlashAttention", 2022, algorithm 4.
//
// With enough groups of heads for the threads, a group is a task: one pass over its blocks computes all gradients.
// Otherwise there are two passes: over blocks of keys for dk and dv, and over blocks of queries for dq. The order of
// sums is the same in both cases (of a key's gradient over sequences, heads and queries, of a query's over keys), and
// so are the bits.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/cpu/blocks.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/tiles.h"
#include "common/bytes.h"
#include "common/memory.h"
#include "common/packing.h"
#include "common/products.h"
#include "common/schedule.h"

namespace seqkernels::SEQKERNELS_ISA {

void attention_backward(const AttentionBackwardArgs& args);
void attention_weights(const AttentionArgs& args, void* weights);
void attention_mean_weights(const AttentionArgs& args, void* mean);

namespace {

// The gradients that a pass over blocks computes.
enum Gradients : int { kQueryGradients = 1, kKeyGradients = 2, kMaskGradients = 4 };

template <class S>
class Backward {
 public:
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int kWidth = kLanes<T>;

  explicit Backward(const AttentionBackwardArgs& given)
      : args(given),
        a(given.forward),
        scores(given.forward),
        dropout(given.forward),
        of_weights(given.dweights.data != nullptr),
        ldk(leading<T>(a.D)),
        ldv(leading<T>(a.Dv)),
        strips(ceil_div(maximum(a.D, int64_t{1}), kStrip<T>)),
        stripsv(ceil_div(maximum(a.Dv, int64_t{1}), kStrip<T>)),
        groups(a.B * a.Hk) {
    for (int64_t b = 0; b < a.B; ++b) longest = maximum(longest, a.sequences[b].k_length);
    if (args.dmask != nullptr) {
      const int64_t* shape = args.mask_shape;
      int64_t stride = 1;
      for (int i = 3; i >= 0; --i) {
        mask_strides[i] = shape[i] > 1 ? stride : 0;
        stride *= shape[i];
      }
      mask_count = stride;
    }
  }

  void run() {
    const int64_t threads = threads_for(a);
    const Memory wide(sizeof(T) != sizeof(S) && args.dmask != nullptr ? size_t(mask_count) * sizeof(T) : 64);
    if (args.dmask != nullptr) {
      sums = sizeof(T) != sizeof(S) ? reinterpret_cast<T*>(wide.get()) : static_cast<T*>(args.dmask);
      zero_bytes(sums, mask_count * int64_t{sizeof(T)});
    }
    // Tasks must not share sums of the mask's gradient: pairs that do form one task.
    const bool merge_b = args.dmask != nullptr && args.mask_shape[0] == 1,
               merge_h = args.dmask != nullptr && args.mask_shape[1] == 1;
    const TaskGroups task_groups{a.B, a.Hk, merge_b, merge_h};
    const bool single_task = args.dmask != nullptr && args.mask_shape[2] == 1 && args.mask_shape[3] == 1;
    if (threads == 1 || single_task || !two_passes_faster(task_groups, threads)) {
      run_one_pass(task_groups, threads);
    } else {
      run_two_passes(task_groups, threads);
    }
    if (args.dmask != nullptr && sizeof(T) != sizeof(S)) convert(static_cast<S*>(args.dmask), sums, mask_count);
  }

  void run_weights(S* weights) {
    const int64_t threads = threads_for(a);
    run_tasks<T>(threads, groups, scratch_size() + packed_size(), expected(1), [&](int64_t g, T* memory) {
      const int64_t b = g / a.Hk, hk = g % a.Hk;
      const Scratch s = carve(memory);
      const Packed packed = packed_at(memory);
      const Blocks blocks(a, b);
      const KeyRange keys = blocks.keys(a);
      for (int64_t j0 = keys.lo / kKeys * kKeys; j0 < keys.hi; j0 += kKeys) pack_block(b, hk, j0, packed);
      Queries q;
      for (int64_t i = 0; i < blocks.count; ++i) {
        blocks.set(q, a, hk, i);
        load_queries(q, s);
        renormalise(q, packed, s);
        for (int64_t j0 = q.any_keys.lo / kKeys * kKeys; j0 < q.any_keys.hi; j0 += kKeys) {
          const Visibility visible = scores.visibility(q, j0, min(kKeys, q.any_keys.hi - j0));
          if (visible == Visibility::kNone) continue;
          const int64_t n = min(kKeys, a.Tk - j0);
          probabilities(q, j0, visible == Visibility::kSome, packed, s);
          for (int64_t r = 0; r < q.n; ++r) {
            T* row = s.p + r * kKeys;
            if (dropout.on) drop(q, r, j0, row, row);
            S* to = weights + ((b * a.Hq + q.head[r]) * a.Tq + q.i[r]) * a.Tk + j0;
            for (int64_t j = 0; j < n; j += kWidth) store(to + j, load(row + j), n - j);
          }
        }
      }
    });
  }

  // mean: [B, Tq, Tk], over heads. A task is a block of queries with all heads: no other task writes its rows.
  void run_mean_weights(T* mean) {
    const int64_t blocks = ceil_div(a.Tq, kRows);
    run_tasks<T>(threads_for(a), a.B * blocks, scratch_size() + packed_size(), expected(1),
                 [&](int64_t task, T* memory) {
                   const int64_t b = task / blocks, i0 = task % blocks * kRows, rows = min(kRows, a.Tq - i0);
                   T* const to = mean + (b * a.Tq + i0) * a.Tk;
                   zero_bytes(to, rows * a.Tk * int64_t{sizeof(T)});
                   const int64_t valid = min(rows, a.sequences[b].q_length - i0);
                   if (valid <= 0) return;
                   const Scratch s = carve(memory);
                   const Packed packed = packed_at(memory);
                   const V heads = broadcast(T(a.Hq));
                   Queries q;
                   for (int64_t h = 0; h < a.Hq; ++h) {
                     const bool last = h == a.Hq - 1;
                     q.set(a, b, h, 1, i0, valid);
                     const int64_t first = q.any_keys.lo / kKeys * kKeys;
                     for (int64_t j0 = first; j0 < q.any_keys.hi; j0 += kKeys) pack_block(b, h / a.group(), j0, packed);
                     load_queries(q, s);
                     renormalise(q, packed, s);
                     for (int64_t j0 = first; j0 < q.any_keys.hi; j0 += kKeys) {
                       const Visibility visible = scores.visibility(q, j0, min(kKeys, q.any_keys.hi - j0));
                       if (visible == Visibility::kNone && !last) continue;
                       if (visible != Visibility::kNone) probabilities(q, j0, visible == Visibility::kSome, packed, s);
                       const int64_t n = min(kKeys, a.Tk - j0);
                       for (int64_t r = 0; r < valid; ++r) {
                         T *row = s.p + r * kKeys, *sum = to + r * a.Tk + j0;
                         if (visible == Visibility::kNone) memset(static_cast<void*>(row), 0, kKeys * sizeof(T));
                         if (dropout.on) drop(q, r, j0, row, row);
                         for (int64_t j = 0; j < n; j += kWidth) {
                           const V more = load(sum + j, n - j) + load(row + j);
                           store(sum + j, last ? more / heads : more, n - j);
                         }
                       }
                     }
                   }
                 });
  }

 private:
  const AttentionBackwardArgs& args;
  const AttentionArgs& a;
  const Scores<S> scores;
  const Dropout dropout;
  const bool of_weights;  // gradients of the attention weights, not of the output
  const int64_t ldk, ldv, strips, stripsv, groups;
  int64_t longest = 0;
  int64_t mask_strides[4] = {}, mask_count = 0;
  T* sums = nullptr;  // the mask's gradient

  struct Queries : QueryBlock {
    bool finite;  // whether the queries and dO are
  };

  // Groups the pairs of a sequence and a key head into tasks.
  struct TaskGroups {
    int64_t B, Hk;
    bool merge_b, merge_h;
    int64_t count() const { return (merge_b ? 1 : B) * (merge_h ? 1 : Hk); }
    template <class F>
    void each(int64_t task_group, F f) const {
      const int64_t heads = merge_h ? 1 : Hk, b0 = task_group / heads, h0 = task_group % heads;
      for (int64_t b = merge_b ? 0 : b0; b < (merge_b ? B : b0 + 1); ++b) {
        for (int64_t h = merge_h ? 0 : h0; h < (merge_h ? Hk : h0 + 1); ++h) f(b, h);
      }
    }
  };

  // Scratch memory, in elements of T.

  static int64_t padded_size(int64_t n) { return round_up(n, 64 / int64_t(sizeof(T))); }
  struct Scratch {
    T *q, *dout, *dq;         // [kRows][ldk], [kRows][ldv], [kRows][ldk]
    T *p, *ds, *capped;       // [kRows][kKeys]
    T *lse, *lse_correction;  // [kRows]; lse_correction: see renormalise
    T* delta;                 // [kRows] subtracted from dP
    T* dlse;                  // [kRows]
  };
  int64_t scratch_size() const {
    return 2 * padded_size(kRows * ldk) + padded_size(kRows * ldv) + 3 * padded_size(kRows * kKeys) +
           4 * padded_size(kRows);
  }
  Scratch carve(T*& at) const {
    Scratch s;
    s.q = take(at, kRows * ldk);
    s.dout = take(at, kRows * ldv);
    s.dq = take(at, kRows * ldk);
    s.p = take(at, kRows * kKeys);
    s.ds = take(at, kRows * kKeys);
    s.capped = take(at, kRows * kKeys);
    s.lse = take(at, kRows);
    s.lse_correction = take(at, kRows);
    s.delta = take(at, kRows);
    s.dlse = take(at, kRows);
    return s;
  }

  // Packed keys and values of a group. Strips hold kStrip keys, [D][kStrip] each.
  struct Packed {
    T *key_strips, *value_strips, *keys, *finite;  // keys: [n][ldk]; finite: whether all keys of a block are, 1 or 0
  };
  int64_t packed_size() const {
    const int64_t n = round_up(longest, kKeys);
    return padded_size(n * a.D) + padded_size(n * a.Dv) + padded_size(n * ldk) + padded_size(n / kKeys);
  }
  Packed packed_at(T*& at) const {
    const int64_t n = round_up(longest, kKeys);
    Packed p;
    p.key_strips = take(at, n * a.D);
    p.value_strips = take(at, n * a.Dv);
    p.keys = take(at, n * ldk);
    p.finite = take(at, n / kKeys);
    return p;
  }
  void pack_block(int64_t b, int64_t hk, int64_t j0, const Packed& p) const {
    const AttentionSequence& s = a.sequences[b];
    const int64_t n = min(kKeys, s.k_length - j0);
    const S* k = row_of<S>(a.k, b, hk, s.k_begin + j0);
    pack_strips(k, a.k.t, a.k.d, n, a.D, p.key_strips + j0 * a.D);
    p.finite[j0 / kKeys] = T(pack_rows(k, a.k.t, a.k.d, n, a.D, p.keys + j0 * ldk, ldk));
    if (!of_weights && a.v.data != nullptr) {
      pack_strips(row_of<S>(a.v, b, hk, s.k_begin + j0), a.v.t, a.v.d, n, a.Dv, p.value_strips + j0 * a.Dv);
    }
  }

  // One block of queries.

  // The scalar product of dout with a row of the output.
  T product_of_row(const AttentionTensor& x, const Queries& q, int64_t r, int64_t t, const T* dout) const {
    const S* out = row_of<S>(x, q.b, q.head[r], t);
    V sum = {};
    for (int64_t d = 0; d < a.Dv; d += kWidth) {
      if (x.d == 1) {
        sum = fma(load(out + d, a.Dv - d), load(dout + d), sum);
      } else {
        S lanes[kWidth] = {};
        for (int64_t l = 0; l < kWidth && d + l < a.Dv; ++l) lanes[l] = out[(d + l) * x.d];
        sum = fma(load(lanes), load(dout + d), sum);
      }
    }
    return sum_of<T>(sum);
  }
  void load_queries(Queries& q, const Scratch& s) const {
    const AttentionSequence& at = a.sequences[q.b];
    q.finite = true;
    for (int64_t r = 0; r < q.n; ++r) {
      const int64_t t = at.q_begin + q.i[r], place = q.b * a.lse_b + q.head[r] * a.lse_h + t;
      q.finite &= pack_rows(row_of<S>(a.q, q.b, q.head[r], t), a.q.t, a.q.d, 1, a.D, s.q + r * ldk, ldk);
      s.lse[r] = static_cast<const T*>(a.lse)[place];
      s.delta[r] = args.dlse != nullptr ? -static_cast<const T*>(args.dlse)[place] : T(0);
      s.dlse[r] = s.lse_correction[r] = 0;
      if (args.dout.data == nullptr) continue;
      T* dout = s.dout + r * ldv;
      q.finite &= pack_rows(row_of<S>(args.dout, q.b, q.head[r], t), args.dout.t, args.dout.d, 1, a.Dv, dout, ldv);
      s.delta[r] += product_of_row(a.out, q, r, t, dout);
      if (a.out_low.data != nullptr) s.delta[r] += product_of_row(a.out_low, q, r, t, dout);
    }
    for (int64_t r = 0; r < q.n; ++r) memset(static_cast<void*>(s.dq + r * ldk), 0, size_t(ldk) * sizeof(T));
  }

  // With scores of one huge magnitude, e.g. under a mask of the lowest finite number, lse cannot represent the
  // logarithm of the number of keys. For such rows, lse becomes the largest score and lse_correction the logarithm of
  // the remaining sum.
  void renormalise(const Queries& q, const Packed& packed, const Scratch& s) const {
    constexpr T kHuge = sizeof(T) == 4 ? T(4096) : T(1ll << 40);
    bool huge[kRows], any = false;
    for (int64_t r = 0; r < q.n; ++r) {
      huge[r] = (s.lse[r] > kHuge || s.lse[r] < -kHuge) && s.lse[r] - s.lse[r] == 0;
      any |= huge[r];
    }
    if (!any) return;
    double sum[kRows] = {}, top[kRows];
    for (int64_t r = 0; r < q.n; ++r) top[r] = -std::numeric_limits<double>::infinity();
    for (int64_t j0 = q.any_keys.lo / kKeys * kKeys; j0 < q.any_keys.hi; j0 += kKeys) {
      const Visibility visibility = scores.visibility(q, j0, min(kKeys, q.any_keys.hi - j0));
      if (visibility == Visibility::kNone) continue;
      const KeyRange columns = score(q, j0, visibility == Visibility::kSome, packed, s);
      for (int64_t r = 0; r < q.n; ++r) {
        for (int64_t j = columns.lo; huge[r] && j < columns.hi; ++j) {
          const double x = double(s.p[r * kKeys + j]) * double(scores.left_scale());
          if (x == -std::numeric_limits<double>::infinity()) continue;
          if (x > top[r]) {
            sum[r] = sum[r] * ::exp(top[r] - x) + 1;
            top[r] = x;
          } else {
            sum[r] += ::exp(x - top[r]);
          }
        }
      }
    }
    for (int64_t r = 0; r < q.n; ++r) {
      if (!huge[r] || !(sum[r] > 0)) continue;
      s.lse[r] = T(top[r]);
      s.lse_correction[r] = T(log(sum[r]));
    }
  }

  // Computes the scores of a block into s.p; returns the range of computed columns.
  KeyRange score(const Queries& q, int64_t j0, bool some, const Packed& packed, const Scratch& s) const {
    const KeyRange columns = Scores<S>::columns(q, j0);
    score_product(q, j0, a.D, s.q, ldk, RightOperand<T>{packed.key_strips + j0 * a.D, kStrip<T>, a.D * kStrip<T>}, s.p);
    scores.finish(q, j0, min(kKeys, a.sequences[q.b].k_length - j0), some, columns, s.p,
                  a.softcap > 0 ? s.capped : nullptr);
    return columns;
  }

  // Computes P of a block into s.p, 0 where a row may not attend to a key. `visible` receives a bit per visible key,
  // unless it is null.
  void probabilities(const Queries& q, int64_t j0, bool some, const Packed& packed, const Scratch& s,
                     uint64_t* visible = nullptr) const {
    const KeyRange columns = score(q, j0, some, packed, s);
    if (visible != nullptr) Scores<S>::visible_words(q.n, columns, s.p, visible);
    const V minus_infinity = broadcast(-std::numeric_limits<T>::infinity());
    const T scale = scores.left_scale();
    for (int64_t r = 0; r < q.n; ++r) {
      T* row = s.p + r * kKeys;
      const V by = broadcast(scale), less = broadcast(-s.lse[r]), lse_correction = broadcast(s.lse_correction[r]);
      for (int64_t j = 0; j < columns.lo; j += kWidth) store(row + j, V{});
      for (int64_t j = columns.hi; j < kKeys; j += kWidth) store(row + j, V{});
      if (s.lse[r] == -std::numeric_limits<T>::infinity()) {
        for (int64_t j = columns.lo; j < columns.hi; j += kWidth) store(row + j, V{});
        continue;
      }
#pragma GCC unroll 8
      for (int64_t j = columns.lo; j < columns.hi; j += kWidth) {
        const V x = load(row + j);
        const V p = exp<T>(fma(x, by, less) - lse_correction);
        store(row + j, x == minus_infinity ? V{} : p);
      }
    }
  }

  // to = dropout(row).
  void drop(const QueryBlock& q, int64_t r, int64_t j0, const T* row, T* to) const {
    uint32_t words[kKeys];
    dropout.draw(q, r, j0, words);
    const V by = broadcast(T(dropout.inverse));
    for (int64_t j = 0; j < kKeys; j += kWidth) {
      store(to + j, keep_mask<T>(words + j, dropout.threshold) ? load(row + j) * by : V{});
    }
  }

  // Queries against a block of keys. Adds to dk and dv of the block, [kKeys][ldk] and [kKeys][ldv].
  void keys_block(const Queries& q, int64_t j0, const Packed& packed, const Scratch& s, T* dk, T* dv,
                  int gradients) const {
    const int64_t n = min(kKeys, a.sequences[q.b].k_length - j0);
    const Visibility visibility = scores.visibility(q, j0, min(kKeys, q.any_keys.hi - j0));
    if (visibility == Visibility::kNone) return;
    const bool some = visibility == Visibility::kSome;
    const bool partial = some || !q.all_visible(j0) || a.mask_kind == MaskKind::kFloat;
    const bool masked_keys = partial && packed.finite[j0 / kKeys] == 0, masked_queries = partial && !q.finite;
    uint64_t visible[kRows];
    probabilities(q, j0, some, packed, s, masked_keys || masked_queries ? visible : nullptr);
    if (of_weights) {
      for (int64_t r = 0; r < q.n; ++r) {
        const S* from = row_of<S>(args.dweights, q.b, q.head[r], q.i[r]) + j0 * args.dweights.d;
        S lanes[kKeys] = {};
        for (int64_t j = 0; j < n; ++j) lanes[j] = from[j * args.dweights.d];
        for (int64_t j = 0; j < kKeys; j += kWidth) store(s.ds + r * kKeys + j, load(lanes + j));
      }
    } else {
      score_product(q, j0, a.Dv, s.dout, ldv,
                    RightOperand<T>{packed.value_strips + j0 * a.Dv, kStrip<T>, a.Dv * kStrip<T>}, s.ds);
    }
    for (int64_t r = 0; r < q.n; ++r) {
      T *p = s.p + r * kKeys, *ds = s.ds + r * kKeys;
      const V delta = broadcast(s.delta[r]);
      alignas(64) T dropped[kKeys];
      if (dropout.on) {
        uint32_t words[kKeys];
        dropout.draw(q, r, j0, words);
        const V by = broadcast(T(dropout.inverse));
        for (int64_t j = 0; j < kKeys; j += kWidth) {
          const auto stays = keep_mask<T>(words + j, dropout.threshold);
          store(dropped + j, stays ? load(p + j) * by : V{});
          store(ds + j, stays ? load(ds + j) * by : V{});
        }
      }
      V sum = {};
#pragma GCC unroll 8
      for (int64_t j = 0; j < kKeys; j += kWidth) {
        const V weight = load(p + j);
        V x = weight * (load(ds + j) - delta);
        if (partial) x = weight == V{} ? V{} : x;
        sum += x;
        store(ds + j, x);
      }
      s.dlse[r] += sum_of<T>(sum);
      if (gradients & kMaskGradients) add_to_mask(q, r, j0, n, ds);
      if (a.softcap > 0) {
        const T* t = s.capped + r * kKeys;
        for (int64_t j = 0; j < kKeys; j += kWidth) {
          const V d = load(ds + j);
          const V x = d * fma(-load(t + j), load(t + j), broadcast(T(1)));
          store(ds + j, d == V{} ? V{} : x);
        }
      }
      if (dropout.on) memcpy(p, dropped, sizeof(dropped));
    }
    if (gradients & kQueryGradients) {
      if (masked_keys) {
        masked_product<LeftLayout::kRows>(q.n, n, s.ds, kKeys, visible, packed.keys + j0 * ldk, ldk, strips * kStrip<T>,
                                          s.dq, ldk, Update::kAdd);
      } else {
        value_product<T>(q, j0, n, s.ds, RightOperand<T>{packed.keys + j0 * ldk, ldk, kStrip<T>}, strips, s.dq, ldk,
                         Update::kAdd, nullptr);
      }
    }
    if (gradients & kKeyGradients) {
      const auto to_keys = [&](const T* left, const T* rows, int64_t ld, int64_t columns, T* to) {
        if (masked_queries) {
          masked_product<LeftLayout::kColumns>(n, q.n, left, kKeys, visible, rows, ld, columns * kStrip<T>, to, ld,
                                               Update::kAdd);
        } else {
          transposed_product(q, j0, n, left, RightOperand<T>{rows, ld, kStrip<T>}, columns, to, ld);
        }
      };
      to_keys(s.ds, s.q, ldk, strips, dk);
      if (!of_weights) to_keys(s.p, s.dout, ldv, stripsv, dv);
    }
  }

  void add_to_mask(const QueryBlock& q, int64_t r, int64_t j0, int64_t n, const T* ds) const {
    T* to = sums + q.b * mask_strides[0] + q.head[r] * mask_strides[1] + q.i[r] * mask_strides[2];
    if (mask_strides[3] == 0 && a.Tk > 1) {
      V sum = {};
      for (int64_t j = 0; j < kKeys; j += kWidth) sum += load(ds + j);
      *to += sum_of<T>(sum);
      return;
    }
    to += j0;
    for (int64_t j = 0; j < n; j += kWidth) store(to + j, load(to + j, n - j) + load(ds + j), n - j);
  }

  // Results.

  void write_rows(const AttentionTensor& x, int64_t b, int64_t h, int64_t t, int64_t n, int64_t D, const T* from,
                  int64_t ld, T scale) const {
    if (x.data == nullptr) return;
    for (int64_t r = 0; r < n; ++r) {
      S* to = mutable_row_of<S>(x, b, h, t + r);
      for (int64_t d = 0; d < D; d += kWidth) store(to + d, load(from + r * ld + d) * scale, D - d);
    }
  }
  void zero_rows(const AttentionTensor& x, int64_t b, int64_t h, int64_t t, int64_t end, int64_t D) const {
    if (x.data == nullptr) return;
    for (; t < end; ++t) zero_bytes(mutable_row_of<S>(x, b, h, t), D * int64_t{sizeof(S)});
  }
  // Stores dq of a block; for the weights, also dlse.
  void write_queries(const QueryBlock& q, const Scratch& s) const {
    const int64_t begin = a.sequences[q.b].q_begin;
    for (int64_t r = 0; r < q.n; ++r) {
      write_rows(args.dq, q.b, q.head[r], begin + q.i[r], 1, a.D, s.dq + r * ldk, ldk, T(a.scale));
      if (args.dlse_out != nullptr) {
        static_cast<T*>(args.dlse_out)[q.b * a.lse_b + q.head[r] * a.lse_h + begin + q.i[r]] = -s.dlse[r];
      }
    }
  }
  void write_keys(int64_t b, int64_t hk, int64_t j0, int64_t n, const T* dk, const T* dv) const {
    const int64_t begin = a.sequences[b].k_begin;
    write_rows(args.dk, b, hk, begin + j0, n, a.D, dk, ldk, T(a.scale));
    write_rows(args.dv, b, hk, begin + j0, n, a.Dv, dv, ldv, T(1));
  }
  // Zeroes the gradients of rows past the sequence lengths.
  void fill_padding(int64_t b, int64_t hk) const {
    if (a.packed) return;
    const AttentionSequence& s = a.sequences[b];
    for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
      zero_rows(args.dq, b, h, s.q_length, a.Tq, a.D);
      for (int64_t i = s.q_length; args.dlse_out != nullptr && i < a.Tq; ++i) {
        static_cast<T*>(args.dlse_out)[b * a.lse_b + h * a.lse_h + i] = 0;
      }
    }
    zero_rows(args.dk, b, hk, s.k_length, a.Tk, a.D);
    zero_rows(args.dv, b, hk, s.k_length, a.Tk, a.Dv);
  }

  // Selects a block of one head's queries. In a backward pass, blocks do not span heads.
  static int64_t blocks_of(const AttentionSequence& s) { return ceil_div(s.q_length, kRows); }
  void set(Queries& q, int64_t b, int64_t h, int64_t block) const {
    q.set(a, b, h, 1, block * kRows, min(kRows, a.sequences[b].q_length - block * kRows));
  }

  // Expected duration on one thread, in ns, of a pass that takes `forwards` times as long as forward.
  double expected(double forwards) const {
    double pairs = 0;
    for (int64_t b = 0; b < a.B; ++b) pairs += cost_of(a, a.sequences[b]) * double(a.Hk);
    return forwards * attention::nanoseconds(pairs, a.D, a.Dv);
  }

  // One pass.

  // Whether two passes over all blocks (7 products instead of 5) take less time than one pass with few tasks.
  bool two_passes_faster(const TaskGroups& task_groups, int64_t threads) const {
    const int64_t count = task_groups.count();
    if (count >= 8 * threads && !task_groups.merge_b) return false;
    double all = 0, most = 0;
    for (int64_t i = 0; i < count; ++i) {
      double cost = 0;
      task_groups.each(i, [&](int64_t b, int64_t) { cost += cost_of(a, a.sequences[b]); });
      all += cost;
      most = maximum(most, cost);
    }
    const double rounds = double(ceil_div(count, threads));
    const double of_one =
        maximum(maximum(all / double(threads), most), all / double(maximum(count, int64_t{1})) * rounds);
    return of_one * 5 > all / double(threads) * 7;
  }

  void run_one_pass(const TaskGroups& task_groups, int64_t threads) const {
    const int64_t count = task_groups.count(), n = round_up(longest, kKeys);
    Tasks tasks(count);
    for (int64_t i = 0; i < count; ++i) {
      double cost = 0;
      task_groups.each(i, [&](int64_t b, int64_t) { cost += cost_of(a, a.sequences[b]); });
      tasks.set(i, cost);
    }
    tasks.sort();
    const int gradients = kQueryGradients | kKeyGradients | (args.dmask != nullptr ? kMaskGradients : 0);
    run_tasks<T>(threads, count, scratch_size() + packed_size() + padded_size(n * ldk) + padded_size(n * ldv),
                 expected(attention::kBackwardOverForward), [&](int64_t task, T* memory) {
                   const Scratch s = carve(memory);
                   const Packed packed = packed_at(memory);
                   T *dk = take(memory, n * ldk), *dv = take(memory, n * ldv);
                   task_groups.each(tasks.at(task), [&](int64_t b, int64_t hk) {
                     backward_group(b, hk, s, packed, dk, dv, gradients);
                   });
                 });
  }

  void backward_group(int64_t b, int64_t hk, const Scratch& s, const Packed& packed, T* dk, T* dv,
                      int gradients) const {
    const AttentionSequence& of = a.sequences[b];
    const int64_t n = round_up(of.k_length, kKeys);
    fill_padding(b, hk);
    zero_bytes(dk, n * ldk * int64_t{sizeof(T)});
    zero_bytes(dv, n * ldv * int64_t{sizeof(T)});
    const KeyRange keys = Blocks(a, b).keys(a);
    for (int64_t j0 = keys.lo / kKeys * kKeys; j0 < keys.hi; j0 += kKeys) pack_block(b, hk, j0, packed);
    Queries q;
    for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
      for (int64_t block = 0; block < blocks_of(of); ++block) {
        set(q, b, h, block);
        load_queries(q, s);
        renormalise(q, packed, s);
        for (int64_t j0 = q.any_keys.lo / kKeys * kKeys; j0 < q.any_keys.hi; j0 += kKeys) {
          keys_block(q, j0, packed, s, dk + j0 * ldk, dv + j0 * ldv, gradients);
        }
        write_queries(q, s);
      }
    }
    write_keys(b, hk, 0, of.k_length, dk, dv);
  }

  // Two passes: over blocks of keys, and over blocks of queries.

  void run_two_passes(const TaskGroups& task_groups, int64_t threads) const {
    const int64_t size = packed_size();
    const Memory memory(size_t(groups * size) * sizeof(T));
    const auto packed_of = [&](int64_t b, int64_t hk) {
      T* at = reinterpret_cast<T*>(memory.get()) + (b * a.Hk + hk) * size;
      return packed_at(at);
    };
    const int64_t key_blocks = ceil_div(longest, kKeys);
    const double packing = 0.3 * double(groups * longest * (a.D + a.Dv)),
                 of_pass = expected(0.7 * attention::kBackwardOverForward);
    run_tasks<T>(threads, groups * (key_blocks + 1), 0, packing, [&](int64_t task, T*) {
      const int64_t g = task / (key_blocks + 1), j0 = task % (key_blocks + 1) * kKeys, b = g / a.Hk, hk = g % a.Hk;
      if (j0 == key_blocks * kKeys) return fill_padding(b, hk);
      if (j0 < a.sequences[b].k_length) pack_block(b, hk, j0, packed_of(b, hk));
    });
    const bool of_mask = args.dmask != nullptr, by_row = of_mask && args.mask_shape[2] > 1;
    const TaskGroups own{a.B, a.Hk, false, false};

    // Keys: a task is a block of keys. Blocks that add to the same sums of the mask's gradient form one task.
    const TaskGroups& for_keys = of_mask && !by_row ? task_groups : own;
    const int64_t of_keys = for_keys.count();
    Tasks keys(of_keys * key_blocks);
    for (int64_t i = 0; i < of_keys * key_blocks; ++i) {
      double cost = 0;
      for_keys.each(i / key_blocks, [&](int64_t b, int64_t) { cost += double(queries_of(b, i % key_blocks * kKeys)); });
      keys.set(i, cost);
    }
    keys.sort();
    const int wanted_of_keys = kKeyGradients | (of_mask && !by_row ? kMaskGradients : 0);
    run_tasks<T>(threads, keys.count(), scratch_size() + padded_size(kKeys * ldk) + padded_size(kKeys * ldv), of_pass,
                 [&](int64_t place, T* mine) {
                   const Scratch s = carve(mine);
                   T *dk = take(mine, kKeys * ldk), *dv = take(mine, kKeys * ldv);
                   const int64_t task = keys.at(place), j0 = task % key_blocks * kKeys;
                   for_keys.each(task / key_blocks, [&](int64_t b, int64_t hk) {
                     const AttentionSequence& of = a.sequences[b];
                     if (j0 >= of.k_length) return;
                     memset(static_cast<void*>(dk), 0, size_t(kKeys * ldk) * sizeof(T));
                     memset(static_cast<void*>(dv), 0, size_t(kKeys * ldv) * sizeof(T));
                     const Packed packed = packed_of(b, hk);
                     Queries q;
                     for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
                       for (int64_t block = 0; block < blocks_of(of); ++block) {
                         set(q, b, h, block);
                         if (j0 + kKeys <= q.any_keys.lo || j0 >= q.any_keys.hi) continue;
                         load_queries(q, s);
                         renormalise(q, packed, s);
                         keys_block(q, j0, packed, s, dk, dv, wanted_of_keys);
                       }
                     }
                     write_keys(b, hk, j0, min(kKeys, of.k_length - j0), dk, dv);
                   });
                 });

    // Queries: a task is a block of queries of one head, or of all heads that add to the same sums.
    const TaskGroups& for_queries = by_row ? task_groups : own;
    const int64_t query_blocks = [&] {
      int64_t most = 0;
      for (int64_t b = 0; b < a.B; ++b) most = maximum(most, blocks_of(a.sequences[b]));
      return most;
    }();
    const int64_t of_queries = for_queries.count() * query_blocks;
    Tasks queries(of_queries);
    for (int64_t i = 0; i < of_queries; ++i) {
      double cost = 0;
      for_queries.each(i / query_blocks, [&](int64_t b, int64_t) {
        const KeyRange range =
            keys_of(a, a.sequences[b], min(i % query_blocks * kRows + kRows, a.sequences[b].q_length) - 1);
        if (i % query_blocks < blocks_of(a.sequences[b])) cost += double(range.hi - range.lo + kRows);
      });
      queries.set(i, cost);
    }
    queries.sort();
    const int wanted_of_queries = kQueryGradients | (by_row ? kMaskGradients : 0);
    run_tasks<T>(threads, of_queries, scratch_size(), of_pass, [&](int64_t place, T* mine) {
      const Scratch s = carve(mine);
      const int64_t task = queries.at(place), block = task % query_blocks;
      for_queries.each(task / query_blocks, [&](int64_t b, int64_t hk) {
        if (block >= blocks_of(a.sequences[b])) return;
        const Packed packed = packed_of(b, hk);
        Queries q;
        for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
          set(q, b, h, block);
          load_queries(q, s);
          renormalise(q, packed, s);
          for (int64_t j0 = q.any_keys.lo / kKeys * kKeys; j0 < q.any_keys.hi; j0 += kKeys) {
            keys_block(q, j0, packed, s, nullptr, nullptr, wanted_of_queries);
          }
          write_queries(q, s);
        }
      });
    });
  }
  // Approximate number of queries that attend to a block of keys.
  int64_t queries_of(int64_t b, int64_t j0) const {
    const AttentionSequence& s = a.sequences[b];
    int64_t n = 0;
    if (j0 >= s.k_length) return 0;
    for (int64_t i = 0; i < s.q_length; i += kRows) {
      const KeyRange keys = keys_of(a, s, min(i + kRows, s.q_length) - 1);
      n += keys.lo < j0 + kKeys && keys.hi > j0 ? kRows : 0;
    }
    return n;
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  dispatch(args.forward.dtype, [&](auto s) { Backward<decltype(s)>(args).run(); });
}

void attention_weights(const AttentionArgs& args, void* weights) {
  AttentionBackwardArgs none{};
  none.forward = args;
  dispatch(args.dtype, [&](auto s) { Backward<decltype(s)>(none).run_weights(static_cast<decltype(s)*>(weights)); });
}

void attention_mean_weights(const AttentionArgs& args, void* mean) {
  AttentionBackwardArgs none{};
  none.forward = args;
  none.forward.v.data = nullptr;  // which the weights do not need
  if (args.dtype == DType::kFloat64) {
    Backward<double>(none).run_mean_weights(static_cast<double*>(mean));
  } else {
    Backward<float>(none).run_mean_weights(static_cast<float*>(mean));
  }
}

}  // namespace seqkernels::SEQKERNELS_ISA
