// Products with packed weights (packed_weights.h), one panel of the instruction set at a time.
#include "recurrent/cpu/int8_product.h"

namespace seqkernels::SEQKERNELS_ISA {

namespace {

constexpr int kLanesOfFloat = kLanes<float>;

// One panel of the instruction set, kUnits * kLanes columns of each gate, as parts of stored panels. A vector of 16
// lanes consists of two stored ones, which may lie in two panels; a vector of 4 lanes is half of a stored one.
template <int kVectors, int kUnits>
struct PanelView {
  static constexpr int64_t kRow = kVectors * kPackedLanes;  // values of one k
  const char *first, *second;

  PanelView(const PackedProduct& p) {
    const int64_t panel = p.column / p.layout.columns(), within = p.column % p.layout.columns();
    first = p.panels + panel * p.layout.panel_bytes() + within * p.layout.together() * bytes_of(p.layout.precision);
    // The last panel stands in for one beyond the end, whose columns are not used.
    const int64_t next = min(panel + 1, p.layout.panels() - 1);
    second = p.panels + next * p.layout.panel_bytes();
  }

  // Offset of vector v, and for 16 lanes of its halves.
  static constexpr int64_t offset(int v, int half = 0) {
    const int gate = v / kUnits, unit = v % kUnits;
    if (kLanesOfFloat <= kPackedLanes) return gate * kUnits * kPackedLanes + unit * kLanesOfFloat;
    return (gate * kUnits + (2 * unit + half) % kUnits) * kPackedLanes;
  }
  static constexpr bool in_second(int v, int half) { return (2 * (v % kUnits) + half) / kUnits > 0; }

  // Vector v of row k, of 4-byte elements.
  SEQKERNELS_INLINE Bits32 words(int64_t k, int v) const {
    const auto at = [&](const char* panel, int half) { return panel + (k * kRow + offset(v, half)) * 4; };
#if defined(__AVX512F__)
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(in_second(v, 0) ? second : first, 0)));
    return (Bits32)_mm512_inserti64x4(
        _mm512_castsi256_si512(low),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(in_second(v, 1) ? second : first, 1))), 1);
#else
    return (Bits32)load(reinterpret_cast<const float*>(at(first, 0)));
#endif
  }
  // Vector v of row k, of 2-byte elements.
  SEQKERNELS_INLINE Native<float> halves(int64_t k, int v) const {
    const auto at = [&](const char* panel, int half) { return panel + (k * kRow + offset(v, half)) * 2; };
#if defined(__AVX512F__)
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(in_second(v, 0) ? second : first, 0)));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(in_second(v, 1) ? second : first, 1)));
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
#else
    return load(reinterpret_cast<const Half*>(at(first, 0)));
#endif
  }
};

// C[kRows, vectors] = or += A[kRows, kChains * chain] B, as kChains chains, which are added in order. k: the first row
// of B, a multiple of kChain.
template <Precision kPrecision, int kVectors, int kUnits, int kRows, int kChains>
SEQKERNELS_INLINE void chains(const PanelView<kVectors, kUnits>& b, int64_t k, int64_t chain, const float* a,
                              int64_t lda, float* c, int64_t ldc, Into into) {
  using V = Native<float>;
  V sum[kChains][kRows][kVectors] = {};
  constexpr int kTogether = kPrecision == Precision::kBFloat16 ? 2 : 1;
  const int64_t first = k / kTogether, steps = chain / kTogether;  // rows of B as stored
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 2
    for (int n = 0; n < kChains; ++n) {
      V left[kTogether][kRows];
#pragma GCC unroll 2
      for (int j = 0; j < kTogether; ++j) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) left[j][r] = broadcast(a[r * lda + n * kChain + i * kTogether + j]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t row = first + n * (kChain / kTogether) + i;
        V right[kTogether];
        if constexpr (kPrecision == Precision::kFloat32) {
          right[0] = (V)b.words(row, v);
        } else if constexpr (kPrecision == Precision::kFloat16) {
          right[0] = b.halves(row, v);
        } else {
          const Bits32 pair = b.words(row, v);
          right[0] = (V)(pair << 16);
          right[1] = (V)(pair & 0xffff0000);
        }
#pragma GCC unroll 2
        for (int j = 0; j < kTogether; ++j) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sum[n][r][v] = fma(left[j][r], right[j], sum[n][r][v]);
        }
      }
    }
  }
  if constexpr (kTogether == 2) {
    if (chain % 2 != 0) {  // the last k of all
      const int64_t last = chain - 1;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V right = (V)(b.words(first + steps, v) << 16);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[0][r][v] = fma(broadcast(a[r * lda + last]), right, sum[0][r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * ldc + v * kLanesOfFloat;
      V total = into == Into::kAdd ? load(to) + sum[0][r][v] : sum[0][r][v];
      if constexpr (kChains == 2) total = total + sum[1][r][v];
      store(to, total);
    }
  }
}

template <Precision kPrecision, int kVectors, int kUnits, int kRows>
SEQKERNELS_INLINE void tile_of_rows(const PanelView<kVectors, kUnits>& b, int64_t height, int64_t k0, int64_t k,
                                    const float* a, int64_t lda, float* c, int64_t ldc, Into into) {
  if constexpr (kRows > 1) {
    if (height < kRows) {
      return tile_of_rows<kPrecision, kVectors, kUnits, kRows - 1>(b, height, k0, k, a, lda, c, ldc, into);
    }
  }
  int64_t i = 0;
  if constexpr (kRows == 1) {  // two chains at once hide the latency of the multiply-add
    for (; i + 2 * kChain <= k; i += 2 * kChain, into = Into::kAdd) {
      chains<kPrecision, kVectors, kUnits, kRows, 2>(b, k0 + i, kChain, a + k0 + i, lda, c, ldc, into);
    }
  }
  for (; i < k; i += kChain, into = Into::kAdd) {
    chains<kPrecision, kVectors, kUnits, kRows, 1>(b, k0 + i, min(kChain, k - i), a + k0 + i, lda, c, ldc, into);
  }
}

template <Precision kPrecision, int kVectors, int kUnits>
__attribute__((noinline)) void product_of_floats(const PackedProduct& p) {
  const PanelView<kVectors, kUnits> b(p);
  const int64_t K = p.layout.depth;
  Into into = p.add ? Into::kAdd : Into::kReplace;
  if (K == 0 && into == Into::kReplace) {
    for (int64_t r = 0; r < p.rows; ++r) memset(p.c + r * p.ldc, 0, kVectors * kLanesOfFloat * sizeof(float));
  }
  // For one row nothing is read twice. For more, a block of the panel stays in the L1 cache.
  const int64_t block = p.rows == 1 ? max(K, 1) : kBlock;
  for (int64_t k0 = 0; k0 < K; k0 += block, into = Into::kAdd) {
    const float* a = static_cast<const float*>(p.a.values);
    float* c = p.c;
    int64_t rows = p.rows;
    for (int64_t tiles = ceil_div(rows, kTileRows<kVectors>); tiles > 0; --tiles) {
      const int64_t height = ceil_div(rows, tiles);
      tile_of_rows<kPrecision, kVectors, kUnits, kTileRows<kVectors>>(b, height, k0, min(block, K - k0), a, p.a.stride,
                                                                      c, p.ldc, into);
      rows -= height;
      a += height * p.a.stride;
      c += height * p.ldc;
    }
  }
}

template <int kVectors, int kUnits>
void product_of(const PackedProduct& p) {
  switch (p.layout.precision) {
    case Precision::kFloat32:
      return product_of_floats<Precision::kFloat32, kVectors, kUnits>(p);
    case Precision::kBFloat16:
      return product_of_floats<Precision::kBFloat16, kVectors, kUnits>(p);
    case Precision::kFloat16:
      return product_of_floats<Precision::kFloat16, kVectors, kUnits>(p);
    case Precision::kInt8:
      return product_of_int8<kVectors, kUnits>(p, PanelView<kVectors, kUnits>(p));
  }
}

void product(const PackedProduct& p) {
  switch (p.layout.gates) {
    case 1:
      return product_of<4, 4>(p);
    case 2:
      return product_of<4, 2>(p);
    case 3:
      return product_of<3, 1>(p);
    default:
      return product_of<4, 1>(p);
  }
}

void quantize(const Activations& a, int64_t rows, int64_t depth, float range) {
  typedef int32_t Int32 __attribute__((vector_size(kVectorBytes)));
  typedef int8_t Bytes __attribute__((vector_size(kLanesOfFloat)));
  using V = Native<float>;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = static_cast<const float*>(a.values) + r * a.stride;
    int8_t* to = a.bytes + r * a.byte_stride;
    Int32 most = {};  // |x| in the order of its bits, in which NaN and infinity are the largest
    for (int64_t k = 0; k < depth; k += kLanesOfFloat) {
      const Int32 magnitude = (Int32)load(from + k, depth - k) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    int32_t bits = 0;
    for (int i = 0; i < kLanesOfFloat; ++i) bits = most[i] > bits ? most[i] : bits;
    float largest;
    memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000;
    if (finite && range > 0) largest = range;
    constexpr float kSmallest = 7.888609e-31f;  // 2^-100
    const bool empty = !finite || largest < kSmallest;
    a.scales[r] = !finite ? std::numeric_limits<float>::quiet_NaN() : empty ? 0.0f : largest / 127.0f;
    const V inverse = broadcast(empty ? 0.0f : 127.0f / largest), limit = broadcast(127.0f);
    for (int64_t k = 0; k < a.byte_stride; k += kLanesOfFloat) {
      Bytes bytes = {};
      if (!empty && k < depth) {
        V x = load(from + k, depth - k) * inverse;
        x = x > limit ? limit : x;
        x = x < -limit ? -limit : x;
        bytes = __builtin_convertvector((Int32)(x + Vec<float>::kRound) << 24 >> 24, Bytes);
      }
      memcpy(to + k, &bytes, kLanesOfFloat);
    }
  }
}

}  // namespace

PackedKernels packed_kernels() { return {product, quantize}; }

}  // namespace seqkernels::SEQKERNELS_ISA
