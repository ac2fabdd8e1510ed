// Gradients of log Z, which are the marginal probabilities of tags and of pairs of tags, and of the scores of tags.
//
// beta is computed backward in log space, as alpha is forward. With N = sum_i e^(alpha_i + beta_i) of a step:
//   P(y_s = k) = e^(alpha_k + beta_k) / N
//   P(y_s-1 = i, y_s = j) = P(y_s-1 = i) e^(m_ij + gamma_j) / sum_j e^(m_ij + gamma_j), gamma = emissions + beta of s
// The second is a sum of outer products over the steps, times e^m_ij, which multiplies the sum once. The probabilities
// of pairs so add up to those of tags, also where rounding makes the logarithms of large scores imprecise.
//
// The gradient of transitions that sequences share is summed in chunks of sequences, whose number depends on B alone,
// and over the chunks in order: the bits do not depend on the number of threads.
#include "common/bytes.h"
#include "common/parallel.h"
#include "common/schedule.h"
#include "crf/cpu/chain.h"

namespace seqkernels::SEQKERNELS_ISA {

void crf_backward(const CrfBackwardArgs& args);

namespace {

constexpr int64_t kChunks = 16;  // of sequences that share transitions
constexpr int64_t kFlush = 256;  // steps whose outer products are summed in the compute type, then in double

template <class S>
struct Backward {
  using C = Chain<S>;
  using T = typename C::T;
  using V = Native<T>;
  static constexpr int64_t kWidth = kLanes<T>;

  const CrfBackwardArgs& args;
  const CrfArgs& a = args.crf;
  const C chain{args.crf};
  const int64_t K = chain.K, KV = chain.KV;
  const bool by_sequence = args.crf.transitions_b != 0, by_step = args.crf.transitions_t != 0;

  // Sums of a chunk of sequences.
  struct Sums {
    double *start, *end;  // [K]
    double* pairs;        // [K, K]; unused where every step has its own transitions
  };

  int64_t chunks() const {
    if (by_sequence) return a.B;
    return by_step ? 1 : min(a.B, kChunks);  // sequences that share the transitions of a step are one task
  }

  void run() const {
    const int64_t count = chunks(), each = 2 * K + (by_step ? 0 : K * K);
    if (count == 0) return;
    const Memory memory(size_t(count * each) * sizeof(double));
    double* const sums = reinterpret_cast<double*>(memory.get());
    zero_bytes(sums, count * each * int64_t{sizeof(double)});
    const double nanoseconds = 2 * nanoseconds_of_products(a);
    const int64_t threads = min(threads_for(nanoseconds), count), chunk = (a.B + count - 1) / count;
    int64_t taken = 0;
    run_tasks<T>(threads, threads, Product<S>::size(chain) + K * KV + 6 * KV, nanoseconds, [&](int64_t, T* scratch) {
      Workspace w{};
      w.pairs = scratch;
      scratch += K * KV;
      for (T** to : {&w.beta, &w.next, &w.gamma, &w.right, &w.alpha, &w.marginal}) {
        *to = scratch;
        scratch += KV;
      }
      Product<S> product(chain, true, scratch);
      for (int64_t c; (c = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < count;) {
        const Sums of{sums + c * each, sums + c * each + K, sums + c * each + 2 * K};
        for (int64_t b = c * chunk; b < min(a.B, (c + 1) * chunk); ++b) sequence(b, w, product, of);
      }
    });
    write(args.dstart, sums, each, count, K);
    write(args.dend, sums + K, each, count, K);
    if (args.dtransitions == nullptr || by_step) return;
    if (by_sequence) {
      for (int64_t b = 0; b < a.B; ++b) {
        write(static_cast<S*>(args.dtransitions) + b * K * K, sums + b * each + 2 * K, each, 1, K * K);
      }
    } else {
      write(args.dtransitions, sums + 2 * K, each, count, K * K);
    }
  }

 private:
  static int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

  struct Workspace {
    T* pairs;                                           // [K, KV] sums of outer products
    T *beta, *next, *gamma, *right, *alpha, *marginal;  // [KV]
    int64_t pending;                                    // steps in `pairs`
  };

  void write(void* to, const double* from, int64_t stride, int64_t count, int64_t size) const {
    if (to == nullptr) return;
    for (int64_t k = 0; k < size; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += from[c * stride + k];
      put(static_cast<S*>(to) + k, T(sum));
    }
  }
  static void put(S* to, T x) { store(to, broadcast(x), 1); }

  void load_alpha(int64_t b, int64_t t, T* to) const {
    const T* from = static_cast<const T*>(args.alpha) + (b * a.T + t) * K;
    for (int64_t k = 0; k < KV; k += kWidth) store(to + k, chain.padded(load(from + k, K - k), k));
  }

  void sequence(int64_t b, Workspace& w, Product<S>& product, const Sums& sums) const {
    const int64_t n = a.count(b);
    const double dscore = a.tags == nullptr ? 0 : args.dscore[b];
    if (n == 0) return;
    const bool written = args.dlog_z[b] != 0 && of_log_z(b, T(args.dlog_z[b]), dscore, w, product, sums);
    if (dscore != 0) of_score(b, dscore, !written, sums);
  }

  // Also adds the score's part to the gradient of emissions, which is so rounded once. Returns whether a path is
  // possible; without one, all gradients are zero.
  bool of_log_z(int64_t b, T dz, double dscore, Workspace& w, Product<S>& product, const Sums& sums) const {
    const int64_t n = a.count(b);
    const int64_t* steps = a.steps + a.first[b];
    for (int64_t k = 0; k < KV; ++k) w.beta[k] = 0;
    chain.add(static_cast<const S*>(a.end), w.beta);
    chain.normalise(w.beta);
    load_alpha(b, steps[n - 1], w.alpha);
    memset(static_cast<void*>(w.pairs), 0, size_t(K * KV) * sizeof(T));
    w.pending = 0;
    T inverse = marginals(w);
    for (int64_t s = n - 1; s >= 0; --s) {
      if (inverse == 0) return false;
      S* demissions = static_cast<S*>(args.demissions) + (b * a.T + steps[s]) * K;
      for (int64_t k = 0; k < KV; k += kWidth) {
        const V p = load(w.marginal + k) * (dz * inverse);
        store(w.marginal + k, p);
        store(demissions + k, p, K - k);
      }
      if (dscore != 0) {
        const int64_t tag = a.tags[b * a.tags_b + steps[s] * a.tags_t];
        put(demissions + tag, T(double(w.marginal[tag]) + dscore));
      }
      if (s == n - 1) {
        for (int64_t k = 0; k < K; ++k) sums.end[k] += double(w.marginal[k]);
      }
      if (s == 0) {
        for (int64_t k = 0; k < K; ++k) sums.start[k] += double(w.marginal[k]);
        break;
      }
      memcpy(w.gamma, w.beta, size_t(KV) * sizeof(T));
      chain.add(chain.emissions(b, steps[s]), w.gamma);
      chain.normalise(w.gamma);
      const S* m = chain.transitions(b, steps[s]);
      if (chain.shared) {
        product.prepare(m);
        product.apply(w.gamma, w.next);
      } else {
        apply_transposed_once(chain, m, w.gamma, w.next);
      }
      load_alpha(b, steps[s - 1], w.alpha);
      T* swap = w.beta;
      w.beta = w.next;
      w.next = swap;
      inverse = marginals(w);
      if (by_step) {
        step_pairs(b, steps[s], w, m, dz * inverse);
      } else {
        add_pairs(w, product, dz * inverse, sums);
      }
      chain.normalise(w.beta);
    }
    if (!by_step) flush(w, product, sums);
    return true;
  }

  // marginal = e^(alpha + beta - most); returns the inverse of its sum, or 0 without a path.
  T marginals(const Workspace& w) const {
    V top = broadcast(-kInfinity<T>), sum = {};
    for (int64_t k = 0; k < KV; k += kWidth) {
      top = larger<T>(load(w.alpha + k) + load(w.beta + k), top);
    }
    const T most = max_of_lanes<T>(top);
    if (most == -kInfinity<T>) return 0;
    for (int64_t k = 0; k < KV; k += kWidth) {
      const V p = exp<T>(load(w.alpha + k) + load(w.beta + k) - broadcast(most));
      store(w.marginal + k, p);
      sum += p;
    }
    return T(1) / sum_of_lanes<T>(sum);
  }

  // Adds the probabilities of the pairs of one step, times the factor. `marginal` times the factor is that of the tags
  // before, and the weights of `product` are e^(m_ij - shift_i), transposed: [j, i].
  void add_pairs(Workspace& w, const Product<S>& product, T factor, const Sums& sums) const {
    for (int64_t i = 0; i < KV; i += kWidth) {
      const V p = load(w.marginal + i), sum = load(product.sums + i);
      store(w.right + i, p == V{} ? V{} : p * broadcast(factor) / sum);
    }
    if (product.underflows()) {
      bool exact = false;
      for (int64_t i = 0; i < K; ++i) exact |= product.sums[i] < C::kTiny && w.marginal[i] > 0;
      if (exact) return add_exact_pairs(w, product, factor, sums);
    }
    for (int64_t j = 0; j < K; ++j) {
      const T left = product.exps[j];
      if (left == 0) continue;
      T* to = w.pairs + j * KV;
      for (int64_t i = 0; i < KV; i += kWidth) store(to + i, fma(broadcast(left), load(w.right + i), load(to + i)));
    }
    if (++w.pending == kFlush) flush(w, product, sums);
  }
  void add_exact_pairs(const Workspace& w, const Product<S>& product, T factor, const Sums& sums) const {
    for (int64_t i = 0; i < K; ++i) {
      if (w.marginal[i] == 0) continue;
      const auto score = [&](int64_t j) { return double(product.element(j, i)) + double(w.gamma[j]); };
      double most = -kInfinity<double>, sum = 0;
      for (int64_t j = 0; j < K; ++j) most = score(j) > most ? score(j) : most;
      for (int64_t j = 0; j < K; ++j) sum += __builtin_exp(score(j) - most);
      const double scale = double(w.marginal[i]) * double(factor) / sum;
      for (int64_t j = 0; j < K; ++j) sums.pairs[i * K + j] += scale * __builtin_exp(score(j) - most);
    }
  }
  void flush(Workspace& w, const Product<S>& product, const Sums& sums) const {
    if (w.pending == 0) return;
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t i = 0; i < K; ++i) {
        sums.pairs[i * K + j] += double(w.pairs[j * KV + i]) * double(product.weights[j * KV + i]);
      }
    }
    memset(static_cast<void*>(w.pairs), 0, size_t(K * KV) * sizeof(T));
    w.pending = 0;
  }
  // Transitions of their own for the step: the gradient is written, or added over sequences.
  void step_pairs(int64_t b, int64_t t, const Workspace& w, const S* m, T factor) const {
    if (args.dtransitions == nullptr) return;
    S* to = static_cast<S*>(args.dtransitions) + ((by_sequence ? b * a.T : 0) + t) * K * K;
    for (int64_t i = 0; i < K; ++i) {
      if (w.marginal[i] == 0) continue;
      const S* row = m + i * K;
      V top = broadcast(-kInfinity<T>), sum = {};
      for (int64_t j = 0; j < K; j += kWidth) top = larger<T>(load(row + j, K - j) + load(w.gamma + j), top);
      const V most = broadcast(max_of_lanes<T>(top));
      for (int64_t j = 0; j < K; j += kWidth) sum += exp<T>(load(row + j, K - j) + load(w.gamma + j) - most);
      const V scale = broadcast(w.marginal[i] * factor / sum_of_lanes<T>(sum));
      for (int64_t j = 0; j < K; j += kWidth) {
        const V p = exp<T>(load(row + j, K - j) + load(w.gamma + j) - most) * scale;
        store(to + i * K + j, load(to + i * K + j, K - j) + p, K - j);
      }
    }
  }

  void of_score(int64_t b, double dscore, bool emissions, const Sums& sums) const {
    const int64_t n = a.count(b);
    const int64_t* steps = a.steps + a.first[b];
    const int64_t* tags = a.tags + b * a.tags_b;
    int64_t before = 0;
    for (int64_t s = 0; s < n; ++s) {
      const int64_t t = steps[s], tag = tags[t * a.tags_t];
      if (emissions) put(static_cast<S*>(args.demissions) + (b * a.T + t) * K + tag, T(dscore));
      if (s == 0) sums.start[tag] += dscore;
      if (s == n - 1) sums.end[tag] += dscore;
      if (s > 0 && by_step) {
        if (args.dtransitions != nullptr) {
          const int64_t matrix = (by_sequence ? b * a.T : 0) + t;
          add(static_cast<S*>(args.dtransitions) + (matrix * K + before) * K + tag, dscore);
        }
      } else if (s > 0) {
        sums.pairs[before * K + tag] += dscore;
      }
      before = tag;
    }
  }
  static void add(S* to, double x) { put(to, T(double(C::value(to)) + x)); }
};

}  // namespace

void crf_backward(const CrfBackwardArgs& args) {
  dispatch(args.crf.dtype, [&](auto s) { Backward<decltype(s)>{args}.run(); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
