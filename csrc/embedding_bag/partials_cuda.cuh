// Partial results of what was cut in pieces of fixed size, and their merging in order.
//
// The pieces of chain q lie in slots 2 q + 1, 2 (q + 1), 2 (q + 2), ..: where a chain begins at one place of many and
// runs over the following ones, no two chains need the same slot. Which chains there are, kernels find out for
// themselves.
#pragma once

#include "embedding_bag/bags_cuda.cuh"

namespace seqkernels::bags_cuda {

SK_HOST_DEVICE int64_t partial_slot(int64_t q, int64_t piece) { return piece == 0 ? 2 * q + 1 : 2 * (q + piece); }

template <class T>
struct Partials {
  T* values;        // [slots, width]
  int32_t* at;      // [slots, width], or null
  T* weights;       // [slots], or null
  int64_t* counts;  // [slots], or null
  int64_t slots, width;

  SK_DEVICE Global<T> row(int64_t slot) const { return global<T>(values, slots * width) + slot * width; }
  SK_DEVICE Global<int32_t> at_row(int64_t slot) const { return global<int32_t>(at, slots * width) + slot * width; }
  SK_DEVICE Global<T> weight() const { return global<T>(weights, slots); }
  SK_DEVICE Global<int64_t> count() const { return global<int64_t>(counts, slots); }
};

template <class C, class From, class T>
SK_DEVICE void load_row(const C& columns, Global<From> row, T (&values)[C::kCount], bool wide) {
  if (wide) {
    if (columns.wide_has()) load_side_by_side<C::kCount>(values, row, columns.at(0));
    return;
  }
  SK_UNROLL
  for (int v = 0; v < C::kCount; ++v) {
    if (columns.has(v)) values[v] = row[columns.at(v)];
  }
}

// A chain of more pieces than this is merged by the whole block: every group of lanes some successive pieces, then the
// groups in order.
constexpr int kSerialPieces = 16;
constexpr int kPiecesAtOnce = 4;

// Reduction r: State; saved(slot) -> State; merge(state, later).
template <class R>
SK_DEVICE void merge_pieces(const R& r, typename R::State& state, int64_t q, int64_t from, int64_t to) {
  int64_t i = from;
  for (; i + kPiecesAtOnce <= to; i += kPiecesAtOnce) {
    typename R::State pieces[kPiecesAtOnce];
    SK_UNROLL
    for (int j = 0; j < kPiecesAtOnce; ++j) pieces[j] = r.saved(partial_slot(q, i + j));
    SK_UNROLL
    for (int j = 0; j < kPiecesAtOnce; ++j) r.merge(state, pieces[j]);
  }
  for (; i < to; ++i) r.merge(state, r.saved(partial_slot(q, i)));
}

// Every group of lanes looks after one q: job.pieces(q) says how many its chain has, 0 if there is none,
// job.reduction(q) how they are merged, job.finish(q, pieces, reduction, state) what becomes of the whole.
// All threads of a block must come.
template <class R, class Job>
SK_DEVICE void merge_chains(const Job& job, int64_t chains, int group) {
  using State = typename R::State;
  SK_SHARED(State, states, kThreads);
  SK_SHARED(int64_t, lengths, kThreads);
  const int groups = kThreads / group, local = thread_index() / group, lane = thread_index() % group;
  const int64_t first = block_index() * groups, q = first + local;
  const int64_t pieces = q < chains ? job.pieces(q) : 0;
  if (pieces > 0 && pieces <= kSerialPieces) {
    const R r = job.reduction(q);
    State state = r.saved(partial_slot(q, 0));
    merge_pieces(r, state, q, 1, pieces);
    job.finish(q, pieces, r, state);
  }
  if (lane == 0) lengths[local] = pieces;
  if (!block_sync_or(pieces > kSerialPieces)) return;
  for (int g = 0; g < groups; ++g) {
    const int64_t length = lengths[g];
    if (length <= kSerialPieces) continue;
    const R r = job.reduction(first + g);
    const int64_t share = ceil_div(length, groups), from = min(length, local * share);
    State state;
    r.reset(state);
    merge_pieces(r, state, first + g, from, min(length, from + share));
    states[thread_index()] = state;
    block_sync();
    if (local == g) {
      State whole = states[lane];
      for (int other = 1; other < groups; ++other) {
        const State later = states[other * group + lane];
        r.merge(whole, later);
      }
      job.finish(first + g, length, r, whole);
    }
    block_sync();
  }
}

}  // namespace seqkernels::bags_cuda
