// The best paths of each sequence, by the algorithm of Viterbi; with several paths, each tag keeps a sorted list of the
// best paths that end in it. Of equal paths, the one whose last tags have smaller numbers comes first. Tags of paths
// that do not exist stay as they are. Scores of NaN or infinity have no order: all scores of the sequence are then NaN.
#include "common/parallel.h"
#include "common/schedule.h"
#include "crf/cpu/chain.h"

namespace seqkernels::SEQKERNELS_ISA {

void crf_viterbi(const CrfViterbiArgs& args);

namespace {

template <class S>
struct Viterbi {
  using C = Chain<S>;
  using T = typename C::T;
  using V = Native<T>;
  using I = typename Vec<T>::NativeInt;
  using Int = typename Vec<T>::Int;
  static constexpr int64_t kWidth = kLanes<T>;

  const CrfViterbiArgs& args;
  const CrfArgs& a = args.crf;
  const C chain{args.crf};

  void run() const {
    Tasks tasks(a.B);
    for (int64_t b = 0; b < a.B; ++b) tasks.set(b, double(a.count(b)));
    tasks.sort();
    const int64_t N = args.paths, K = a.K, KV = chain.KV;
    const double nanoseconds = nanoseconds_of_products(a) * double(N);
    run_tasks<T>(thread_count(), a.B, (2 * N + 1) * KV + K * KV, nanoseconds, [&](int64_t place, T* memory) {
      const int64_t b = tasks.at(place), n = a.count(b);
      if (n == 0 || !ordered(b)) {
        for (int64_t r = 0; r < N; ++r) {
          args.scores[b * N + r] = n > 0 ? std::numeric_limits<double>::quiet_NaN() : r == 0 ? 0 : -kInfinity<double>;
        }
        return;
      }
      const Memory back(size_t(n * KV * N) * sizeof(int32_t));
      if (N == 1) {
        best(b, memory, reinterpret_cast<int32_t*>(back.get()));
      } else {
        several(b, memory, reinterpret_cast<int32_t*>(back.get()));
      }
    });
  }

 private:
  // Whether all scores of a sequence are below infinity.
  bool ordered(int64_t b) const {
    const int64_t n = a.count(b), K = a.K;
    const int64_t* steps = a.steps + a.first[b];
    bool all = below_infinity(static_cast<const S*>(a.start), K) && below_infinity(static_cast<const S*>(a.end), K);
    for (int64_t s = 0; s < n && all; ++s) {
      all = below_infinity(chain.emissions(b, steps[s]), K);
      if (s == 1 || (s > 1 && !chain.shared)) all = all && below_infinity(chain.transitions(b, steps[s]), K * K);
    }
    return all;
  }
  static bool below_infinity(const S* p, int64_t count) {
    const V infinity = broadcast(kInfinity<T>);
    I bad = {};
    for (int64_t k = 0; p != nullptr && k < count; k += kWidth) bad |= !(load(p + k, count - k) < infinity);
    Int lanes[kWidth], any = 0;
    memcpy(lanes, &bad, sizeof(lanes));
    for (int64_t l = 0; l < kWidth; ++l) any |= lanes[l];
    return any == 0;
  }

  // The transitions of a step as [K, KV] of T.
  const T* widened(int64_t b, int64_t t, T* to, const S*& known) const {
    const S* from = chain.transitions(b, t);
    if (from != known) {
      for (int64_t i = 0; i < a.K; ++i) {
        for (int64_t j = 0; j < chain.KV; j += kWidth) store(to + i * chain.KV + j, load(from + i * a.K + j, a.K - j));
      }
      known = from;
    }
    return to;
  }

  void best(int64_t b, T* memory, int32_t* back) const {
    const int64_t n = a.count(b), K = a.K, KV = chain.KV;
    const int64_t* steps = a.steps + a.first[b];
    T *x = memory, *next = x + KV, *wide = next + KV;
    const S* known = nullptr;
    for (int64_t k = 0; k < KV; ++k) x[k] = 0;
    chain.add(static_cast<const S*>(a.start), x);
    double total = 0;
    for (int64_t s = 0; s < n; ++s) {
      if (s > 0) {
        const T* m = widened(b, steps[s], wide, known);
        int32_t* from = back + s * KV;
        for (int64_t j = 0; j < KV; j += kWidth) {
          V most = broadcast(x[0]) + load(m + j);
          I index = {};
          for (int64_t i = 1; i < K; ++i) {
            const V v = broadcast(x[i]) + load(m + i * KV + j);
            const I better = v > most;
            most = better ? v : most;
            index = better ? index - index + Int(i) : index;
          }
          store(next + j, chain.padded(most, j));
          Int lanes[kWidth];
          memcpy(lanes, &index, sizeof(lanes));
          for (int64_t l = 0; l < kWidth; ++l) from[j + l] = int32_t(lanes[l]);
        }
        T* swap = x;
        x = next;
        next = swap;
      }
      chain.add(chain.emissions(b, steps[s]), x);
      total += finite(chain.normalise(x));
    }
    chain.add(static_cast<const S*>(a.end), x);
    int64_t tag = 0;
    for (int64_t k = 1; k < K; ++k) tag = x[k] > x[tag] ? k : tag;
    args.scores[b] = total + double(x[tag]);
    if (x[tag] == -kInfinity<T>) return;
    int64_t* tags = args.tags + b * a.T;
    for (int64_t s = n - 1; s >= 0; --s) {
      tags[steps[s]] = tag;
      if (s > 0) tag = back[s * KV + tag];
    }
  }
  static double finite(T x) { return x == -kInfinity<T> ? 0 : double(x); }

  // Lists of N paths per tag: scores x[k * N + r], descending; back holds tag * N + rank of the path before.
  void several(int64_t b, T* memory, int32_t* back) const {
    const int64_t n = a.count(b), K = a.K, KV = chain.KV, N = args.paths;
    const int64_t* steps = a.steps + a.first[b];
    T *x = memory, *next = x + N * KV, *column = next + N * KV;
    for (int64_t k = 0; k < KV; ++k) column[k] = 0;
    chain.add(static_cast<const S*>(a.start), column);
    chain.add(chain.emissions(b, steps[0]), column);
    double total = finite(chain.normalise(column));
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t r = 0; r < N; ++r) x[k * N + r] = r == 0 ? column[k] : -kInfinity<T>;
    }
    for (int64_t s = 1; s < n; ++s) {
      const S* m = chain.transitions(b, steps[s]);
      const S* e = chain.emissions(b, steps[s]);
      T most = -kInfinity<T>;
      for (int64_t j = 0; j < K; ++j) {
        T* list = next + j * N;
        int32_t* from = back + (s * KV + j) * N;
        clear(list, from, N);
        for (int64_t i = 0; i < K; ++i) {
          const T step = C::value(m + i * K + j);
          for (int64_t r = 0; r < N && x[i * N + r] + step > list[N - 1]; ++r) {
            insert(list, from, N, x[i * N + r] + step, int32_t(i * N + r));
          }
        }
        const T here = C::value(e + j);
        for (int64_t r = 0; r < N; ++r) list[r] += here;
        most = list[0] > most ? list[0] : most;
      }
      if (most > -kInfinity<T>) {
        for (int64_t k = 0; k < K * N; ++k) next[k] -= most;
        total += double(most);
      }
      T* swap = x;
      x = next;
      next = swap;
    }
    T* list = next;
    int32_t* const ends = back;  // the lists of the first step have no path before
    clear(list, ends, N);
    for (int64_t k = 0; k < K; ++k) {
      const T step = a.end == nullptr ? T(0) : C::value(static_cast<const S*>(a.end) + k);
      for (int64_t r = 0; r < N && x[k * N + r] + step > list[N - 1]; ++r) {
        insert(list, ends, N, x[k * N + r] + step, int32_t(k * N + r));
      }
    }
    for (int64_t r = 0; r < N; ++r) {
      args.scores[b * N + r] = total + double(list[r]);
      if (list[r] == -kInfinity<T>) continue;
      int64_t* tags = args.tags + (b * N + r) * a.T;
      int64_t path = ends[r];
      for (int64_t s = n - 1; s >= 0; --s) {
        tags[steps[s]] = path / N;
        if (s > 0) path = back[(s * KV + path / N) * N + path % N];
      }
    }
  }
  static void clear(T* list, int32_t* from, int64_t N) {
    for (int64_t r = 0; r < N; ++r) {
      list[r] = -kInfinity<T>;
      from[r] = 0;
    }
  }
  static void insert(T* list, int32_t* from, int64_t N, T value, int32_t origin) {
    int64_t r = N - 1;
    for (; r > 0 && list[r - 1] < value; --r) {
      list[r] = list[r - 1];
      from[r] = from[r - 1];
    }
    list[r] = value;
    from[r] = origin;
  }
};

}  // namespace

void crf_viterbi(const CrfViterbiArgs& args) {
  dispatch(args.crf.dtype, [&](auto s) { Viterbi<decltype(s)>{args}.run(); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
