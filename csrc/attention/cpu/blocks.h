// A block of queries against a block of keys: visible keys, and products restricted to them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/cpu/dropout.h"
#include "attention/cpu/tiles.h"
#include "common/parallel.h"
#include "common/products.h"

namespace seqkernels::SEQKERNELS_ISA {

template <class S>
inline const S* row_of(const AttentionTensor& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<const S*>(x.data) + b * x.b + h * x.h + t * x.t;
}
template <class S>
inline S* mutable_row_of(const AttentionTensor& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<S*>(x.data) + b * x.b + h * x.h + t * x.t;
}

struct KeyRange {
  int64_t lo, hi;
};

// The keys that row i of a sequence may attend to by its position (causal mask and window).
inline KeyRange keys_of(const AttentionArgs& a, const AttentionSequence& s, int64_t i) {
  const int64_t at = i + (a.causal == Causal::kLowerRight ? s.k_length - s.q_length : 0);
  int64_t lo = 0, hi = s.k_length;
  if (a.causal != Causal::kNone) hi = min(hi, at + 1);
  if (a.window_right >= 0) hi = min(hi, at + a.window_right + 1);
  if (a.window_left >= 0 && at - a.window_left > 0) lo = at - a.window_left;
  return lo < hi ? KeyRange{lo, hi} : KeyRange{0, 0};
}

// Number of threads for a call.
inline int64_t threads_for(const AttentionArgs& a) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < a.B; ++b) pairs += a.sequences[b].q_length * a.sequences[b].k_length;
  return seqkernels::threads_for(attention::nanoseconds(double(a.Hq * pairs), a.D, a.Dv));
}

// Up to kRows queries of one sequence, from heads that share their keys.
struct QueryBlock {
  int64_t n, b;
  int64_t head[kRows], i[kRows];
  KeyRange keys[kRows];
  KeyRange any_keys;       // keys that any row attends to
  int64_t lo_all, hi_all;  // keys that every row attends to, if lo_all < hi_all

  // Selects `rows` rows from i0 on of `heads` heads from h0 on.
  void set(const AttentionArgs& a, int64_t sequence, int64_t h0, int64_t heads, int64_t i0, int64_t rows) {
    const AttentionSequence& s = a.sequences[sequence];
    b = sequence;
    n = 0;
    any_keys = {s.k_length, 0};
    lo_all = 0;
    hi_all = s.k_length;
    for (int64_t h = h0; h < h0 + heads; ++h) {
      for (int64_t r = i0; r < i0 + rows; ++r, ++n) {
        head[n] = h;
        i[n] = r;
        keys[n] = keys_of(a, s, r);
        lo_all = keys[n].lo > lo_all ? keys[n].lo : lo_all;
        hi_all = min(hi_all, keys[n].hi);
        if (keys[n].lo < keys[n].hi) {
          any_keys.lo = min(any_keys.lo, keys[n].lo);
          any_keys.hi = keys[n].hi > any_keys.hi ? keys[n].hi : any_keys.hi;
        }
      }
    }
    if (any_keys.lo >= any_keys.hi) any_keys = {0, 0};
  }
  bool all_visible(int64_t j0) const { return lo_all <= j0 && j0 + kKeys <= hi_all; }
  // The range of keys, relative to j0 and within kKeys, that any row of [r0, r1) may attend to.
  KeyRange visible_keys(int64_t r0, int64_t r1, int64_t j0) const {
    KeyRange all{kKeys, 0};
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t lo = keys[r].lo > j0 ? keys[r].lo - j0 : 0, hi = min(keys[r].hi - j0, kKeys);
      if (lo >= hi) continue;
      all.lo = min(all.lo, lo);
      all.hi = hi > all.hi ? hi : all.hi;
    }
    return all.lo < all.hi ? all : KeyRange{0, 0};
  }
  // The range of rows that may attend to any key of [lo, hi).
  KeyRange attending_rows(int64_t lo, int64_t hi) const {
    KeyRange rows{n, 0};
    for (int64_t r = 0; r < n; ++r) {
      if (keys[r].lo >= hi || keys[r].hi <= lo) continue;
      rows.lo = min(rows.lo, r);
      rows.hi = r + 1;
    }
    return rows.lo < rows.hi ? rows : KeyRange{0, 0};
  }
};
constexpr int64_t kRowsTogether = 12;  // rows that share bounds in a partially visible block: whole tiles
constexpr int64_t kKeysTogether = 16;  // keys that share bounds

// Scores: C = A B for a tile [q.n][kKeys]. Strips that are invisible to all kRowsTogether rows are not written.
template <class T>
inline void score_product(const QueryBlock& q, int64_t j0, int64_t k, const T* a, int64_t lda, RightOperand<T> right,
                          T* c) {
  if (q.all_visible(j0)) {
    return product(q.n, k, a, lda, right, kKeys / kStrip<T>, c, kKeys, Update::kReplace);
  }
  for (int64_t r = 0; r < q.n; r += kRowsTogether) {
    const int64_t rows = min(kRowsTogether, q.n - r);
    const KeyRange visible = q.visible_keys(r, r + rows, j0);
    const int64_t first = visible.lo / kStrip<T>, end = ceil_div(visible.hi, kStrip<T>);
    if (first < end) {
      product(rows, k, a + r * lda, lda, RightOperand<T>{right.b + first * right.strip, right.ldb, right.strip},
              end - first, c + r * kKeys + first * kStrip<T>, kKeys, Update::kReplace);
    }
  }
}

// Weighted values: C = A B for a tile [q.n][kKeys] of weights, skipping keys that are invisible to all kRowsTogether
// rows.
template <class T>
inline void value_product(const QueryBlock& q, int64_t j0, int64_t n, const T* tile, RightOperand<T> right,
                          int64_t strips, T* c, int64_t ldc, Update update, const T* factor) {
  if (q.all_visible(j0)) return product(q.n, n, tile, kKeys, right, strips, c, ldc, update, factor);
  for (int64_t r = 0; r < q.n; r += kRowsTogether) {
    const int64_t rows = min(kRowsTogether, q.n - r);
    const KeyRange visible = q.visible_keys(r, r + rows, j0);
    product(rows, visible.hi - visible.lo, tile + r * kKeys + visible.lo, kKeys,
            RightOperand<T>{right.b + visible.lo * right.ldb, right.ldb, right.strip}, strips, c + r * ldc, ldc, update,
            factor == nullptr ? nullptr : factor + r);
  }
}

// C += A^T B for a tile [q.n][kKeys] of weights, [n keys][..], skipping rows that attend to none of kKeysTogether keys.
template <class T>
inline void transposed_product(const QueryBlock& q, int64_t j0, int64_t n, const T* tile, RightOperand<T> right,
                               int64_t strips, T* c, int64_t ldc) {
  if (q.all_visible(j0)) return product<LeftLayout::kColumns>(n, q.n, tile, kKeys, right, strips, c, ldc, Update::kAdd);
  for (int64_t j = 0; j < n; j += kKeysTogether) {
    const int64_t keys = min(kKeysTogether, n - j);
    const KeyRange rows = q.attending_rows(j0 + j, j0 + j + keys);
    if (rows.lo < rows.hi) {
      product<LeftLayout::kColumns>(keys, rows.hi - rows.lo, tile + rows.lo * kKeys + j, kKeys,
                                    RightOperand<T>{right.b + rows.lo * right.ldb, right.ldb, right.strip}, strips,
                                    c + j * ldc, ldc, Update::kAdd);
    }
  }
}

// The query blocks of one group of heads; a block spans several heads if a sequence has few queries.
struct Blocks {
  int64_t b, heads, rows, head_blocks, row_blocks, count;
  Blocks(const AttentionArgs& a, int64_t sequence) : b(sequence), rows(a.sequences[sequence].q_length) {
    heads = attention::heads_of_block(rows, a.group());
    head_blocks = ceil_div(a.group(), heads);
    row_blocks = ceil_div(rows, kRows);
    count = head_blocks * row_blocks;
  }
  // Selects block i of the query heads of key head hk.
  void set(QueryBlock& q, const AttentionArgs& a, int64_t hk, int64_t i) const {
    const int64_t h = i / row_blocks * heads, i0 = i % row_blocks * kRows;
    q.set(a, b, hk * a.group() + h, min(heads, a.group() - h), i0, min(kRows, rows - i0));
  }
  // The range of keys that any query of the sequence may attend to.
  KeyRange keys(const AttentionArgs& a) const {
    const AttentionSequence& s = a.sequences[b];
    KeyRange all{s.k_length, 0};
    for (int64_t i = 0; i < rows; ++i) {  // the first or last rows may attend to no key
      const KeyRange one = keys_of(a, s, i);
      if (one.lo >= one.hi) continue;
      all.lo = min(all.lo, one.lo);
      all.hi = one.hi > all.hi ? one.hi : all.hi;
    }
    return all.lo < all.hi ? all : KeyRange{0, 0};
  }
};

// Approximate number of query-key pairs of one group of heads.
inline double cost_of(const AttentionArgs& a, const AttentionSequence& s) {
  double sum = 0;
  for (int64_t part = 0; part < 8 && s.q_length > 0; ++part) {
    const KeyRange keys = keys_of(a, s, s.q_length * part / 8);
    sum += double(keys.hi - keys.lo + kKeys);
  }
  return sum / 8 * double(s.q_length) * double(a.group());
}

// Dropout of a tile.
struct Dropout {
  bool on;
  uint64_t seed;
  int64_t threshold;
  double inverse;  // factor of the weights that are kept
  int64_t heads;
  explicit Dropout(const AttentionArgs& a)
      : on(a.dropout_p > 0),
        seed(a.seed),
        threshold(int64_t(__builtin_nearbyint(a.dropout_p * 4294967296.0))),
        inverse(a.dropout_p < 1 ? 1 / (1 - a.dropout_p) : 0),
        heads(a.Hq) {}
  void draw(const QueryBlock& q, int64_t r, int64_t j0, uint32_t* words) const {
    philox(seed, q.b * heads + q.head[r], q.i[r], j0, words);
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
