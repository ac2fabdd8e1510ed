// Matrix products on a GPU: fragments, and the products outside the time loop.
//
// Operands are stored in fragment order. A strip of 8 rows is divided along K into blocks of 64 bytes per row; a block
// is 32 pieces of 16 bytes, piece lane = 4 row + quarter. A warp reads a block with one 16-byte access per lane,
// contiguous in global and in shared memory. The fragments of the matrix instructions assign other k to a lane, but a
// sum over k is correct in any order on which both operands agree: lane (row g, quarter t) supplies its own piece, four
// bytes for the low and four for the high half of k at a time.
//
// The order of every sum depends on the shape alone; there are no atomics.
#pragma once

#include "recurrent/cuda/arithmetic.cuh"
#include "recurrent/cuda/walk.cuh"

#if defined(SEQKERNELS_EMULATE_CUDA)
#define SK_OUTLINE inline
#else
#define SK_OUTLINE __device__ __noinline__  // one copy of a long loop for all the kernels that call it
#endif

namespace seqkernels::cuda {

enum class Arithmetic { kExact, kMatrix };  // fused multiply-adds; the matrix units: half types, and float32 as TF32

template <class S>
constexpr int kPiece = 16 / static_cast<int>(sizeof(S));  // elements
template <class S>
constexpr int kBlockK = 4 * kPiece<S>;  // of K
template <class S>
constexpr int kBlockSize = 32 * kPiece<S>;  // elements of 8 rows
template <class S>
using Piece = Vec<S, kPiece<S>>;

template <class S>
SK_HOST_DEVICE int64_t blocks_of(int64_t K) {
  return (K + kBlockK<S> - 1) / kBlockK<S>;
}
// Offset of (row < 8, k) in a strip of consecutive blocks.
template <class S>
SK_HOST_DEVICE int64_t place_in_strip(int64_t row, int64_t k) {
  const int64_t in_block = k % kBlockK<S>;
  return (k / kBlockK<S> * 32 + row * 4 + in_block / kPiece<S>)*kPiece<S> + in_block % kPiece<S>;
}
// The left operand comes in tiles of 16 rows: of each block first rows 0 to 7, then 8 to 15.
template <class S>
SK_HOST_DEVICE int64_t place_in_tile(int64_t row, int64_t k) {
  const int64_t in_block = k % kBlockK<S>;
  return (k / kBlockK<S> * 64 + row * 4 + in_block / kPiece<S>)*kPiece<S> + in_block % kPiece<S>;
}

// A piece as operand of the matrix instructions, packed: 16-bit elements would otherwise occupy a register each.
using Words = Vec<uint32_t, 4>;
template <class S, class Pointer>
SK_DEVICE Words load_words(Pointer from, int64_t i) {
  return bit_cast<Words>(load_vec<kPiece<S>>(from, i));
}
// Words of A for one half of a block as operand of the matrix instructions: 16 rows, 8 each in low and high.
SK_DEVICE Words left_of(const Words& low, const Words& high, int half) {
  return {{low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1]}};
}
// sum += A B^T over one half of a block: 16 rows of A, 8 rows of B.
template <class S>
SK_DEVICE void multiply(float (&sum)[4], const Words& of_a, const Words& right, int half) {
  const uint32_t left[4] = {of_a[0], of_a[1], of_a[2], of_a[3]};
  const uint32_t of_b[2] = {right[2 * half], right[2 * half + 1]};
  if constexpr (sizeof(S) == 2) {
    mma_m16n8k16<S>(sum, left, of_b);
  } else {
    mma_m16n8k8_tf32(sum, left, of_b);
  }
}

// sum[m][n] += A B^T over one block: kM tiles of 16 rows (of which `tiles` are there), kN strips of 8 columns. a and b
// are at the block. A lane holds of tile m and strip n: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <Arithmetic kHow, class S, int kM, int kN, class Left, class Right>
SK_DEVICE void add_block(Compute<S> (&sum)[kM][kN][4], int tiles, Left a, int64_t tile_size, Right b,
                         int64_t strip_size) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  if constexpr (kHow == Arithmetic::kMatrix) {
    Words right[kN];
    SK_UNROLL
    for (int n = 0; n < kN; ++n) right[n] = load_words<S>(b, n * strip_size + lane * kPiece<S>);
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
      if (m >= tiles) continue;
      const Words low = load_words<S>(a, m * tile_size + lane * kPiece<S>);
      const Words high = load_words<S>(a, m * tile_size + kBlockSize<S> + lane * kPiece<S>);
      SK_UNROLL
      for (int half = 0; half < 2; ++half) {
        SK_UNROLL
        for (int n = 0; n < kN; ++n) multiply<S>(sum[m][n], left_of(low, high, half), right[n], half);
      }
    }
  } else {
    SK_NO_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      Piece<S> right[kN][2];
      SK_UNROLL
      for (int n = 0; n < kN; ++n) {
        SK_UNROLL
        for (int i = 0; i < 2; ++i) {
          right[n][i] = load_vec<kPiece<S>>(b, n * strip_size + ((2 * t + i) * 4 + quarter) * kPiece<S>);
        }
      }
      SK_UNROLL
      for (int m = 0; m < kM; ++m) {
        if (m >= tiles) continue;
        SK_UNROLL
        for (int r = 0; r < 2; ++r) {
          const Piece<S> left =
              load_vec<kPiece<S>>(a, m * tile_size + r * kBlockSize<S> + (g * 4 + quarter) * kPiece<S>);
          SK_UNROLL
          for (int e = 0; e < kPiece<S>; ++e) {
            SK_UNROLL
            for (int n = 0; n < kN; ++n) {
              SK_UNROLL
              for (int i = 0; i < 2; ++i) {
                Compute<S>& into = sum[m][n][2 * r + i];
                into = multiply_add(left[e], right[n][i][e], into);
              }
            }
          }
        }
      }
    }
  }
}

// An element as operand of the matrix units: unchanged, or rounded to TF32.
template <class S>
SK_DEVICE S operand(S x, bool tf32) {
  if constexpr (std::is_same<S, float>::value) {
    if (tf32) return bit_cast<float>(to_tf32(x));
  }
  return x;
}

// ---- products outside the time loop ----

// One operand: element (line, i) is at line * ld + i, a line being consecutive in memory. The lines of a matrix are its
// rows, or its columns where K runs over lines.
struct Matrix {
  const void* at;
  int64_t count;  // elements that may be read
  int64_t ld;
  int64_t period;  // not 0: line l is at (l / period) * ld + (l % period) * across
  int64_t across;
  const Link* links;  // not null: line l is the state before row l, at prev * ld, or initial + b * initial_ld
  int64_t link_rows;  // for initial states; zeros after a reset and for rows without a sequence
  int64_t links_count;
  const void* initial;  // null: zeros
  int64_t initial_count, initial_ld;
  bool k_in_line;  // K runs along a line
};

struct ProductArgs {
  int64_t M, N, K;  // C[M, N] = sum over parts of A[M, K] B[N, K]^T
  int parts;        // 1, or 2 that are added up
  Matrix a[2], b[2];
  const void* bias[2];  // [N] or null: added to every row
  void* c;              // [M, ldc] of the compute type or, `narrow`, of the storage type
  int64_t ldc;
  bool narrow;
  // Set by run_product:
  int start_bytes;    // every line starts at a multiple of these, 16 at most
  bool whole_pieces;  // 16, and every line is a multiple of them long
  bool vectors_c;     // four elements of C at a time may be written
  int64_t splits;     // K is cut in so many parts of `chunk`, each with a C of its own: c[split][M][ldc]
  int64_t chunk;      // a multiple of 64 where there is more than one
};

// ---- sums over rows, in a fixed order ----

// to[i] = the sum over k < count of from[k * stride + i], narrowed. From: the compute type.
struct ReduceArgs {
  const void* from;
  int64_t count, stride, size;
  void* to;
  int64_t from_ld, width, to_ld;  // element i is (i / width, i % width) of from[., from_ld] and to[., to_ld]
};
constexpr int kSumThreads = 256;

template <class S>
SK_KERNEL(kSumThreads)
reduce_kernel(const SK_GRID_CONSTANT ReduceArgs args) {
  using T = Compute<S>;
  const int64_t rows = (args.size + args.width - 1) / args.width;
  const Global<const T> from = global<const T>(args.from, (args.count - 1) * args.stride + rows * args.from_ld);
  const Global<S> to = global<S>(args.to, (rows - 1) * args.to_ld + args.width);
  for (int64_t i = grid_thread_index(); i < args.size; i += grid_threads()) {
    const int64_t at = i / args.width * args.from_ld + i % args.width;
    T sum = T(0);
    for (int64_t k = 0; k < args.count; ++k) {
      const T value = from[k * args.stride + at];
      sum = k == 0 ? value : sum + value;
    }
    to[i / args.width * args.to_ld + i % args.width] = narrow<S>(sum);
  }
}

// Sums of columns of storage or compute type over chunks of rows.
struct ColumnsArgs {
  const void* from;  // [rows, columns]
  int64_t rows, columns, chunk;
  void* partial;  // [chunks, columns] of the compute type; null where one chunk is all, and then
  void* sums[2];  // [columns], narrowed, or null
};
constexpr int kColumns = 32;  // a block's; its warps take every eighth row of the chunk

template <class S, class From>
SK_KERNEL(kSumThreads)
columns_kernel(const SK_GRID_CONSTANT ColumnsArgs args) {
  using T = Compute<S>;
  SK_SHARED(T, partial, kSumThreads);
  const int64_t column = block_index() * kColumns + lane_index(), chunk = block_index_y();
  const int64_t first = chunk * args.chunk, end = first + args.chunk < args.rows ? first + args.chunk : args.rows;
  const Global<const From> from = global<const From>(args.from, args.rows * args.columns);
  T sum = T(0);
  if (column < args.columns) {
    for (int64_t row = first + warp_index(); row < end; row += kSumThreads / kWarp) {
      sum += widen(load<Cache::kReadOnly>(from, row * args.columns + column));
    }
  }
  partial[thread_index()] = sum;
  block_sync();
  if (warp_index() == 0 && column < args.columns) {
    T total = T(0);
    SK_UNROLL
    for (int w = 0; w < kSumThreads / kWarp; ++w) {
      const T value = partial[w * kWarp + lane_index()];
      total += value;
    }
    if (args.partial != nullptr) {
      global<T>(args.partial, grid_blocks_y() * args.columns)[chunk * args.columns + column] = total;
    }
    SK_UNROLL
    for (void* to : args.sums) {
      if (to != nullptr) global<S>(to, args.columns)[column] = narrow<S>(total);
    }
  }
}

}  // namespace seqkernels::cuda
