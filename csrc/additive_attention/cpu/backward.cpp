// Backward pass of additive attention: gradients of q, k, value and v from the saved weights.
//
// Per sequence, the gradient g of the scores and that of the values are products of tiles. Given g, each hidden unit is
// independent: a task is a slice of the units of one sequence, which sums its parts of dq and dk without sharing them.
// dv is summed per sequence, then over the sequences in order. Bits depend neither on the threads nor, but for dv, on
// the batch.
#include <cstring>

#include "additive_attention/cpu/reciprocal.h"
#include "common/bytes.h"
#include "common/packing.h"
#include "common/parallel.h"
#include "common/products.h"
#include "common/schedule.h"

namespace seqkernels::SEQKERNELS_ISA {

void additive_attention_backward(const AdditiveAttentionBackwardArgs& args);

namespace {

constexpr int64_t kVectorsOfSlice = 8;
constexpr int kQueryRows = 4;  // queries of a tile: their exponentials and sums stay in registers

template <class S>
struct Backward {
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>, kSlice = kVectorsOfSlice * kWidth;

  const AdditiveAttentionBackwardArgs& args;
  const AdditiveAttentionArgs& a = args.attention;
  const int64_t slices = ceil_div(a.H, kSlice);

  void run() const {
    const int64_t threads = threads_for(nanoseconds(a));
    const int64_t scores = a.B * a.Tq * a.Tk, sums = a.B, rows = a.B * (a.Tq + a.Tk);
    const Memory memory(size_t(scores + sums + a.B * a.H + 64) * sizeof(T) + size_t(rows));
    T* const g = reinterpret_cast<T*>(memory.get());
    const Shared shared{g, g + scores, g + scores + sums, reinterpret_cast<bool*>(g + scores + sums + a.B * a.H)};
    const int64_t ldv = leading<T>(a.Dv), ldt = round_up(a.Tk, kStrip<T>);
    const int64_t size = a.Tq * ldv + ldt * a.Dv + a.Tq * ldt + a.Tk * ldv + 64 * 4;
    const double expected = nanoseconds(a);  // of each of the two passes
    run_tasks<T>(threads, a.B, size, expected, [&](int64_t b, T* scratch) { gradient_of_scores(b, shared, scratch); });
    Tasks tasks(a.B * slices);
    for (int64_t i = 0; i < tasks.count(); ++i) tasks.set(i, double(a.keys(i / slices)));
    tasks.sort();
    const int64_t of_slice = 2 * (a.Tq + a.Tk + 2) * kWidth + 64 * 4;
    run_tasks<T>(threads, tasks.count(), of_slice, expected, [&](int64_t place, T* scratch) {
      const int64_t task = tasks.at(place);
      slice(task / slices, task % slices * kSlice, shared, scratch);
    });
    for (int64_t h = 0; h < a.H; h += kWidth) {
      V sum = {};
      for (int64_t b = 0; b < a.B; ++b) sum += load(shared.dv + b * a.H + h, a.H - h);
      store(static_cast<S*>(args.dv) + h, sum, a.H - h);
    }
  }

 private:
  // Arrays that tasks of different sequences fill.
  struct Shared {
    T* g;          // [B, Tq, Tk] gradient of the scores
    T* sum_of_g;   // [B]
    T* dv;         // [B, H]
    bool* within;  // [B, Tq + Tk] whether a row of q, then of k, is within the bound of the reciprocal form
  };

  void gradient_of_scores(int64_t b, const Shared& shared, T* memory) const {
    const int64_t n = a.keys(b), Tq = a.Tq, Tk = a.Tk, Dv = a.Dv;
    const int64_t ldv = leading<T>(Dv), ldt = round_up(Tk, kStrip<T>);
    const S* value = static_cast<const S*>(a.value) + b * Tk * Dv;
    const T* weights = static_cast<const T*>(a.weights) + b * Tq * Tk;
    const T* dweights = args.dweights == nullptr ? nullptr : static_cast<const T*>(args.dweights) + b * Tq * Tk;
    S* dvalue = static_cast<S*>(args.dvalue) + b * Tk * Dv;
    T *dout = take(memory, Tq * ldv), *columns = take(memory, ldt * Dv), *products = take(memory, Tq * ldt),
      *of_values = take(memory, Tk * ldv);
    zero_bytes(products, Tq * ldt * int64_t{sizeof(T)});
    if (args.dout != nullptr && Dv > 0) {
      pack_rows(static_cast<const S*>(args.dout) + b * Tq * Dv, Dv, 1, Tq, Dv, dout, ldv);
      pack_strips(value, Dv, 1, n, Dv, columns);
      product(Tq, Dv, dout, ldv, RightOperand<T>{columns, kStrip<T>, Dv * kStrip<T>}, ceil_div(n, kStrip<T>), products,
              ldt, Update::kReplace);
      product<LeftLayout::kColumns>(n, Tq, weights, Tk, RightOperand<T>{dout, ldv, kStrip<T>}, ceil_div(Dv, kStrip<T>),
                                    of_values, ldv, Update::kReplace);
      for (int64_t j = 0; j < n; ++j) convert(dvalue + j * Dv, of_values + j * ldv, Dv);
      zero_bytes(dvalue + n * Dv, (Tk - n) * Dv * int64_t{sizeof(S)});
    } else {
      zero_bytes(dvalue, Tk * Dv * int64_t{sizeof(S)});
    }
    T total = 0;
    for (int64_t i = 0; i < Tq; ++i) {
      const T* p = weights + i * Tk;
      const T* of_weights = dweights == nullptr ? nullptr : dweights + i * Tk;
      T* const to = shared.g + (b * Tq + i) * Tk;
      T* const dp = products + i * ldt;
      V dot = {};
      for (int64_t j = 0; j < n; j += kWidth) {
        const V w = load(p + j, n - j),
                d = of_weights == nullptr ? load(dp + j) : load(dp + j) + load(of_weights + j, n - j);
        store(dp + j, d);
        dot += w == V{} ? V{} : w * d;  // a hidden key has no gradient, whatever its value
      }
      const V mean = broadcast(sum_of<T>(dot));
      V sum = {};
      for (int64_t j = 0; j < n; j += kWidth) {
        const V w = load(p + j, n - j), x = w == V{} ? V{} : w * (load(dp + j) - mean);
        store(to + j, x, n - j);
        sum += x;
      }
      total += sum_of<T>(sum);
    }
    shared.sum_of_g[b] = total;
    bool* within = shared.within + b * (Tq + Tk);
    for (int64_t i = 0; i < Tq; ++i) {
      within[i] = within_bound(static_cast<const S*>(a.q) + (b * Tq + i) * a.H, a.H);
    }
    for (int64_t j = 0; j < n; ++j) {
      within[Tq + j] = within_bound(static_cast<const S*>(a.k) + (b * Tk + j) * a.H, a.H);
    }
  }

  void slice(int64_t b, int64_t h0, const Shared& shared, T* memory) const {
    const int64_t Tq = a.Tq, n = a.keys(b), end = min(a.H, h0 + kSlice);
    const bool* within = shared.within + b * (Tq + a.Tk);
    T *exp_q = take(memory, Tq * kWidth), *exp_k = take(memory, n * kWidth), *dq = take(memory, Tq * kWidth),
      *dk = take(memory, n * kWidth);
    for (int64_t h = h0; h < end; h += kWidth) {
      const int64_t lanes = min(kWidth, a.H - h);
      const S* q = static_cast<const S*>(a.q) + b * Tq * a.H + h;
      const S* k = static_cast<const S*>(a.k) + b * a.Tk * a.H + h;
      for (int64_t i = 0; i < Tq; ++i) exp_row(q + i * a.H, lanes, within[i], exp_q + i * kWidth, true);
      if (a.exp_k != nullptr) {
        const T* from = static_cast<const T*>(a.exp_k) + b * a.Tk * a.H + h;
        for (int64_t j = 0; j < n; ++j) store(exp_k + j * kWidth, load(from + j * a.H, lanes));
      } else {
        for (int64_t j = 0; j < n; ++j) exp_row(k + j * a.H, lanes, within[Tq + j], exp_k + j * kWidth, true);
      }
      zero_bytes(dk, n * kWidth * int64_t{sizeof(T)});
      const T* g = shared.g + b * Tq * a.Tk;
      V of_r = {};  // sum of g r
      int64_t i = 0;
      for (; i + kQueryRows <= Tq; i += kQueryRows) {
        of_r += tile<kQueryRows>(n, exp_q + i * kWidth, exp_k, g + i * a.Tk, dq + i * kWidth, dk);
      }
      for (; i < Tq; ++i) of_r += tile<1>(n, exp_q + i * kWidth, exp_k, g + i * a.Tk, dq + i * kWidth, dk);
      of_r += exact_pairs(b, h, lanes, shared, dq, dk);
      const V v = load(static_cast<const S*>(a.v) + h, lanes), factor = v * T(4);
      S* to_q = static_cast<S*>(args.dq) + b * Tq * a.H + h;
      S* to_k = static_cast<S*>(args.dk) + b * a.Tk * a.H + h;
      for (int64_t i = 0; i < Tq; ++i) store(to_q + i * a.H, load(dq + i * kWidth) * factor, lanes);
      for (int64_t j = 0; j < n; ++j) store(to_k + j * a.H, load(dk + j * kWidth) * factor, lanes);
      for (int64_t j = n; j < a.Tk; ++j) store(to_k + j * a.H, V{}, lanes);
      store(shared.dv + b * a.H + h, broadcast(shared.sum_of_g[b]) - (of_r + of_r), lanes);
    }
  }

  // One vector of units, kR queries and all keys. Not inlined: the sums stay in registers.
  template <int kR>
  __attribute__((noinline)) static V tile(int64_t n, const T* exp_q, const T* exp_k, const T* g, T* dq, T* dk,
                                          int64_t ldg) {
    V x[kR], of_q[kR] = {}, of_r[2] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kR; ++i) x[i] = load(exp_q + i * kWidth);
    for (int64_t j = 0; j < n; ++j) {
      const V y = load(exp_k + j * kWidth);
      V of_k = load(dk + j * kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < kR; ++i) {
        const PairOfRows<T> pair = by_reciprocal<T>(x[i], y);
        const V upstream = broadcast(g[i * ldg + j]);
        of_q[i] = fma(upstream, pair.slope, of_q[i]);
        of_k = fma(upstream, pair.slope, of_k);
        of_r[i % 2] = fma(upstream, pair.r, of_r[i % 2]);
      }
      store(dk + j * kWidth, of_k);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kR; ++i) store(dq + i * kWidth, of_q[i]);
    return of_r[0] + of_r[1];
  }
  template <int kR>
  V tile(int64_t n, const T* exp_q, const T* exp_k, const T* g, T* dq, T* dk) const {
    return tile<kR>(n, exp_q, exp_k, g, dq, dk, a.Tk);
  }

  // Adds the pairs that are not within the bound, which `tile` computed with r = 1 and a slope of 0. Returns the
  // correction of the sum of g r.
  V exact_pairs(int64_t b, int64_t h, int64_t lanes, const Shared& shared, T* dq, T* dk) const {
    const int64_t Tq = a.Tq, n = a.keys(b);
    const bool* within = shared.within + b * (Tq + a.Tk);
    bool all = true;
    for (int64_t i = 0; i < Tq; ++i) all &= within[i];
    for (int64_t j = 0; j < n; ++j) all &= within[Tq + j];
    V of_r = {};
    if (all) return of_r;
    const S* q = static_cast<const S*>(a.q) + b * Tq * a.H + h;
    const S* k = static_cast<const S*>(a.k) + b * a.Tk * a.H + h;
    for (int64_t i = 0; i < Tq; ++i) {
      const T* g = shared.g + (b * Tq + i) * a.Tk;
      for (int64_t j = 0; j < n; ++j) {
        if ((within[i] && within[Tq + j]) || g[j] == 0) continue;
        const PairOfRows<T> pair = by_tanh<T>(load(q + i * a.H, lanes), load(k + j * a.H, lanes));
        const V upstream = broadcast(g[j]);
        store(dq + i * kWidth, fma(upstream, pair.slope, load(dq + i * kWidth)));
        store(dk + j * kWidth, fma(upstream, pair.slope, load(dk + j * kWidth)));
        of_r = fma(upstream, pair.r - T(1), of_r);
      }
    }
    return of_r;
  }
};

}  // namespace

void additive_attention_backward(const AdditiveAttentionBackwardArgs& args) {
  dispatch(args.attention.dtype, [&](auto s) { Backward<decltype(s)>{args}.run(); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
