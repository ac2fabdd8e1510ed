// log Z and the scores of given tags. A sequence is a task, and its bits do not depend on the batch.
#include "common/parallel.h"
#include "common/schedule.h"
#include "crf/cpu/chain.h"

namespace seqkernels::SEQKERNELS_ISA {

void crf_backward(const CrfBackwardArgs& args);
void crf_viterbi(const CrfViterbiArgs& args);

namespace {

template <class S>
struct Forward {
  using C = Chain<S>;
  using T = typename C::T;

  const CrfForwardArgs& args;
  const CrfArgs& a = args.crf;
  const C chain{args.crf};

  void run() const {
    Tasks tasks(a.B);
    for (int64_t b = 0; b < a.B; ++b) tasks.set(b, double(a.count(b)));
    tasks.sort();
    const double nanoseconds = nanoseconds_of_products(a);
    const int64_t threads = min(threads_for(nanoseconds), max(a.B, 1));
    int64_t taken = 0;
    run_tasks<T>(threads, threads, Product<S>::size(chain) + 2 * chain.KV, nanoseconds, [&](int64_t, T* memory) {
      T *x = memory, *next = x + chain.KV;
      memory += 2 * chain.KV;
      Product<S> product(chain, false, memory);  // prepared once per thread
      for (int64_t place; (place = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < a.B;) {
        sequence(tasks.at(place), x, next, product);
      }
    });
  }

  void sequence(int64_t b, T* x, T* next, Product<S>& product) const {
    const int64_t n = a.count(b), K = a.K;
    args.log_z[b] = args.score[b] = 0;
    if (n == 0) return;
    const int64_t* steps = a.steps + a.first[b];
    for (int64_t k = 0; k < chain.KV; ++k) x[k] = 0;
    chain.add(static_cast<const S*>(a.start), x);
    double total = 0;
    for (int64_t s = 0; s < n; ++s) {
      const int64_t t = steps[s];
      if (s > 0) {
        if (chain.shared) {
          product.prepare(chain.transitions(b, t));
          product.apply(x, next);
        } else {
          apply_once(chain, chain.transitions(b, t), x, next);
        }
        T* swap = x;
        x = next;
        next = swap;
      }
      chain.add(chain.emissions(b, t), x);
      total += double(chain.normalise(x));
      memcpy(static_cast<T*>(args.alpha) + (b * a.T + t) * K, x, size_t(K) * sizeof(T));
    }
    chain.add(static_cast<const S*>(a.end), x);
    const T most = chain.normalise(x);
    args.log_z[b] = most == -kInfinity<T> ? double(most) : total + double(most) + chain.log_sum(x);
    if (a.tags != nullptr) args.score[b] = score(b, steps, n);
  }

  double score(int64_t b, const int64_t* steps, int64_t n) const {
    const int64_t* tags = a.tags + b * a.tags_b;
    double sum = 0;
    int64_t before = 0;
    for (int64_t s = 0; s < n; ++s) {
      const int64_t t = steps[s], tag = tags[t * a.tags_t];
      if (s == 0 && a.start != nullptr) sum += double(C::value(static_cast<const S*>(a.start) + tag));
      if (s > 0) sum += double(C::value(chain.transitions(b, t) + before * a.K + tag));
      sum += double(C::value(chain.emissions(b, t) + tag));
      if (s == n - 1 && a.end != nullptr) sum += double(C::value(static_cast<const S*>(a.end) + tag));
      before = tag;
    }
    return sum;
  }
};

void crf_forward(const CrfForwardArgs& args) {
  dispatch(args.crf.dtype, [&](auto s) { Forward<decltype(s)>{args}.run(); });
}

}  // namespace

CrfKernels crf_kernels() { return {&crf_forward, &crf_backward, &crf_viterbi}; }

}  // namespace seqkernels::SEQKERNELS_ISA
