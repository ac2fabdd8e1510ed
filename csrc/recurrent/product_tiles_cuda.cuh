// Products outside the time loop on a GPU: C = A B^T with operands whose lines are rows of x, of gates, or states found
// by links.
//
// A block owns a tile of C and walks K in stages of 128 bytes a row: asynchronous copies bring the next stages to a
// ring in shared memory while fragments of this one are multiplied. An operand lies there as in global memory, K along
// a line or across lines, and load_matrices turns it on the way to registers. Pieces of 16 bytes trade places within a
// line, by an exclusive or with the line's number, so that neither the copies nor the fragments meet in a bank.
//
// Every element of C is summed in the order of K, whatever the tile: the tile may follow from the number of rows, and a
// row's bits do not.
#pragma once

#include <stdexcept>

#include "recurrent/products_cuda.cuh"

namespace seqkernels::cuda {

constexpr int kStageBytes = 128;  // of K
template <class S>
constexpr int kDepth = kStageBytes / static_cast<int>(sizeof(S));
constexpr int64_t kFromInitial = int64_t{1} << 62;  // in a line's start: it is one of the initial states
constexpr int64_t kNoLine = -1;

// kM x kN of C by kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kResident_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kResident = kResident_;  // blocks on a multiprocessor
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
};

template <class S>
SK_DEVICE int64_t start_of(const Matrix& m, int64_t line, int64_t lines) {
  if (line >= lines) return kNoLine;
  if (m.links == nullptr) return m.period == 0 ? line * m.ld : line / m.period * m.ld + line % m.period * m.across;
  const int64_t prev = load<Cache::kReadOnly>(
      global<const int64_t>(m.links, m.links_count * static_cast<int64_t>(sizeof(Link) / sizeof(int64_t))),
      line * static_cast<int64_t>(sizeof(Link) / sizeof(int64_t)));
  if (prev < 0 || starts_anew(prev)) return kNoLine;
  if (prev < m.link_rows) return prev * m.ld;
  return m.initial == nullptr ? kNoLine : (prev - m.link_rows) * m.initial_ld | kFromInitial;
}

SK_DEVICE int clamped(int64_t x, int most) { return x < 0 ? 0 : x > most ? most : static_cast<int>(x); }

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
  // Starts of lines: of all rows, for both parts, or of two stages of K.
  static SK_HOST_DEVICE int64_t starts(int parts) { return kInLine ? parts * kWide : 2 * kDepth<S>; }

  int line, piece, to;
  SK_DEVICE Loader() {
    line = thread_index() / kAcross;
    piece = thread_index() % kAcross * kP;
    to = line * kPitch + (thread_index() % kAcross ^ turn<kHow, S, kInLine>(line)) * kP;
  }

  // The stage whose K goes from k to at most end. starts: of its lines.
  template <class F>
  SK_DEVICE void each(int first, int upto, const Matrix& m, int64_t place0, int64_t places, int64_t k, int64_t end,
                      Shared<const int64_t> starts, Shared<S> stage, F&& copy) const {
    const Global<const S> ordinary = global<const S>(m.at, m.count);
    const Global<const S> initial = global<const S>(m.initial, m.initial == nullptr ? 0 : m.initial_count);
    const int64_t along = (kInLine ? k : place0) + piece;
    const int there = clamped((kInLine ? end : places) - along, kP);
    SK_UNROLL
    for (int i = first; i < upto; ++i) {
      const int64_t start = starts[line + i * kStride];
      const int count = start < 0 ? 0 : there;
      const Global<const S> base = start >= kFromInitial ? initial : ordinary;
      const int64_t offset = count == 0 ? 0 : (start & ~kFromInitial) + along;
      copy(stage + (to + i * kStride * kPitch), base + offset, count);
    }
  }
  SK_DEVICE void fetch(int first, int upto, const Matrix& m, int64_t place0, int64_t places, int64_t k, int64_t end,
                       Shared<const int64_t> starts, Shared<S> stage) const {
    each(first, upto, m, place0, places, k, end, starts, stage,
         [](Shared<S> into, Global<const S> from, int count) { copy_async_part<16>(into, from, count); });
  }
  // Lines that start anywhere.
  SK_DEVICE void fetch_unaligned(const Matrix& m, int64_t place0, int64_t places, int64_t k, int64_t end,
                                 Shared<const int64_t> starts, Shared<S> stage) const {
    constexpr int kWord = sizeof(S) > 4 ? static_cast<int>(sizeof(S)) : 4;
    constexpr int kPer = kWord / static_cast<int>(sizeof(S));
    const bool by_words = m.start_bytes % kWord == 0;
    SK_NO_UNROLL
    for (int i = 0; i < kCount; ++i) {
      each(0, 1, m, place0, places, k, end, starts + i * kStride, stage + i * kStride * kPitch,
           [&](Shared<S> into, Global<const S> from, int count) {
             if (by_words) {
               SK_UNROLL
               for (int e = 0; e < kP; e += kPer) {
                 const int of_word = clamped(count - e, kPer);
                 copy_async_part<kWord>(into + e, from + (of_word == 0 ? 0 : e), of_word);
               }
             } else {
               Piece<S> found{};
               SK_UNROLL
               for (int e = 0; e < kP; ++e) {
                 if (e < count) found[e] = load<Cache::kReadOnly>(from, e);
               }
               store_vec(into, 0, found);
             }
           });
    }
  }
};

// ---- a warp's part of the tile
// ---------------------------------------------------------------------------------------

// By the matrix units: fragments of one slice of K, 32 bytes, are read while those of the one before are multiplied.
template <class S, class Shape, bool kLineA, bool kLineB>
struct ByMatrixUnits {
  static constexpr Arithmetic kHow = Arithmetic::kMatrix;
  static constexpr bool kAhead = true;
  static constexpr int kSlices = kStageBytes / 32, kSlice = kDepth<S> / kSlices;  // elements of K
  static constexpr int kM = Shape::kWarpM / 16, kN = Shape::kWarpN / 8;
  static constexpr int kP = kPiece<S>;
  static_assert(kN % 2 == 0, "strips of B come in pairs");
  float sum[kM][kN][4];
  uint32_t a[2][kM][4], b[2][kN][2];
  int row0, column0;

  SK_DEVICE ByMatrixUnits()
      : sum{},
        row0(warp_index() / Shape::kWarpsN * Shape::kWarpM),
        column0(warp_index() % Shape::kWarpsN * Shape::kWarpN) {}

  static SK_DEVICE void rounded(uint32_t& word) {
    if constexpr (sizeof(S) == 4) word = to_tf32(bit_cast<float>(word));
  }

  SK_DEVICE void load(int buffer, int slice, Shared<const S> left, Shared<const S> right) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int row = row0 + m * 16;
      if constexpr (kLineA || sizeof(S) == 2) {
        const int at = kLineA ? kept_at<kHow, S, Shape::kM, kLineA>(row + lane % 16, slice * kSlice + lane / 16 * kP)
                              : kept_at<kHow, S, Shape::kM, kLineA>(row + lane / 8 % 2 * 8,
                                                                    slice * kSlice + lane / 16 * 8 + lane % 8);
        load_matrices<4, !kLineA>(a[buffer][m], (left + at).template as<const BFloat16>());
      } else {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const S word = left[kept_at<kHow, S, Shape::kM, kLineA>(row + i % 2 * 8 + g, slice * kSlice + i / 2 * 4 + t)];
          a[buffer][m][i] = bit_cast<uint32_t>(word);
        }
      }
      SK_UNROLL
      for (int i = 0; i < 4; ++i) rounded(a[buffer][m][i]);
    }
    SK_UNROLL
    for (int n = 0; n < kN; n += 2) {
      const int column = column0 + n * 8;
      if constexpr (kLineB || sizeof(S) == 2) {
        const int at = kLineB ? kept_at<kHow, S, Shape::kN, kLineB>(column + lane / 16 * 8 + lane % 8,
                                                                    slice * kSlice + lane / 8 % 2 * kP)
                              : kept_at<kHow, S, Shape::kN, kLineB>(column + lane / 16 * 8,
                                                                    slice * kSlice + lane / 8 % 2 * 8 + lane % 8);
        uint32_t words[4];
        load_matrices<4, !kLineB>(words, (right + at).template as<const BFloat16>());
        SK_UNROLL
        for (int i = 0; i < 4; ++i) b[buffer][n + i / 2][i % 2] = words[i];
      } else {
        SK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const S word =
              right[kept_at<kHow, S, Shape::kN, kLineB>(column + i / 2 * 8 + g, slice * kSlice + i % 2 * 4 + t)];
          b[buffer][n + i / 2][i % 2] = bit_cast<uint32_t>(word);
        }
      }
      SK_UNROLL
      for (int i = 0; i < 4; ++i) rounded(b[buffer][n + i / 2][i % 2]);
    }
  }

  SK_DEVICE void multiply(int buffer) {
    SK_UNROLL
    for (int m = 0; m < kM; ++m) {
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

  // to(row, column, four consecutive elements): lanes trade halves, so that each has four of one row.
  template <class Bias, class To>
  SK_DEVICE void give(Bias&& bias, To&& to) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    SK_UNROLL
    for (int n = 0; n < kN; ++n) {
      const int column = column0 + n * 8;
      const float bias0 = bias(column + 2 * t), bias1 = bias(column + 2 * t + 1);
      SK_UNROLL
      for (int m = 0; m < kM; ++m) {
        float(&of)[4] = sum[m][n];
        of[0] += bias0;
        of[1] += bias1;
        of[2] += bias0;
        of[3] += bias1;
        const bool odd = t % 2 != 0;
        const float other0 = shuffle_xor(odd ? of[0] : of[2], 1), other1 = shuffle_xor(odd ? of[1] : of[3], 1);
        const Vec<float, 4> four =
            odd ? Vec<float, 4>{{other0, other1, of[2], of[3]}} : Vec<float, 4>{{of[0], of[1], other0, other1}};
        to(row0 + m * 16 + g + (odd ? 8 : 0), column + t / 2 * 4, four);
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
            stage,
            kept_at<kHow, S, kWide, kInLine>(place0 + place<kInLine>(i, thread, threads), slice * kP + e));
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
        for (int n = 0; n < kN; ++n) sum[m][n] = fused(a[m][e], b[n][e], sum[m][n]);
      }
    }
  }

  template <class Bias, class To>
  SK_DEVICE void give(Bias&& bias, To&& to) {
    SK_UNROLL
    for (int n = 0; n < kN; ++n) {
      const int column = column0 + place<kLineB>(n, lane_index() % 4, 4);
      const T of_column = bias(column);
      SK_UNROLL
      for (int m = 0; m < kM; ++m) {
        to(row0 + place<kLineA>(m, lane_index() / 4, 8), column, Vec<T, 1>{{sum[m][n] + of_column}});
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
  const Shared<int64_t> starts_a = arena.array<int64_t>(LoadA::starts(args.parts));
  const Shared<int64_t> starts_b = arena.array<int64_t>(LoadB::starts(args.parts));

  const int64_t across = (args.N + Shape::kN - 1) / Shape::kN;
  const int64_t column0 = block_index() % across * Shape::kN, row0 = block_index() / across * Shape::kM;
  const int64_t split = block_index_y(), first = split * args.chunk;
  const int64_t end = first + args.chunk < args.K ? first + args.chunk : args.K;
  const int steps = end > first ? static_cast<int>((end - first + kK - 1) / kK) : 0, all_steps = steps * args.parts;
  const bool aligned = args.a[0].start_bytes % 16 == 0 && args.b[0].start_bytes % 16 == 0 &&
                       (args.parts == 1 || (args.a[1].start_bytes % 16 == 0 && args.b[1].start_bytes % 16 == 0));

  if constexpr (kLineA) {
    for (int i = thread_index(); i < args.parts * Shape::kM; i += Shape::kThreads) {
      starts_a[i] = start_of<S>(args.a[i / Shape::kM], row0 + i % Shape::kM, args.M);
    }
  }
  if constexpr (kLineB) {
    for (int i = thread_index(); i < args.parts * Shape::kN; i += Shape::kThreads) {
      starts_b[i] = start_of<S>(args.b[i / Shape::kN], column0 + i % Shape::kN, args.N);
    }
  }
  // Where K runs across lines, each thread of the first ones has one line of a stage.
  const auto start_of_k = [&](int step) {
    const int part = step >= steps, i = thread_index();
    if (step >= all_steps || i >= 2 * kK) return kNoLine;
    const int64_t k = first + static_cast<int64_t>(step - part * steps) * kK + i % kK;
    if (i < kK) return kLineA ? kNoLine : start_of<S>(args.a[part], k, end);
    return kLineB ? kNoLine : start_of<S>(args.b[part], k, end);
  };
  const auto keep_start = [&](int step, int64_t start) {
    const int i = thread_index();
    if (!kLineA && i < kK) starts_a[step % 2 * kK + i] = start;
    if (!kLineB && i >= kK && i < 2 * kK) starts_b[step % 2 * kK + i - kK] = start;
  };

  const LoadA load_a;
  const LoadB load_b;
  // A quarter of a stage's copies, or all of them.
  constexpr int kFetches = Work::kAhead ? Work::kSlices - 1 : 1;
  const auto fetch = [&](int step, int slot, int part_of_fetch) {
    if (step >= all_steps) return;
    const int part = step >= steps;
    const int64_t k = first + static_cast<int64_t>(step - part * steps) * kK;
    const Shared<S> to_a = left + slot * LoadA::kElements, to_b = right + slot * LoadB::kElements;
    const Shared<const int64_t> from_a = starts_a + (kLineA ? part * Shape::kM : step % 2 * kK);
    const Shared<const int64_t> from_b = starts_b + (kLineB ? part * Shape::kN : step % 2 * kK);
    if (aligned) {
      load_a.fetch(LoadA::kCount * part_of_fetch / kFetches, LoadA::kCount * (part_of_fetch + 1) / kFetches,
                   args.a[part], row0, args.M, k, end, from_a, to_a);
      load_b.fetch(LoadB::kCount * part_of_fetch / kFetches, LoadB::kCount * (part_of_fetch + 1) / kFetches,
                   args.b[part], column0, args.N, k, end, from_b, to_b);
    } else if (part_of_fetch == 0) {
      load_a.fetch_unaligned(args.a[part], row0, args.M, k, end, from_a, to_a);
      load_b.fetch_unaligned(args.b[part], column0, args.N, k, end, from_b, to_b);
    }
  };

  Work work;
  SK_NO_UNROLL
  for (int step = 0; step < kStages - 1; ++step) {
    keep_start(step, start_of_k(step));
    block_sync();
    SK_UNROLL
    for (int i = 0; i < kFetches; ++i) fetch(step, step, i);
    copy_async_commit();
  }
  keep_start(kStages - 1, start_of_k(kStages - 1));
  copy_async_wait<kStages - 2>();
  block_sync();

  // A step's fetches fill the slot that the step before has left.
  int slot = 0, filled = kStages - 1;
  if constexpr (Work::kAhead) {
    if (all_steps > 0) work.load(0, 0, left, right);
  }
  SK_NO_UNROLL
  for (int step = 0; step < all_steps; ++step) {
    const int64_t start = start_of_k(step + kStages);
    const int next = slot + 1 == kStages ? 0 : slot + 1;
    const auto next_stage = [&] {
      keep_start(step + kStages, start);
      copy_async_wait<kStages - 2>();
      block_sync();
    };
    if constexpr (Work::kAhead) {
      static_assert(Work::kSlices % 2 == 0, "two buffers");
      SK_UNROLL
      for (int slice = 0; slice < Work::kSlices; ++slice) {
        const bool last = slice == Work::kSlices - 1;
        if (last) next_stage();
        const int from = last ? next : slot;
        if (!last || step + 1 < all_steps) {
          work.load((slice + 1) % 2, last ? 0 : slice + 1, left + from * LoadA::kElements,
                    right + from * LoadB::kElements);
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

  const int64_t size = args.splits * args.M * args.ldc;
  const Global<S> narrow_c = global<S>(args.narrow ? args.c : nullptr, args.narrow ? size : 0);
  const Global<T> wide_c = global<T>(args.narrow ? nullptr : args.c, args.narrow ? 0 : size);
  const auto bias = [&](int column) {
    T value = T(0);
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (args.bias[i] != nullptr && column0 + column < args.N) {
        value += widen(load<Cache::kReadOnly>(global<const S>(args.bias[i], args.N), column0 + column));
      }
    }
    return value;
  };
  work.give(bias, [&](int row, int column, const auto& values) {
    constexpr int kCount = sizeof(values) / sizeof(T);
    if (row0 + row >= args.M) return;
    const int64_t at = (split * args.M + row0 + row) * args.ldc + column0 + column;
    const int there = clamped(args.N - column0 - column, kCount);
    if (args.narrow) {
      Vec<S, kCount> narrowed;
      SK_UNROLL
      for (int i = 0; i < kCount; ++i) narrowed[i] = narrow<S>(values[i]);
      if (there == kCount && args.vectors_c) {
        store_vec(narrow_c, at, narrowed);
      } else {
        SK_UNROLL
        for (int i = 0; i < kCount; ++i) {
          if (i < there) narrow_c[at + i] = narrowed[i];
        }
      }
    } else if (there == kCount && args.vectors_c) {
      store_vec(wide_c, at, values);
    } else {
      SK_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (i < there) wide_c[at + i] = values[i];
      }
    }
  });
}

// ---- host
// ------------------------------------------------------------------------------------------------------------

template <template <class, class, bool, bool> class Worker, class S, class Shape, bool kLineA, bool kLineB>
void launch_tiles(const ProductArgs& args, void* stream) {
  constexpr Arithmetic kHow = Worker<S, Shape, kLineA, kLineB>::kHow;
  using LoadA = Loader<kHow, S, Shape::kM, Shape::kThreads, kLineA>;
  using LoadB = Loader<kHow, S, Shape::kN, Shape::kThreads, kLineB>;
  SharedBytes bytes;
  bytes.array<S>(Shape::kStages * LoadA::kElements, 128);
  bytes.array<S>(Shape::kStages * LoadB::kElements, 128);
  bytes.array<int64_t>(LoadA::starts(args.parts));
  bytes.array<int64_t>(LoadB::starts(args.parts));
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
