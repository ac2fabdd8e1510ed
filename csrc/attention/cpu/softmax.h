// An online softmax over blocks of keys: state, update, merge and results. Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/cpu/blocks.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/tiles.h"
#include "common/bytes.h"
#include "common/packing.h"

namespace seqkernels::SEQKERNELS_ISA {

// State of an online softmax: per row the largest score, the sum of exponentials (per lane) and the weighted values.
template <class T>
struct SoftmaxState {
  T* top;     // [rows]
  T* sum;     // [rows][kLanes]
  T* values;  // [rows][ldv]
};

template <class T>
class OnlineSoftmax {
 public:
  using V = Native<T>;
  static constexpr int kWidth = kLanes<T>;

  // most_rows: the largest number of rows of a block of queries.
  OnlineSoftmax(const AttentionArgs& args, T scale_of_tile, int64_t most_rows)
      : a(args),
        dropout(args),
        ldq(leading<T>(args.D)),
        ldv(leading<T>(args.Dv)),
        stripsv(ceil_div(maximum(args.Dv, int64_t{1}), kStrip<T>)),
        rows(round_up(most_rows, kWidth)),
        factor(scale_of_tile) {}

  const AttentionArgs& a;
  const Dropout dropout;
  const int64_t ldq, ldv, stripsv;
  const int64_t rows;  // of a state, in whole vectors
  const T factor;      // turns a difference of tile values into one of scores

  // Memory, in elements of T.

  static int64_t padded_size(int64_t n) { return round_up(n, 64 / int64_t(sizeof(T))); }
  int64_t state_size() const { return padded_size(rows) + padded_size(rows * kWidth) + padded_size(rows * ldv); }
  SoftmaxState<T> take_state(T*& at) const {
    SoftmaxState<T> r;
    r.top = take(at, rows);
    r.sum = take(at, rows * kWidth);
    r.values = take(at, rows * ldv);
    return r;
  }

  // Copies the rows of a block of queries.
  template <class S>
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
  void softmax(const QueryBlock& q, int64_t j0, KeyRange columns, bool first, T* tile, T* alpha,
               const SoftmaxState<T>& run) const {
    const int64_t begin = kWhole ? 0 : columns.lo, end = kWhole ? kKeys : columns.hi;
    const T minus_infinity = -std::numeric_limits<T>::infinity();
    alignas(64) T next[kRows];
    if (first) {
      for (int64_t r = 0; r < rows; ++r) run.top[r] = minus_infinity;
    }
    row_tops<kWhole>(q.n, columns, tile, run.top, next);
    rescale(q.n, run.top, next, alpha);
    for (int64_t r = 0; r < q.n; ++r) {
      T* row = tile + r * kKeys;
      const V top = broadcast(run.top[r] == minus_infinity ? T(0) : run.top[r]), by = broadcast(factor);
      V sum = {};
#pragma GCC unroll 8
      for (int64_t j = begin; j < end; j += kWidth) {
        const V e = exp<T>((load(row + j) - top) * by);
        sum += e;
        store(row + j, e);
      }
      T* sums = run.sum + r * kWidth;
      store(sums, first ? sum : fma(load(sums), broadcast(alpha[r]), sum));
    }
    if (dropout.on) {
      for (int64_t r = 0; r < q.n; ++r) {
        uint32_t words[kKeys];
        dropout.draw(q, r, j0, words);
        T* row = tile + r * kKeys;
        for (int64_t j = begin; j < end; j += kWidth) {
          store(row + j, keep_mask<T>(words + j, dropout.threshold) ? load(row + j) : V{});
        }
      }
    }
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

  // Results.

  template <class S>
  void write_output(const QueryBlock& q, const SoftmaxState<T>* state) const {
    const AttentionSequence& s = a.sequences[q.b];
    const T scale_of_top = factor;
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
  template <class S>
  void fill_padding(int64_t b, int64_t hk) const {
    if (a.packed) return;
    for (int64_t h = hk * a.group(); h < (hk + 1) * a.group(); ++h) {
      for (int64_t i = a.sequences[b].q_length; i < a.Tq; ++i) {
        S* out = mutable_row_of<S>(a.out, b, h, i);
        for (int64_t d = 0; d < a.Dv; ++d) out[d * a.out.d] = S{};
        if (a.out_low.data != nullptr) zero_bytes(mutable_row_of<S>(a.out_low, b, h, i), a.Dv * int64_t{sizeof(S)});
        static_cast<T*>(a.lse)[b * a.lse_b + h * a.lse_h + i] = -std::numeric_limits<T>::infinity();
      }
    }
  }
};

}  // namespace seqkernels::SEQKERNELS_ISA
