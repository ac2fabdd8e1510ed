// Forward pass of attention for few queries, as in decoding: keys and values are read once, in place.
//
// The rows of a block are all queries of the heads that share a key head. Scores are computed from rows of keys that
// are transposed in registers, 16 bytes of each at a time, so that a lane is a key; weighted values from rows of
// values. The sums have the order of the kernels in forward.cpp: a row has the same bits as in a call with many
// queries.
//
// Keys and values may have a dtype of their own, be int8 with a scale per row, or lie in pages (Kwon et al., "Efficient
// memory management for large language model serving with PagedAttention", arXiv 2309.06180).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/cpu/blocks.h"
#include "attention/cpu/scores.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tiles.h"
#include "common/memory.h"
#include "common/packing.h"
#include "common/products.h"
#include "common/schedule.h"

namespace seqkernels::SEQKERNELS_ISA {

void attention_decode(const DecodeArgs& args);

namespace {

struct Int8 {
  int8_t value;
};

template <class K>
struct TypeOfKeys {
  using Computed = Compute<K>;
};
template <>
struct TypeOfKeys<Int8> {
  using Computed = float;
};
template <class K>
constexpr bool kQuantized = false;
template <>
constexpr bool kQuantized<Int8> = true;

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

SEQKERNELS_INLINE Native<float> load(const Int8* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Native<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = float(p[l].value);
  return v;
#endif
}
SEQKERNELS_INLINE Native<float> load(const Int8* p, int64_t n) {
  Int8 lanes[kLanes<float>] = {};
  for (int64_t l = 0; l < n; ++l) lanes[l] = p[l];
  return load(lanes);
}
using seqkernels::SEQKERNELS_ISA::load;

// ---- columns of keys

// Rows for KeyColumns, which reads them at a column: equally spaced, or anywhere.
template <class K>
struct SpacedRows {
  const K* first;
  int64_t stride;
  static constexpr int kQuads = (kVectorBytes / int(sizeof(typename TypeOfKeys<K>::Computed)) + 3) / 4;

  struct At {
    const K* quads[kQuads];  // rows 0, 4, ..
    int64_t stride;
    SEQKERNELS_INLINE const K* operator()(int row) const { return quads[row / 4] + row % 4 * stride; }
  };
  SEQKERNELS_INLINE At at(int64_t d) const {
    At rows;
    rows.stride = stride;
    const K* quad = first + d;
#pragma GCC unroll 4
    for (int i = 0; i < kQuads; ++i, quad += 4 * stride) {
      asm("" : "+r"(quad));  // two registers address four rows; GCC would keep an offset per row in memory
      rows.quads[i] = quad;
    }
    return rows;
  }
};
template <class K>
struct AnyRows {
  const K* const* rows;
  struct At {
    const K* const* rows;
    int64_t d;
    SEQKERNELS_INLINE const K* operator()(int row) const { return rows[row] + d; }
  };
  SEQKERNELS_INLINE At at(int64_t d) const { return {rows, d}; }
};

// Reads columns of kLanes rows, transposed: `words` vectors of one 4-byte word (8 bytes of double) of each row, of
// `parts` columns each. Vector i is read from the rows i, i + words, ..: one in each 16 bytes.
template <class K>
struct KeyColumns {  // float, BFloat16, Int8
  static constexpr int words = 4, parts = 4 / int(sizeof(K)), count = words * parts;
  using V = Native<float>;

  template <class Rows>
  static SEQKERNELS_INLINE void read(const Rows& rows, int64_t d, V (&word)[words]) {
    const auto from = rows.at(d);
    const auto at = [&](int row) { return reinterpret_cast<const float*>(from(row)); };
#if defined(__AVX512F__)
#pragma GCC unroll 4
    for (int i = 0; i < words; ++i) {
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(at(i)));
      v = _mm512_insertf32x4(v, _mm_loadu_ps(at(i + 4)), 1);
      v = _mm512_insertf32x4(v, _mm_loadu_ps(at(i + 8)), 2);
      word[i] = _mm512_insertf32x4(v, _mm_loadu_ps(at(i + 12)), 3);
    }
#elif defined(__AVX2__)
#pragma GCC unroll 4
    for (int i = 0; i < words; ++i) {
      word[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(i))), _mm_loadu_ps(at(i + 4)), 1);
    }
#else
    for (int i = 0; i < words; ++i) memcpy(&word[i], at(i), 16);
#endif
    transpose_words(word);
  }

  // Column `part` of a word.
  static SEQKERNELS_INLINE V column(V word, int part) {
    if constexpr (parts == 1) {
      return word;
    } else if constexpr (parts == 2) {
      const Bits32 bits = (Bits32)word;
      return (V)(part == 0 ? bits << 16 : bits & 0xffff0000);
    } else {
      const Integers bits = ((Integers)word << (24 - 8 * part)) >> 24;
#if defined(__AVX512F__)
      return _mm512_cvtepi32_ps((__m512i)bits);
#elif defined(__AVX2__)
      return _mm256_cvtepi32_ps((__m256i)bits);
#else
      return __builtin_convertvector(bits, V);
#endif
    }
  }

  static SEQKERNELS_INLINE void transpose_words(V (&r)[words]) {
#if defined(__AVX512F__)
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])),
                  b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1])),
                  c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])),
                  d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
#elif defined(__AVX2__)
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1])),
                  b = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1])),
                  c = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3])),
                  d = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    r[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    r[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    r[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    r[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
#else
    transpose_block(r);
#endif
  }
};

template <>
struct KeyColumns<double> {
  static constexpr int words = 2, parts = 1, count = 2;
  using V = Native<double>;

  template <class Rows>
  static SEQKERNELS_INLINE void read(const Rows& rows, int64_t d, V (&word)[words]) {
    const auto at = rows.at(d);
#pragma GCC unroll 2
    for (int i = 0; i < words; ++i) {
#if defined(__AVX512F__)
      __m512d v = _mm512_castpd128_pd512(_mm_loadu_pd(at(i)));
      v = _mm512_insertf64x2(v, _mm_loadu_pd(at(i + 2)), 1);
      v = _mm512_insertf64x2(v, _mm_loadu_pd(at(i + 4)), 2);
      word[i] = _mm512_insertf64x2(v, _mm_loadu_pd(at(i + 6)), 3);
#elif defined(__AVX2__)
      word[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(at(i))), _mm_loadu_pd(at(i + 2)), 1);
#else
      memcpy(&word[i], at(i), 16);
#endif
    }
#if defined(__AVX512F__)
    const V a = word[0];
    word[0] = _mm512_unpacklo_pd(a, word[1]);
    word[1] = _mm512_unpackhi_pd(a, word[1]);
#elif defined(__AVX2__)
    const V a = word[0];
    word[0] = _mm256_unpacklo_pd(a, word[1]);
    word[1] = _mm256_unpackhi_pd(a, word[1]);
#else
    transpose_block(word);
#endif
  }
  static SEQKERNELS_INLINE V column(V word, int) { return word; }
};

template <>
struct KeyColumns<Half> {  // widened before the transpose: 4 columns, 8 bytes of each row
  static constexpr int words = 4, parts = 1, count = 4;
  using V = Native<float>;

  template <class Rows>
  static SEQKERNELS_INLINE void read(const Rows& rows, int64_t d, V (&word)[words]) {
    const auto at = rows.at(d);
#pragma GCC unroll 4
    for (int i = 0; i < words; ++i) {
#if defined(__AVX512F__) || defined(__AVX2__)
      const auto two = [&](int row) {
        const __m128d low = _mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at(row))));
        return _mm_castpd_si128(_mm_loadh_pd(low, reinterpret_cast<const double*>(at(row + 4))));
      };
#endif
#if defined(__AVX512F__)
      word[i] = _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(two(i)), two(i + 8), 1));
#elif defined(__AVX2__)
      word[i] = _mm256_cvtph_ps(two(i));
#else
      word[i] = load(at(i));
#endif
    }
    KeyColumns<float>::transpose_words(word);
  }
  static SEQKERNELS_INLINE V column(V word, int) { return word; }
};

// Rows of one block of keys. Rows past the last key repeat it.
template <class K>
struct BlockRows {
  using T = typename TypeOfKeys<K>::Computed;
  const K* keys[kKeys];
  const K* values[kKeys];
  int64_t spaced, stride;  // the first `spaced` keys: vectors of keys at this distance
  T key_scales[kQuantized<K> ? kKeys : 1], value_scales[kQuantized<K> ? kKeys : 1];
};

// ---- products

template <class V>
SEQKERNELS_INLINE void keep_in_register(V& v) {
#if defined(__AVX2__)
  asm("" : "+x"(v));  // GCC would load it again at each use
#else
  static_cast<void>(v);
#endif
}

// Prefetches rows of `columns` columns while a loop over `steps` steps runs: an equal share of the rows in each step,
// in the order of memory.
template <class K>
class Ahead {
 public:
  // rows: [n], or null.
  Ahead(const K* const* rows, int64_t n, int64_t columns, int64_t steps)
      : rows_(rows), end_(rows == nullptr ? 0 : n), bytes_(columns * int64_t(sizeof(K))), share_((n << 16) / steps) {}
  // Begins with the share of another step than the first.
  void skip(int64_t steps) {
    at_ = share_ * steps;
    row_ = at_ >> 16;
  }
  SEQKERNELS_INLINE void step() {
    at_ += share_;
    for (const int64_t until = min(at_ >> 16, end_); row_ < until; ++row_) {
      const char* row = reinterpret_cast<const char*>(rows_[row_]);
      for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(row + i);
    }
  }

 private:
  const K* const* rows_;
  const int64_t end_, bytes_, share_;
  int64_t at_ = 0, row_ = 0;
};

// Adds the products of columns [d, end), fewer than KeyColumns reads, to `sum`.
template <class K, class T>
inline void add_last_columns(int rows_of_q, const K* const* rows, const T* scales, int64_t d, int64_t end, const T* q,
                             int64_t ldq, Native<T>* sum) {
  using V = Native<T>;
  using Columns = KeyColumns<K>;
  constexpr int kWidth = kLanes<T>;
  K copy[kWidth][Columns::count] = {};
  const K* at[kWidth];
  for (int j = 0; j < kWidth; ++j) {
    for (int64_t c = 0; d + c < end; ++c) copy[j][c] = rows[j][d + c];
    at[j] = copy[j];
  }
  V word[Columns::words];
  Columns::read(AnyRows<K>{at}, 0, word);
#pragma GCC unroll 16
  for (int c = 0; c < Columns::count; ++c) {
    if (d + c >= end) break;
    V column = Columns::column(word[c / Columns::parts], c % Columns::parts);
    if constexpr (kQuantized<K>) column *= load(scales);
    for (int r = 0; r < rows_of_q; ++r) sum[r] = fma(broadcast(q[r * ldq + d + c]), column, sum[r]);
  }
}

// Scores of kR queries [kR][ldq] and kG * kLanes keys; tile: rows of kKeys. `scales` are used by int8 only. `ahead`:
// rows to prefetch, one per key, or null.
template <int kR, int kG, bool kSpaced, class K, class T>
inline void score_tile(const K* const* rows, int64_t stride, const T* scales, const K* const* ahead, int64_t D,
                       const T* q, int64_t ldq, T* tile) {
  using V = Native<T>;
  using Columns = KeyColumns<K>;
  constexpr int kWidth = kLanes<T>;
  Ahead<K> prefetched(ahead, kG * kWidth, D, ceil_div(D, Columns::count));
  int64_t begin = 0;
  do {  // one chain of terms
    const int64_t end = min(begin + kTerms, D);
    V sum[kR][kG] = {};
    int64_t d = begin;
    for (; d + Columns::count <= end; d += Columns::count) {
      prefetched.step();
      constexpr bool kShared = kR == 1 && Columns::count <= 4;  // broadcasts stay in registers
      V left[kShared ? Columns::count : 1];
      if constexpr (kShared) {
#pragma GCC unroll 4
        for (int c = 0; c < Columns::count; ++c) {
          left[c] = broadcast(q[d + c]);
          keep_in_register(left[c]);
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kG; ++g) {
        V word[Columns::words];
        if constexpr (kSpaced) {
          Columns::read(SpacedRows<K>{rows[g * kWidth], stride}, d, word);
        } else {
          Columns::read(AnyRows<K>{rows + g * kWidth}, d, word);
        }
#pragma GCC unroll 16
        for (int c = 0; c < Columns::count; ++c) {
          V column = Columns::column(word[c / Columns::parts], c % Columns::parts);
          if constexpr (kQuantized<K>) column *= load(scales + g * kWidth);
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) {
            sum[r][g] = fma(kShared ? left[kShared ? c : 0] : broadcast(q[r * ldq + d + c]), column, sum[r][g]);
          }
        }
      }
    }
    // The accumulators stay in registers: they are indexed by constants only.
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      T* to = tile + g * kWidth;
      V last[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) last[r] = sum[r][g];
      if (d < end) {
        V memory[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) memory[r] = last[r];
        add_last_columns(kR, rows + g * kWidth, kQuantized<K> ? scales + g * kWidth : nullptr, d, end, q, ldq, memory);
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) last[r] = memory[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        store(to + r * kKeys, begin == 0 ? last[r] : load(to + r * kKeys) + last[r]);
      }
    }
    begin = end;
  } while (begin < D);
}

template <int kR, class K, class T>
inline void score_rows(int64_t height, const BlockRows<K>& rows, const K* const* ahead, KeyRange columns, int64_t D,
                       const T* q, int64_t ldq, T* tile) {
  if constexpr (kR > 1) {
    if (height < kR) return score_rows<kR - 1>(height, rows, ahead, columns, D, q, ldq, tile);
  }
  constexpr int kG = kR <= 2 ? 4 : 2, kStep = kG * kLanes<T>;
  for (int64_t j = columns.lo / kStep * kStep; j < columns.hi; j += kStep) {
    const K* const* const nothing = nullptr;
    const auto scales = [&](int64_t key) { return kQuantized<K> ? rows.key_scales + key : nullptr; };
    if (j + kStep <= rows.spaced) {
      score_tile<kR, kG, true>(rows.keys + j, rows.stride, scales(j), ahead == nullptr ? nullptr : ahead + j, D, q, ldq,
                               tile + j);
      continue;
    }
    for (int64_t at = j; at < j + kStep; at += kLanes<T>) {
      score_tile<kR, 1, false>(rows.keys + at, rows.stride, scales(at), nothing, D, q, ldq, tile + at);
    }
  }
}

// C[kR][kC vectors] from the weights of keys [lo, hi) and columns from d on of their values.
template <int kR, int kC, class K, class T>
inline void value_tile(KeyRange keys, const T* weights, const BlockRows<K>& rows, const K* const* ahead, int64_t d,
                       int64_t Dv, T* c, int64_t ldc, Update update, const T* factor) {
  using V = Native<T>;
  constexpr int kWidth = kLanes<T>;
  constexpr int64_t kStep = 8;  // keys between prefetches
  V sum[kR][kC] = {};
  const auto add = [&](int64_t j, auto read) {
    const K* row = rows.values[j] + d;
    asm("" : "+r"(row));  // one address for all columns; GCC would keep one offset per column
    V v[kC];
#pragma GCC unroll 8
    for (int i = 0; i < kC; ++i) {
      v[i] = read(row + i * kWidth, Dv - d - i * kWidth);
      if constexpr (kQuantized<K>) v[i] *= rows.value_scales[j];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const V weight = broadcast(weights[r * kKeys + j]);
#pragma GCC unroll 8
      for (int i = 0; i < kC; ++i) sum[r][i] = fma(weight, v[i], sum[r][i]);
    }
  };
  if (d + kC * kWidth > Dv) {
    for (int64_t j = keys.lo; j < keys.hi; ++j) add(j, [](const K* p, int64_t n) { return load(p, n); });
  } else {
    const int64_t tiles = ceil_div(Dv, kC * kWidth);  // each prefetches its share of the rows ahead
    Ahead<K> prefetched(ahead, kKeys, Dv, tiles * (kKeys / kStep));
    prefetched.skip(d / (kC * kWidth) * (kKeys / kStep));
    for (int64_t from = keys.lo; from < keys.hi; from += kStep) {
      prefetched.step();
      const int64_t until = min(from + kStep, keys.hi);
      for (int64_t j = from; j < until; ++j) add(j, [](const K* p, int64_t) { return load(p); });
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kC; ++i) {
      T* to = c + r * ldc + d + i * kWidth;
      V v = sum[r][i];
      if (update == Update::kScale) v = fma(load(to), broadcast(factor[r]), v);
      store(to, v);
    }
  }
}

template <int kR, int kC, class K, class T>
inline void value_columns(KeyRange keys, const T* weights, const BlockRows<K>& rows, const K* const* ahead, int64_t& d,
                          int64_t Dv, T* c, int64_t ldc, Update update, const T* factor) {
  constexpr int64_t kColumns = kC * kLanes<T>;
  for (; d + (kC > 1 ? kColumns : 1) <= Dv; d += kColumns) {
    value_tile<kR, kC>(keys, weights, rows, ahead, d, Dv, c, ldc, update, factor);
  }
  if constexpr (kC > 1) value_columns<kR, kC / 2>(keys, weights, rows, ahead, d, Dv, c, ldc, update, factor);
}

template <int kR, class K, class T>
inline void value_rows(int64_t height, KeyRange keys, const T* weights, const BlockRows<K>& rows, const K* const* ahead,
                       int64_t Dv, T* c, int64_t ldc, Update update, const T* factor) {
  if constexpr (kR > 1) {
    if (height < kR) return value_rows<kR - 1>(height, keys, weights, rows, ahead, Dv, c, ldc, update, factor);
  }
  constexpr int kC = kR == 1 ? 8 : kR == 2 || kVectorBytes == 64 ? 4 : 2;
  int64_t d = 0;
  value_columns<kR, kC>(keys, weights, rows, ahead, d, Dv, c, ldc, update, factor);
}

constexpr int kRowsOfTile = 4;

// ---- the kernel

template <class K>
class Decode : OnlineSoftmax<typename TypeOfKeys<K>::Computed> {
 public:
  using T = typename TypeOfKeys<K>::Computed;
  using V = Native<T>;
  static constexpr int kWidth = kLanes<T>;

  explicit Decode(const DecodeArgs& args)
      : OnlineSoftmax<T>(args.attention, Scores<T>(args.attention).left_scale(), most_rows(args.attention)),
        cache(args),
        scores(args.attention) {}

  void run() {
    const int64_t groups = a.B * a.Hk;
    double keys = 0, pairs = 0;
    for (int64_t b = 0; b < a.B; ++b) {
      keys += double(a.sequences[b].k_length) * double(a.Hk);
      pairs += double(a.sequences[b].k_length) * double(a.sequences[b].q_length) * double(a.Hq);
    }
    const double nanoseconds =
        attention::decode_nanoseconds(pairs, a.D, a.Dv, keys * double(a.D + a.Dv) * double(sizeof(K)));
    const int64_t threads = seqkernels::threads_for(nanoseconds);
    if (!attention::group_is_task(groups, threads)) return run_few_groups(threads, nanoseconds);
    Tasks tasks(groups);
    for (int64_t g = 0; g < groups; ++g) tasks.set(g, cost_of(a, a.sequences[g / a.Hk]));
    tasks.sort();
    run_tasks<T>(threads, groups, scratch_size() + 2 * state_size(), nanoseconds, [&](int64_t task, T* memory) {
      const int64_t g = tasks.at(task), b = g / a.Hk, hk = g % a.Hk;
      fill_padding(b, hk);
      const Blocks blocks(a, b);
      for (int64_t i = 0; i < blocks.count; ++i) attend(blocks, hk, i, memory);
    });
  }

 private:
  using Softmax = OnlineSoftmax<T>;
  using Softmax::a, Softmax::ldq, Softmax::ldv, Softmax::rows;
  using Softmax::merge, Softmax::padded_size, Softmax::state_size, Softmax::take_state;

  const DecodeArgs& cache;
  const Scores<T> scores;

  // Rows of the largest block of queries.
  static int64_t most_rows(const AttentionArgs& a) {
    int64_t most = 1;
    for (int64_t b = 0; b < a.B; ++b) most = maximum(most, min(a.sequences[b].q_length * a.group(), kRows));
    return most;
  }

  struct Scratch {
    T *q, *tile, *alpha;
  };
  int64_t scratch_size() const { return padded_size(rows * ldq) + padded_size(rows * kKeys) + padded_size(rows); }
  Scratch carve(T*& at) const {
    Scratch s;
    s.q = take(at, rows * ldq);
    s.tile = take(at, rows * kKeys);
    s.alpha = take(at, rows);
    return s;
  }

  // Calls f with a value of the dtype of q and out, whose compute type is T.
  template <class F>
  void with_query_type(F f) const {
    dispatch(a.dtype, [&](auto s) {
      if constexpr (sizeof(Compute<decltype(s)>) == sizeof(T)) f(s);
    });
  }
  void load_queries(const QueryBlock& q, T* to) const {
    const Softmax& base = *this;
    with_query_type([&](auto s) { base.template load_queries<decltype(s)>(q, to); });
  }
  void write_output(const QueryBlock& q, const SoftmaxState<T>* state) const {
    const Softmax& base = *this;
    with_query_type([&](auto s) { base.template write_output<decltype(s)>(q, state); });
  }
  void fill_padding(int64_t b, int64_t hk) const {
    const Softmax& base = *this;
    with_query_type([&](auto s) { base.template fill_padding<decltype(s)>(b, hk); });
  }

  // Rows [j0, j0 + n) of a sequence.
  void find_rows(int64_t b, int64_t hk, int64_t j0, int64_t n, BlockRows<K>& of) const {
    const int64_t first = a.sequences[b].k_begin + j0;
    of.stride = a.k.t;
    of.spaced = cache.block_table == nullptr || cache.page_size % kWidth == 0 ? n : 0;
    if (cache.block_table == nullptr) {
      const K *k = row_of<K>(a.k, b, hk, first), *v = row_of<K>(a.v, b, hk, first);
      for (int64_t j = 0; j < n; ++j, k += a.k.t, v += a.v.t) {
        of.keys[j] = k;
        of.values[j] = v;
      }
      if constexpr (kQuantized<K>) {
        for (int64_t j = 0; j < n; ++j) {
          of.key_scales[j] = *row_of<float>(cache.k_scales, b, hk, first + j);
          of.value_scales[j] = *row_of<float>(cache.v_scales, b, hk, first + j);
        }
      }
    } else {
      const int32_t* pages = cache.block_table + b * cache.table_b;
      int64_t page = first / cache.page_size, row = first % cache.page_size;
      for (int64_t j = 0; j < n; ++j) {
        of.keys[j] = row_of<K>(a.k, pages[page], hk, row);
        of.values[j] = row_of<K>(a.v, pages[page], hk, row);
        if constexpr (kQuantized<K>) {
          of.key_scales[j] = *row_of<float>(cache.k_scales, pages[page], hk, row);
          of.value_scales[j] = *row_of<float>(cache.v_scales, pages[page], hk, row);
        }
        if (++row == cache.page_size) {
          row = 0;
          ++page;
        }
      }
    }
    for (int64_t j = n; j < kKeys; ++j) {
      of.keys[j] = of.keys[n - 1];
      of.values[j] = of.values[n - 1];
      if constexpr (kQuantized<K>) {
        of.key_scales[j] = of.key_scales[n - 1];
        of.value_scales[j] = of.value_scales[n - 1];
      }
    }
  }

  // Whether all values of n rows are finite.
  bool all_finite(const BlockRows<K>& of, int64_t n) const {
    V non_finite = {};
    for (int64_t j = 0; j < n; ++j) {
      if constexpr (kQuantized<K>) {
        non_finite = fma(broadcast(of.value_scales[j]), V{}, non_finite);
      } else {
        for (int64_t d = 0; d < a.Dv; d += kWidth) non_finite = fma(load(of.values[j] + d, a.Dv - d), V{}, non_finite);
      }
    }
    return sum_of<T>(non_finite) == 0;
  }

  // The values of a row, restricted to the keys that it attends to.
  void visible_values(int64_t r, uint64_t visible, int64_t n, const BlockRows<K>& of, const Scratch& s,
                      const SoftmaxState<T>& state, bool first) const {
    for (int64_t d = 0; d < a.Dv; d += kWidth) {
      V sum = {};
      for (int64_t j = 0; j < n; ++j) {
        if ((visible >> j & 1) == 0) continue;
        V v = load(of.values[j] + d, a.Dv - d);
        if constexpr (kQuantized<K>) v *= of.value_scales[j];
        sum = fma(broadcast(s.tile[r * kKeys + j]), v, sum);
      }
      T* to = state.values + r * ldv + d;
      store(to, first ? sum : fma(load(to), broadcast(s.alpha[r]), sum));
    }
  }

  // One block of n keys. `next`: the rows of the next block, or null.
  void keys_block(const QueryBlock& q, int64_t j0, int64_t n, bool some, bool first, const BlockRows<K>& of,
                  const BlockRows<K>* next, const SoftmaxState<T>& state, const Scratch& s) const {
    const KeyRange columns = Scores<T>::columns(q, j0);
    int64_t left = q.n, row = 0;
    for (int64_t tiles = ceil_div(q.n, kRowsOfTile); tiles > 0; --tiles) {
      const int64_t height = ceil_div(left, tiles);
      score_rows<kRowsOfTile>(height, of, row == 0 && n == kKeys ? of.values : nullptr, columns, a.D, s.q + row * ldq,
                              ldq, s.tile + row * kKeys);
      left -= height;
      row += height;
    }
    scores.finish(q, j0, n, some, columns, s.tile, nullptr);
    const bool masked = (some || !q.all_visible(j0) || a.mask_kind == MaskKind::kFloat) && !all_finite(of, n);
    uint64_t visible[kRows];
    if (masked) Scores<T>::visible_words(q.n, columns, s.tile, visible);
    if (columns.hi - columns.lo == kKeys) {
      Softmax::template softmax<true>(q, j0, columns, first, s.tile, s.alpha, state);
    } else {
      Softmax::template softmax<false>(q, j0, columns, first, s.tile, s.alpha, state);
    }
    if (masked) {
      for (int64_t r = 0; r < q.n; ++r) visible_values(r, visible[r], n, of, s, state, first);
      return;
    }
    const KeyRange seen = q.visible_keys(0, q.n, j0);
    const KeyRange keys{seen.lo, min(seen.hi, n)};
    left = q.n;
    row = 0;
    for (int64_t tiles = ceil_div(q.n, kRowsOfTile); tiles > 0; --tiles) {
      const int64_t height = ceil_div(left, tiles);
      value_rows<kRowsOfTile>(height, keys, s.tile + row * kKeys, of,
                              next != nullptr && row == 0 ? next->keys : nullptr, a.Dv, state.values + row * ldv, ldv,
                              first ? Update::kReplace : Update::kScale, s.alpha + row);
      left -= height;
      row += height;
    }
  }

  // Processes the keys of a chunk; returns whether any key was visible.
  bool process_chunk(const QueryBlock& q, int64_t hk, int64_t chunk, const SoftmaxState<T>& state,
                     const Scratch& s) const {
    const int64_t lo = maximum(chunk * kChunkKeys, q.any_keys.lo / kKeys * kKeys),
                  hi = min((chunk + 1) * kChunkKeys, q.any_keys.hi), end = a.sequences[q.b].k_length;
    BlockRows<K> blocks[2];
    BlockRows<K>*of = &blocks[0], *next = &blocks[1];
    const auto rows_from = [&](int64_t j0) { return min(kKeys, end - j0); };
    if (lo < hi) find_rows(q.b, hk, lo, rows_from(lo), *of);
    bool first = true;
    for (int64_t j0 = lo; j0 < hi; j0 += kKeys) {
      const bool more = j0 + kKeys < hi;
      if (more) find_rows(q.b, hk, j0 + kKeys, rows_from(j0 + kKeys), *next);
      const Visibility visible = scores.visibility(q, j0, min(kKeys, q.any_keys.hi - j0));
      if (visible != Visibility::kNone) {
        keys_block(q, j0, rows_from(j0), visible == Visibility::kSome, first, *of, more ? next : nullptr, state, s);
        first = false;
      }
      BlockRows<K>* const done = of;
      of = next;
      next = done;
    }
    return !first;
  }

  // A block of queries and all of its keys. memory: scratch_size() and two states.
  void attend(const Blocks& blocks, int64_t hk, int64_t i, T* memory) const {
    const Scratch s = carve(memory);
    SoftmaxState<T> total = take_state(memory);
    const SoftmaxState<T> chunk = take_state(memory);
    QueryBlock q;
    blocks.set(q, a, hk, i);
    load_queries(q, s.q);
    bool any = false;
    for (int64_t c = q.any_keys.lo / kChunkKeys; c * kChunkKeys < q.any_keys.hi; ++c) {
      if (!process_chunk(q, hk, c, any ? chunk : total, s)) continue;
      if (any) merge(q.n, total, chunk);
      any = true;
    }
    write_output(q, any ? &total : nullptr);
  }

  // Few groups: tasks are blocks, or, for groups of one block, chunks of keys.

  struct Task {
    int64_t g, block, chunk;  // chunk -1: all chunks
  };
  void run_few_groups(int64_t threads, double nanoseconds) const {
    const int64_t groups = a.B * a.Hk;
    int64_t count = 0, parts = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t blocks = Blocks(a, g / a.Hk).count, chunks = attention::chunks_of(a.sequences[g / a.Hk].k_length);
      count += blocks > 1 ? blocks : blocks * maximum(chunks, int64_t{1});
      parts += blocks == 1 ? chunks : 0;
    }
    const Memory tasks_memory(size_t(count + 1) * sizeof(Task)), found_memory(size_t(parts + 1)),
        parts_memory(size_t(parts * state_size() + 64) * sizeof(T)), begin_memory(size_t(groups + 1) * sizeof(int64_t));
    Task* const tasks = reinterpret_cast<Task*>(tasks_memory.get());
    int64_t* const begin = reinterpret_cast<int64_t*>(begin_memory.get());  // first part of a group
    const auto part_of = [&](int64_t part) {
      T* at = reinterpret_cast<T*>(parts_memory.get()) + part * state_size();
      return take_state(at);
    };
    int64_t n = 0;
    parts = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t b = g / a.Hk, blocks = Blocks(a, b).count, chunks = attention::chunks_of(a.sequences[b].k_length);
      fill_padding(b, g % a.Hk);
      begin[g] = parts;
      for (int64_t i = 0; i < blocks && (blocks > 1 || chunks == 0); ++i) tasks[n++] = {g, i, -1};
      for (int64_t c = 0; c < chunks && blocks == 1; ++c) tasks[n++] = {g, 0, c};
      parts += blocks == 1 ? chunks : 0;
    }
    begin[groups] = parts;
    run_tasks<T>(threads, count, scratch_size() + 2 * state_size(), nanoseconds, [&](int64_t task, T* memory) {
      const auto [g, i, c] = tasks[task];
      const int64_t b = g / a.Hk, hk = g % a.Hk;
      const Blocks blocks(a, b);
      if (c < 0) return attend(blocks, hk, i, memory);
      const Scratch s = carve(memory);
      QueryBlock q;
      blocks.set(q, a, hk, i);
      load_queries(q, s.q);
      found_memory.get()[begin[g] + c] = process_chunk(q, hk, c, part_of(begin[g] + c), s);
    });
    for (int64_t g = 0; g < groups; ++g) {
      if (begin[g] == begin[g + 1]) continue;
      QueryBlock q;
      Blocks(a, g / a.Hk).set(q, a, g % a.Hk, 0);
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

}  // namespace

void attention_decode(const DecodeArgs& args) {
  if (args.quantized) return Decode<Int8>(args).run();
  dispatch(args.key_dtype, [&](auto k) { Decode<decltype(k)>(args).run(); });
}

}  // namespace seqkernels::SEQKERNELS_ISA
