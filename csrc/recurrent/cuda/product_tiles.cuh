// Products outside the time loop on a GPU: C = A B^T with operands whose lines are rows of x, of gates, or states
// addressed by links.
//
// A block owns a tile of C and loops over K in stages of 128 bytes per row: asynchronous copies fill the next stages of
// a ring in shared memory while the fragments of this one are multiplied. Operands keep their layout in global memory,
// K along a line or across lines; load_matrices transposes where needed. Pieces of 16 bytes are swizzled within a line
// by an exclusive or with the line number, which avoids bank conflicts of copies and fragment loads.
//
// Every element of C is summed in the order of K for any tile size, so the tile may depend on the number of rows and
// the bits of a row do not.
#pragma once

#include <stdexcept>

#include "recurrent/cuda/products.cuh"

namespace seqkernels::cuda {

constexpr int kStageBytes = 128;  // of K
template <class S>
constexpr int kDepth = kStageBytes / static_cast<int>(sizeof(S));

// Lines that start at multiples of 16 bytes and are whole pieces long, or any: those need registers that large tiles do
// not have.
enum class Lines { kWhole, kAny };

// kM x kN of C by kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kResident_, Lines kLines_ = Lines::kWhole>
struct Tile {
  static constexpr Lines kLines = kLines_;
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kResident = kResident_;  // blocks on a multiprocessor
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
};

// Null: zeros.
template <class S>
SK_DEVICE Global<const S> line_of(const Matrix& m, int64_t line, int64_t lines) {
  if (line >= lines) return Global<const S>();
  const Global<const S> ordinary = global<const S>(m.at, m.count);
  if (m.links == nullptr) {
    return ordinary + (m.period == 0 ? line * m.ld : line / m.period * m.ld + line % m.period * m.across);
  }
  constexpr int64_t kWords = sizeof(Link) / sizeof(int64_t);
  const int64_t prev = load<Cache::kReadOnly>(global<const int64_t>(m.links, m.links_count * kWords), line * kWords);
  if (prev < 0 || is_reset(prev)) return Global<const S>();
  if (prev < m.link_rows) return ordinary + prev * m.ld;
  if (m.initial == nullptr) return Global<const S>();
  return global<const S>(m.initial, m.initial_count) + (prev - m.link_rows) * m.initial_ld;
}

SK_DEVICE int clamped(int x, int most) { return x < 0 ? 0 : x > most ? most : x; }

// What is xored to the number of a piece in its line. Fragments of TF32 whose K runs across lines are gathered word by
// word, four lines at a time; fused multiply-adds read one line at a time.
template <Arithmetic kHow, class S, bool kInLine>
SK_HOST_DEVICE constexpr int turn(int line) {
  if constexpr (kInLine) {
    return line % 8;
  } else if constexpr (kHow == Arithmetic::kExact) {
    return 0;
  } else if constexpr (sizeof(S) == 2) {
    return line % 8;
  } else {
    return line % 4 * 2;
  }
}

// Where (place along M or N, k) of a stage is kept. kWide: the tile's M or N.
template <Arithmetic kHow, class S, int kWide, bool kInLine>
SK_DEVICE int kept_at(int place, int k) {
  constexpr int kP = kPiece<S>;
  const int line = kInLine ? place : k, along = kInLine ? k : place;
  constexpr int kPitch = kInLine ? kDepth<S> : kWide;
  return line * kPitch + ((along / kP) ^ turn<kHow, S, kInLine>(line)) * kP + along % kP;
}

// Brings stages of one operand. A thread has the same piece of every kStride-th line.
template <Arithmetic kHow, class S, int kWide, int kThreads, bool kInLine>
struct Loader {
  static constexpr int kP = kPiece<S>;
  static constexpr int kElements = kWide * kDepth<S>;  // of a stage
  static constexpr int kPitch = kInLine ? kDepth<S> : kWide;
  static constexpr int kAcross = kPitch / kP, kStride = kThreads / kAcross;
  static constexpr int kLines = kInLine ? kWide : kDepth<S>;
  static constexpr int kCount = kLines / kStride;  // pieces of a thread
  static_assert(kCount * kStride == kLines, "whole lines");
  static_assert(turn<kHow, S, kInLine>(kStride) == 0, "a thread's lines turn alike");
  // Lines that are kept: of all rows, for both parts, or of two stages of K.
  static SK_HOST_DEVICE int64_t lines(int parts) { return kInLine ? parts * kWide : 2 * kDepth<S>; }

  int line, piece, to;
  int along, there;  // in a line: where this thread's piece begins, and how much of it there is
  SK_DEVICE Loader(int64_t place0, int64_t places) {
    line = thread_index() / kAcross;
    piece = thread_index() % kAcross * kP;
    to = line * kPitch + (thread_index() % kAcross ^ turn<kHow, S, kInLine>(line)) * kP;
    along = static_cast<int>(place0) + piece;
    there = clamped(static_cast<int>(places) - along, kP);
  }
  // To the stage whose K goes from k to at most end.
  SK_DEVICE void at(int k, int end) {
    if (!kInLine) return;
    along = k + piece;
    there = clamped(end - along, kP);
  }

  // Pieces [first, upto) of this thread, of lines that start at multiples of 16 bytes and are whole pieces long.
  SK_DEVICE void fetch(int first, int upto, Shared<const Global<const S>> lines, Shared<S> stage) const {
    Global<const S> from[kCount];
    SK_UNROLL
    for (int i = first; i < upto; ++i) from[i] = lines[line + i * kStride];
    SK_UNROLL
    for (int i = first; i < upto; ++i) {
      copy_async<16>(stage + (to + i * kStride * kPitch), from[i] + along, from[i] && there > 0);
    }
  }
  // Of other lines, that start at multiples of start_bytes.
  SK_DEVICE void fetch_any(int64_t start_bytes, Shared<const Global<const S>> lines, Shared<S> stage) const {
    constexpr int kWord = sizeof(S) > 4 ? static_cast<int>(sizeof(S)) : 4;
    constexpr int kPer = kWord / static_cast<int>(sizeof(S));
    const bool by_words = start_bytes % kWord == 0;
    SK_NO_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Global<const S> from = lines[line + i * kStride];
      const Shared<S> into = stage + (to + i * kStride * kPitch);
      const int count = from ? there : 0;
      if (by_words) {
        SK_UNROLL
        for (int e = 0; e < kP; e += kPer)
          copy_async_part<kWord>(into + e, from + (along + e), clamped(count - e, kPer));
      } else {
        Piece<S> found{};
        SK_UNROLL
        for (int e = 0; e < kP; ++e) {
          if (e < count) found[e] = load<Cache::kReadOnly>(from, along + e);
        }
        store_vec(into, 0, found);
      }
    }
  }
};

// ---- a warp's part of the tile ----

// By the matrix units: fragments of one slice of K, 32 bytes, are read while those of the one before are multiplied.
template <class S, class Shape, bool kLineA, bool kLineB>
struct ByMatrixUnits {
  static constexpr Arithmetic kHow = Arithmetic::kMatrix;
  static constexpr bool kAhead = true;
  static constexpr int kSlices = kStageBytes / 32, kSlice = kDepth<S> / kSlices;  // elements of K
  static constexpr int kM = Shape::kWarpM / 16, kN = Shape::kWarpN / 8;
  static constexpr int kP = kPiece<S>;
  static_assert(kN % 2 == 0, "strips of B come in pairs");
  static constexpr bool kWordsA = !kLineA && sizeof(S) == 4, kWordsB = !kLineB && sizeof(S) == 4;  // no load_matrices
  static constexpr int kSizeA = Shape::kM * kDepth<S>, kSizeB = Shape::kN * kDepth<S>;             // of a stage
  float sum[kM][kN][4];
  uint32_t a[2][kM][4], b[2][kN][2];
  int row0, column0;
  int lane_a, lane_b;  // where this lane's part of the first fragments is kept

  SK_DEVICE ByMatrixUnits()
      : sum{},
        row0(warp_index() / Shape::kWarpsN * Shape::kWarpM),
        column0(warp_index() % Shape::kWarpsN * Shape::kWarpN) {
    const int lane = lane_index(), low = lane / 8 % 2 * 8, high = lane / 16;
    lane_a = kept_at<kHow, S, Shape::kM, kLineA>(row0 + (kWordsA ? lane / 4 : low + (kLineA ? lane % 8 : 0)),
                                                 kWordsA  ? lane % 4
                                                 : kLineA ? high * kP
                                                          : high * 8 + lane % 8);
    lane_b = kept_at<kHow, S, Shape::kN, kLineB>(column0 + (kWordsB ? lane / 4 : high * 8 + (kLineB ? lane % 8 : 0)),
                                                 kWordsB  ? lane % 4
                                                 : kLineB ? low / 8 * kP
                                                          : low + lane % 8);
  }

  static SK_DEVICE void rounded(uint32_t& word) {
    if constexpr (sizeof(S) == 4) word = to_tf32(bit_cast<float>(word));
  }
  // From where a lane reads to `places` rows or columns, a multiple of 8, and `k` on, in stages that begin at multiples
  // of 128 bytes: what lies beyond the reach of a line's turn is added, the rest xored.
  template <int kWide, bool kInLine>
  static SK_DEVICE int moved(int at, int places, int k) {
    if constexpr (kInLine) return (at ^ k) + places * kDepth<S>;
    return (at ^ (places % (8 * kP))) + places / (8 * kP) * (8 * kP) + k * kWide;
  }

  SK_DEVICE void load(int buffer, int slice, int slot, Shared<const S> left, Shared<const S> right) {
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int from = slot * kSizeA + lane_a, k = slice * kSlice;
      if constexpr (kWordsA) {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const S word = left[moved<Shape::kM, kLineA>(from, m * 16 + i % 2 * 8, k + i / 2 * 4)];
          a[buffer][m][i] = bit_cast<uint32_t>(word);
        }
      } else {
        load_matrices<4, !kLineA>(a[buffer][m],
                                  (left + moved<Shape::kM, kLineA>(from, m * 16, k)).template as<const BFloat16>());
      }
    }
    SK_UNROLL
    for (int n = 0; n < kN; n += 2) {
      uint32_t words[4];
      const int from = slot * kSizeB + lane_b, k = slice * kSlice;
      if constexpr (kWordsB) {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const S word = right[moved<Shape::kN, kLineB>(from, n * 8 + i / 2 * 8, k + i % 2 * 4)];
          words[i] = bit_cast<uint32_t>(word);
        }
      } else {
        load_matrices<4, !kLineB>(words,
                                  (right + moved<Shape::kN, kLineB>(from, n * 8, k)).template as<const BFloat16>());
      }
      SK_UNROLL
      for (int i = 0; i < 4; ++i) b[buffer][n + i / 2][i % 2] = words[i];
    }
  }

  SK_DEVICE void multiply(int buffer) {
    SK_UNROLL
    for (int n = 0; n < kN; ++n) {
      SK_UNROLL
      for (int i = 0; i < 2; ++i) rounded(b[buffer][n][i]);
    }
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
      SK_UNROLL
      for (int i = 0; i < 4; ++i) rounded(a[buffer][m][i]);
      SK_UNROLL
      for (int n = 0; n < kN; ++n) {
        if constexpr (sizeof(S) == 2) {
          mma_m16n8k16<S>(sum[m][n], a[buffer][m], b[buffer][n]);
        } else {
          mma_m16n8k8_tf32(sum[m][n], a[buffer][m], b[buffer][n]);
        }
      }
    }
  }

  SK_DEVICE void add(Shared<const float> bias) {
    SK_UNROLL
    for (int n = 0; n < kN; ++n) {
      const Vec<float, 2> two = load_vec<2>(bias, column0 + n * 8 + lane_index() % 4 * 2);
      SK_UNROLL
      for (int m = 0; m < kM; ++m) {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) sum[m][n][i] += two[i % 2];
      }
    }
  }

  // Four consecutive elements of a row: lanes trade halves.
  template <class Out>
  SK_DEVICE Vec<Out, 4> four(int m, int n) const {
    const float (&of)[4] = sum[m][n];
    const bool odd = lane_index() % 2 != 0;
    if constexpr (sizeof(Out) == 2) {
      const uint32_t upper = pack_pair<Out>(of[0], of[1]), lower = pack_pair<Out>(of[2], of[3]);
      const uint32_t other = shuffle_xor(odd ? upper : lower, 1);
      return bit_cast<Vec<Out, 4>>(odd ? Vec<uint32_t, 2>{{other, lower}} : Vec<uint32_t, 2>{{upper, other}});
    } else {
      const float other0 = shuffle_xor(odd ? of[0] : of[2], 1), other1 = shuffle_xor(odd ? of[1] : of[3], 1);
      return odd ? Vec<float, 4>{{other0, other1, of[2], of[3]}} : Vec<float, 4>{{of[0], of[1], other0, other1}};
    }
  }
  // To a C of which `rows` and `columns` are there, none of them beyond the tile; whole: all of the tile, in vectors.
  template <class Out>
  SK_DEVICE void give(Global<Out> c, int64_t ldc, int rows, int columns, bool whole) const {
    const int row = row0 + lane_index() / 4 + lane_index() % 2 * 8, column = column0 + lane_index() % 4 / 2 * 4;
    if (whole) {
      const Global<Out> mine = c + (row * ldc + column);
      SK_UNROLL
      for (int m = 0; m < kM; ++m) {
        const Global<Out> of_row = mine + m * 16 * ldc;
        SK_UNROLL
        for (int n = 0; n < kN; ++n) store_vec(of_row, n * 8, four<Out>(m, n));
      }
      return;
    }
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
      SK_UNROLL
      for (int n = 0; n < kN; ++n) {
        const Vec<Out, 4> values = four<Out>(m, n);
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int64_t at = (row + m * 16) * ldc + column + n * 8 + i;
          if (row + m * 16 < rows && column + n * 8 + i < columns) c[at] = values[i];
        }
      }
    }
  }
};

// By fused multiply-adds: a thread has kM x kN elements, eight rows and four columns of threads being a warp.
template <class S, class Shape, bool kLineA, bool kLineB>
struct ByMultiplyAdd {
  static constexpr Arithmetic kHow = Arithmetic::kExact;
  static constexpr bool kAhead = false;
  static constexpr int kP = kPiece<S>;
  static constexpr int kSlices = kDepth<S> / kP;
  static constexpr int kM = Shape::kWarpM / 8, kN = Shape::kWarpN / 4;
  static_assert(kM % kP == 0 && kN % kP == 0, "whole pieces");
  using T = Compute<S>;
  T sum[kM][kN];
  int row0, column0;

  SK_DEVICE ByMultiplyAdd()
      : sum{},
        row0(warp_index() / Shape::kWarpsN * Shape::kWarpM),
        column0(warp_index() % Shape::kWarpsN * Shape::kWarpN) {}

  // The i-th row or column of a thread, among `threads`; where K runs across lines, a piece has neighbours.
  template <bool kInLine>
  static SK_DEVICE int place(int i, int thread, int threads) {
    return kInLine ? i * threads + thread : (i / kP * threads + thread) * kP + i % kP;
  }
  // Of kCount rows or columns, the elements of a slice.
  template <int kCount, int kWide, bool kInLine>
  static SK_DEVICE void read(S (&to)[kCount][kP], int place0, int thread, int threads, int slice,
                             Shared<const S> stage) {
    SK_UNROLL
    for (int i = 0; i < kCount; i += kInLine ? 1 : kP) {
      SK_UNROLL
      for (int e = 0; e < (kInLine ? 1 : kP); ++e) {
        const Piece<S> piece = load_vec<kP>(
            stage, kept_at<kHow, S, kWide, kInLine>(place0 + place<kInLine>(i, thread, threads), slice * kP + e));
        SK_UNROLL
        for (int j = 0; j < kP; ++j) {
          if constexpr (kInLine) {
            to[i][j] = piece[j];
          } else {
            to[i + j][e] = piece[j];
          }
        }
      }
    }
  }

  SK_DEVICE void multiply_slice(int slice, Shared<const S> left, Shared<const S> right) {
    S a[kM][kP], b[kN][kP];
    read<kM, Shape::kM, kLineA>(a, row0, lane_index() / 4, 8, slice, left);
    read<kN, Shape::kN, kLineB>(b, column0, lane_index() % 4, 4, slice, right);
    SK_UNROLL
    for (int e = 0; e < kP; ++e) {
      SK_UNROLL
      for (int m = 0; m < kM; ++m) {
        SK_UNROLL
        for (int n = 0; n < kN; ++n) sum[m][n] = multiply_add(a[m][e], b[n][e], sum[m][n]);
      }
    }
  }

  SK_DEVICE void add(Shared<const T> bias) {
    SK_UNROLL
    for (int n = 0; n < kN; ++n) {
      const T of_column = bias[column0 + place<kLineB>(n, lane_index() % 4, 4)];
      SK_UNROLL
      for (int m = 0; m < kM; ++m) sum[m][n] += of_column;
    }
  }
  template <class Out>
  SK_DEVICE void give(Global<Out> c, int64_t ldc, int rows, int columns, bool whole) const {
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int row = row0 + place<kLineA>(m, lane_index() / 4, 8);
      const Global<Out> of_row = c + row * ldc;
      SK_UNROLL
      for (int n = 0; n < kN; ++n) {
        const int column = column0 + place<kLineB>(n, lane_index() % 4, 4);
        if (whole || (row < rows && column < columns)) of_row[column] = narrow<Out>(sum[m][n]);
      }
    }
  }
};

// Grid: tiles of C, along a row first, x splits of K.
template <template <class, class, bool, bool> class Worker, class S, class Shape, bool kLineA, bool kLineB>
SK_KERNEL(Shape::kThreads, Shape::kResident)
product_kernel(const SK_GRID_CONSTANT ProductArgs args) {
  using T = Compute<S>;
  using Work = Worker<S, Shape, kLineA, kLineB>;
  using LoadA = Loader<Work::kHow, S, Shape::kM, Shape::kThreads, kLineA>;
  using LoadB = Loader<Work::kHow, S, Shape::kN, Shape::kThreads, kLineB>;
  constexpr int kK = kDepth<S>, kStages = Shape::kStages;
  static_assert(Shape::kThreads >= 2 * kK, "a thread for each line of K");
  SharedArena arena;
  const Shared<S> left = arena.array<S>(kStages * LoadA::kElements, 128);
  const Shared<S> right = arena.array<S>(kStages * LoadB::kElements, 128);
  using Row = Global<const S>;
  const Shared<Row> lines_a = arena.array<Row>(LoadA::lines(args.parts));
  const Shared<Row> lines_b = arena.array<Row>(LoadB::lines(args.parts));
  const bool has_bias = args.bias[0] != nullptr || args.bias[1] != nullptr;
  const Shared<T> bias = arena.array<T>(has_bias ? Shape::kN : 0);

  const int64_t across = (args.N + Shape::kN - 1) / Shape::kN;
  const int64_t column0 = block_index() % across * Shape::kN, row0 = block_index() / across * Shape::kM;
  const int64_t split = block_index_y(), first = split * args.chunk;
  const int64_t end = first + args.chunk < args.K ? first + args.chunk : args.K;
  const int steps = end > first ? static_cast<int>((end - first + kK - 1) / kK) : 0, all_steps = steps * args.parts;
  if constexpr (kLineA) {
    for (int i = thread_index(); i < args.parts * Shape::kM; i += Shape::kThreads) {
      lines_a[i] = line_of<S>(args.a[i / Shape::kM], row0 + i % Shape::kM, args.M);
    }
  }
  if constexpr (kLineB) {
    for (int i = thread_index(); i < args.parts * Shape::kN; i += Shape::kThreads) {
      lines_b[i] = line_of<S>(args.b[i / Shape::kN], column0 + i % Shape::kN, args.N);
    }
  }
  if (has_bias) {
    for (int i = thread_index(); i < Shape::kN; i += Shape::kThreads) {
      T value = T(0);
      SK_UNROLL
      for (int b = 0; b < 2; ++b) {
        if (args.bias[b] != nullptr && column0 + i < args.N) {
          value += widen(load<Cache::kReadOnly>(global<const S>(args.bias[b], args.N), column0 + i));
        }
      }
      bias[i] = value;
    }
  }
  // Where K runs across lines, each of the first threads looks up one line of a stage.
  const auto line_of_k = [&](int step) {
    const int part = step >= steps, i = thread_index();
    if (step >= all_steps || i >= 2 * kK) return Row();
    const int64_t k = first + static_cast<int64_t>(step - part * steps) * kK + i % kK;
    if (i < kK) return kLineA ? Row() : line_of<S>(args.a[part], k, end);
    return kLineB ? Row() : line_of<S>(args.b[part], k, end);
  };
  const auto keep_line = [&](int step, Row line) {
    const int i = thread_index();
    if (!kLineA && i < kK) lines_a[step % 2 * kK + i] = line;
    if (!kLineB && i >= kK && i < 2 * kK) lines_b[step % 2 * kK + i - kK] = line;
  };

  LoadA load_a(row0, args.M);
  LoadB load_b(column0, args.N);
  Shared<const Row> from_a, from_b;
  // Copies of a stage: a share of them, or of any lines all with the first share.
  constexpr int kShares = Work::kAhead ? Work::kSlices - 1 : 1;
  const auto fetch = [&](int step, int slot, int share) {
    if (step >= all_steps) return;
    if (share == 0) {
      const int part = step >= steps, k = static_cast<int>(first) + (step - part * steps) * kK;
      load_a.at(k, static_cast<int>(end));
      load_b.at(k, static_cast<int>(end));
      from_a = lines_a + (kLineA ? part * Shape::kM : step % 2 * kK);
      from_b = lines_b + (kLineB ? part * Shape::kN : step % 2 * kK);
    }
    const Shared<S> to_a = left + slot * LoadA::kElements, to_b = right + slot * LoadB::kElements;
    if (Shape::kLines == Lines::kWhole || args.whole_pieces) {
      load_a.fetch(LoadA::kCount * share / kShares, LoadA::kCount * (share + 1) / kShares, from_a, to_a);
      load_b.fetch(LoadB::kCount * share / kShares, LoadB::kCount * (share + 1) / kShares, from_b, to_b);
    } else if (share == 0) {
      load_a.fetch_any(args.start_bytes, from_a, to_a);
      load_b.fetch_any(args.start_bytes, from_b, to_b);
    }
  };

  Work work;
  SK_NO_UNROLL
  for (int step = 0; step < kStages - 1; ++step) {
    keep_line(step, line_of_k(step));
    block_sync();
    SK_UNROLL
    for (int share = 0; share < kShares; ++share) fetch(step, step, share);
    copy_async_commit();
  }
  keep_line(kStages - 1, line_of_k(kStages - 1));
  copy_async_wait<kStages - 2>();
  block_sync();

  // A step's fetches fill the slot that the step before has left.
  int slot = 0, filled = kStages - 1;
  if constexpr (Work::kAhead) {
    if (all_steps > 0) work.load(0, 0, 0, left, right);
  }
  SK_NO_UNROLL
  for (int step = 0; step < all_steps; ++step) {
    const Row line = line_of_k(step + kStages);
    const int next = slot + 1 == kStages ? 0 : slot + 1;
    const auto next_stage = [&] {
      keep_line(step + kStages, line);
      copy_async_wait<kStages - 2>();
      block_sync();
    };
    if constexpr (Work::kAhead) {
      static_assert(Work::kSlices % 2 == 0, "two buffers");
      SK_UNROLL
      for (int slice = 0; slice < Work::kSlices; ++slice) {
        const bool last = slice == Work::kSlices - 1;
        if (last) next_stage();
        if (!last || step + 1 < all_steps) {
          work.load((slice + 1) % 2, last ? 0 : slice + 1, last ? next : slot, left, right);
        }
        if (!last) fetch(step + kStages - 1, filled, slice);
        if (slice == Work::kSlices - 2) copy_async_commit();
        work.multiply(slice % 2);
      }
    } else {
      fetch(step + kStages - 1, filled, 0);
      copy_async_commit();
      SK_NO_UNROLL
      for (int slice = 0; slice < Work::kSlices; ++slice) {
        work.multiply_slice(slice, left + slot * LoadA::kElements, right + slot * LoadB::kElements);
      }
      next_stage();
    }
    filled = slot;
    slot = next;
  }
  copy_async_wait<0>();

  if (has_bias) work.add(bias);
  const int64_t size = args.splits * args.M * args.ldc, start = (split * args.M + row0) * args.ldc + column0;
  const int rows = args.M - row0 < Shape::kM ? static_cast<int>(args.M - row0) : Shape::kM;
  const int columns = args.N - column0 < Shape::kN ? static_cast<int>(args.N - column0) : Shape::kN;
  const bool whole = args.vectors_c && rows == Shape::kM && columns == Shape::kN;
  if (args.narrow) {
    work.give(global<S>(args.c, size) + start, args.ldc, rows, columns, whole);
  } else {
    work.give(global<T>(args.c, size) + start, args.ldc, rows, columns, whole);
  }
}

// ---- host ----

template <template <class, class, bool, bool> class Worker, class S, class Shape, bool kLineA, bool kLineB>
void launch_tiles(const ProductArgs& args, void* stream) {
  constexpr Arithmetic kHow = Worker<S, Shape, kLineA, kLineB>::kHow;
  using LoadA = Loader<kHow, S, Shape::kM, Shape::kThreads, kLineA>;
  using LoadB = Loader<kHow, S, Shape::kN, Shape::kThreads, kLineB>;
  SharedBytes bytes;
  bytes.array<S>(Shape::kStages * LoadA::kElements, 128);
  bytes.array<S>(Shape::kStages * LoadB::kElements, 128);
  bytes.array<Global<const S>>(LoadA::lines(args.parts));
  bytes.array<Global<const S>>(LoadB::lines(args.parts));
  bytes.array<Compute<S>>(args.bias[0] != nullptr || args.bias[1] != nullptr ? Shape::kN : 0);
  LaunchConfig config;
  config.grid = {(args.N + Shape::kN - 1) / Shape::kN * ((args.M + Shape::kM - 1) / Shape::kM), args.splits};
  config.block = Shape::kThreads;
  config.shared_bytes = bytes.bytes();
  config.stream = stream;
  launch(product_kernel<Worker, S, Shape, kLineA, kLineB>, config, args);
}

template <template <class, class, bool, bool> class Worker, class S, class Shape>
void launch_product(const ProductArgs& args, void* stream) {
  const bool line_a = args.a[0].k_in_line, line_b = args.b[0].k_in_line;
  if (line_a && line_b) return launch_tiles<Worker, S, Shape, true, true>(args, stream);
  if (line_a) return launch_tiles<Worker, S, Shape, true, false>(args, stream);
  if (!line_b) return launch_tiles<Worker, S, Shape, false, false>(args, stream);
  throw std::logic_error("no product of a left operand across lines and a right one along them");
}

}  // namespace seqkernels::cuda
