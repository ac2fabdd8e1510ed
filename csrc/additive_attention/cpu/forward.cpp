// Forward pass of additive attention. A task is a sequence, or a block of its queries where sequences are few. The
// weights of a query do not depend on other queries or on the batch.
#include <cstring>
#include <limits>

#include "additive_attention/cpu/reciprocal.h"
#include "common/packing.h"
#include "common/parallel.h"
#include "common/products.h"
#include "common/schedule.h"

namespace seqkernels::SEQKERNELS_ISA {

AdditiveAttentionKernels additive_attention_kernels();
void additive_attention_backward(const AdditiveAttentionBackwardArgs& args);

namespace {

constexpr int64_t kQueries = 32;  // of a task, where sequences are split

template <class S>
struct Forward {
  using T = Compute<S>;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>;

  const AdditiveAttentionForwardArgs& args;
  const AdditiveAttentionArgs& a = args.attention;
  const int64_t HV = round_up(a.H, kWidth), ldv = leading<T>(a.Dv), strips = ceil_div(a.Dv, kStrip<T>);
  // Whether the product reads the values where they are.
  const bool in_place = sizeof(S) == sizeof(T) && a.Dv % kStrip<T> == 0;

  void run() const {
    const int64_t threads = threads_for(nanoseconds(a));
    const int64_t blocks = a.B >= 2 * threads || threads == 1 ? 1 : ceil_div(a.Tq, kQueries);
    const int64_t rows = blocks == 1 ? a.Tq : kQueries;
    Tasks tasks(a.B * blocks);
    for (int64_t i = 0; i < tasks.count(); ++i) tasks.set(i, double(a.keys(i / blocks)));
    tasks.sort();
    const int64_t size = (a.exp_k == nullptr ? a.Tk * HV : 0) + (in_place ? 0 : a.Tk * ldv) + rows * ldv + 3 * HV + 64;
    run_tasks<T>(threads, tasks.count(), size, nanoseconds(a), [&](int64_t place, T* memory) {
      const int64_t task = tasks.at(place), b = task / blocks, i0 = task % blocks * rows;
      block(b, i0, min(rows, a.Tq - i0), memory);
    });
  }

 private:
  void block(int64_t b, int64_t i0, int64_t rows, T* memory) const {
    const int64_t n = a.keys(b);
    const S* k = static_cast<const S*>(a.k) + b * a.Tk * a.H;
    const S* value = static_cast<const S*>(a.value) + b * a.Tk * a.Dv;
    T *exp_q = take(memory, HV), *v = take(memory, HV), *out = take(memory, rows * ldv);
    const T* exp_k = static_cast<const T*>(a.exp_k) + b * a.Tk * a.H;
    int64_t ldk = a.H;
    if (a.exp_k == nullptr) {
      T* to = take(memory, n * HV);
      for (int64_t j = 0; j < n; ++j) {
        exp_row(k + j * a.H, a.H, within_bound(k + j * a.H, a.H), to + j * HV, true);
      }
      exp_k = to;
      ldk = HV;
    }
    V sum = {};
    for (int64_t h = 0; h < a.H; h += kWidth) {
      const V x = load(static_cast<const S*>(a.v) + h, a.H - h);
      store(v + h, x);
      sum += x;
    }
    const T sum_of_v = sum_of<T>(sum);
    T* const weights = static_cast<T*>(a.weights) + (b * a.Tq + i0) * a.Tk;
    const S* const q = static_cast<const S*>(a.q) + (b * a.Tq + i0) * a.H;
    for (int64_t i = 0; i < rows; ++i) {
      T* const row = weights + i * a.Tk;
      const bool* const visible = a.mask == nullptr ? nullptr : a.mask + b * a.mask_b + (i0 + i) * a.mask_q;
      const bool within = within_bound(q + i * a.H, a.H);
      if (within) {
        exp_row(q + i * a.H, a.H, true, exp_q, true);
        for (int64_t j = 0; j < n; j += kWidth)
          scores(exp_q, exp_k + j * ldk, ldk, v, sum_of_v, min(kWidth, n - j), row + j);
      }
      for (int64_t j = 0; j < n; ++j) {
        if ((!within || exp_k[j * ldk] == 0) && (visible == nullptr || visible[j])) {
          row[j] = exact_score(q + i * a.H, k + j * a.H, v, sum_of_v);
        }
      }
      softmax(row, n, visible);
      for (int64_t j = n; j < a.Tk; ++j) row[j] = 0;
    }
    if (a.Dv == 0) return;
    RightOperand<T> right{reinterpret_cast<const T*>(value), a.Dv, kStrip<T>};
    if (!in_place) {
      T* packed = take(memory, n * ldv);
      pack_rows(value, a.Dv, 1, n, a.Dv, packed, ldv);
      right = {packed, ldv, kStrip<T>};
    }
    product(rows, n, weights, a.Tk, right, strips, out, ldv, Update::kReplace);
    for (int64_t i = 0; i < rows; ++i) {
      if (a.mask != nullptr && !finite(out + i * ldv)) {
        skip_hidden(weights + i * a.Tk, n, a.mask + b * a.mask_b + (i0 + i) * a.mask_q, value, out + i * ldv);
      }
      convert(static_cast<S*>(args.out) + (b * a.Tq + i0 + i) * a.Dv, out + i * ldv, a.Dv);
    }
  }

  // Scores of one query and up to kWidth keys. The keys of a tile share the loads of the query.
  void scores(const T* exp_q, const T* exp_k, int64_t ldk, const T* v, T sum_of_v, int64_t keys, T* to) const {
    V sums[kWidth] = {};
    const T* rows[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) rows[j] = exp_k + min(j, keys - 1) * ldk;
    int64_t h = 0;
    for (; h + kWidth <= a.H; h += kWidth) {
      const V x = load(exp_q + h), of_v = load(v + h);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kWidth; ++j) {
        sums[j] = fma(of_v, reciprocal(fma(x, load(rows[j] + h), broadcast(T(1)))), sums[j]);
      }
    }
    if (h < a.H) {
      const V x = load(exp_q + h), of_v = load(v + h);
      for (int64_t j = 0; j < kWidth; ++j) {
        const V y = load(rows[j] + h, a.H - h);
        sums[j] = fma(of_v, reciprocal(fma(x, y, broadcast(T(1)))), sums[j]);
      }
    }
    transpose_block(sums);
    for (int64_t width = kWidth / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    store(to, broadcast(sum_of_v) - (sums[0] + sums[0]), keys);
  }

  T exact_score(const S* q, const S* k, const T* v, T sum_of_v) const {
    V sum = {};
    for (int64_t h = 0; h < a.H; h += kWidth) {
      sum = fma(load(v + h), by_tanh<T>(load(q + h, a.H - h), load(k + h, a.H - h)).r, sum);
    }
    return sum_of_v - 2 * sum_of<T>(sum);
  }

  // In place, over the visible keys; hidden ones get 0.
  static void softmax(T* row, int64_t n, const bool* visible) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    if (visible != nullptr) {
      for (int64_t j = 0; j < n; ++j) row[j] = visible[j] ? row[j] : -kInfinity;
    }
    T most = -kInfinity;
    for (int64_t j = 0; j < n; ++j) most = row[j] > most ? row[j] : most;
    const T less = most == -kInfinity ? T(0) : most;
    V sum = {};
    for (int64_t j = 0; j < n; j += kWidth) {
      const V e = exp<T>(load(row + j, n - j) - broadcast(less));
      store(row + j, e, n - j);
      sum += n - j < kWidth ? load(row + j, n - j) : e;
    }
    const T total = sum_of<T>(sum), factor = total == 0 ? T(0) : T(1) / total;
    for (int64_t j = 0; j < n; j += kWidth) store(row + j, load(row + j, n - j) * broadcast(factor), n - j);
  }

  bool finite(const T* x) const {
    V sum = {};
    for (int64_t d = 0; d < a.Dv; d += kWidth) sum = fma(load(x + d, a.Dv - d), V{}, sum);
    return sum_of<T>(sum) == 0;
  }
  // A NaN or infinity in a hidden value does not reach the output.
  void skip_hidden(const T* weights, int64_t n, const bool* visible, const S* value, T* to) const {
    for (int64_t d = 0; d < a.Dv; d += kWidth) {
      V sum = {};
      for (int64_t j = 0; j < n; ++j) {
        if (visible[j]) sum = fma(broadcast(weights[j]), load(value + j * a.Dv + d, a.Dv - d), sum);
      }
      store(to + d, sum);
    }
  }
};

void forward(const AdditiveAttentionForwardArgs& args) {
  dispatch(args.attention.dtype, [&](auto s) { Forward<decltype(s)>{args}.run(); });
}

void exp_rows(DType dtype, int64_t n, int64_t H, const void* k, void* to) {
  dispatch(dtype, [&](auto s) {
    using S = decltype(s);
    const double nanoseconds = double(n * H);
    const int64_t threads = threads_for(nanoseconds);
    parallel_for(threads, threads, nanoseconds, [&](int64_t, int64_t share) {
      for (int64_t j = part(n, threads, share); j < part(n, threads, share + 1); ++j) {
        const S* x = static_cast<const S*>(k) + j * H;
        exp_row(x, H, within_bound(x, H), static_cast<Compute<S>*>(to) + j * H, false);
      }
    });
  });
}

}  // namespace

AdditiveAttentionKernels additive_attention_kernels() { return {&forward, &additive_attention_backward, &exp_rows}; }

}  // namespace seqkernels::SEQKERNELS_ISA
