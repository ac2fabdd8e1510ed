// Partial results of work that is cut into pieces of fixed size, and their ordered merge.
//
// The pieces of chain q use the slots 2 q + 1, 2 (q + 1), 2 (q + 2), ... A chain begins at one of many consecutive
// places and extends over the following ones, so no two chains share a slot. The kernels determine which chains exist.
#pragma once

#include "embedding_bag/cuda/bags.cuh"

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
    if (columns.wide_in_row()) load_contiguous<C::kCount>(values, row, columns.at(0));
    return;
  }
  SK_UNROLL
  for (int v = 0; v < C::kCount; ++v) {
    if (columns.in_row(v)) values[v] = row[columns.at(v)];
  }
}

// Chains with more pieces than this are merged by the whole block: each group of lanes merges consecutive pieces, then
// the groups' results are merged in order.
constexpr int kSerialPieces = 16;
constexpr int kPiecesAtOnce = 16;
constexpr int kChainsPerBlock = 64;

// A reduction r provides State, saved(slot) -> State and merge(state, later).
template <class R>
SK_DEVICE void merge_pieces(const R& r, typename R::State& state, int64_t q, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i += kPiecesAtOnce) {
    typename R::State pieces[kPiecesAtOnce];
    SK_UNROLL
    for (int j = 0; j < kPiecesAtOnce; ++j) {
      if (i + j < to) pieces[j] = r.saved(partial_slot(q, i + j));
    }
    SK_UNROLL
    for (int j = 0; j < kPiecesAtOnce; ++j) {
      if (i + j < to) r.merge(state, pieces[j]);
    }
  }
}

inline LaunchConfig blocks_of_chains(int64_t chains, void* stream, int64_t tiles) {
  return blocks_of(ceil_div(chains, kChainsPerBlock) * kThreads, stream, tiles);
}

// Each of the first kChainsPerBlock threads checks one q, so that blocks without chains exit early. job.pieces(q) is
// the number of pieces of chain q (0: no chain), job.reduction(q) merges them, and job.finish(q, pieces, reduction,
// state) stores the result. All threads of the block must call this.
template <class R, class Job>
SK_DEVICE void merge_chains(const Job& job, int64_t chains, int group) {
  using State = typename R::State;
  SK_SHARED(State, states, kThreads);
  SK_SHARED(int64_t, lengths, kChainsPerBlock);
  SK_SHARED(int32_t, found, kChainsPerBlock);
  SK_SHARED(int32_t, count, 1);
  const int groups = kThreads / group, local = thread_index() / group, lane = thread_index() % group;
  const int64_t first = block_index() * kChainsPerBlock, q = first + thread_index();
  const int64_t pieces = thread_index() < kChainsPerBlock && q < chains ? job.pieces(q) : 0;
  if (!block_sync_or(pieces > 0)) return;
  if (thread_index() == 0) count[0] = 0;
  block_sync();
  if (pieces > 0) {
    const int32_t at = atomic_add(count, 0, 1);
    found[at] = thread_index();
    lengths[at] = pieces;
  }
  block_sync();
  const int32_t all = count[0];
  for (int i = local; i < all; i += groups) {
    const int64_t length = lengths[i];
    if (length > kSerialPieces) continue;
    const int64_t chain = first + found[i];
    const R r = job.reduction(chain);
    State state = r.saved(partial_slot(chain, 0));
    merge_pieces(r, state, chain, 1, length);
    job.finish(chain, length, r, state);
  }
  for (int i = 0; i < all; ++i) {
    const int64_t length = lengths[i];
    if (length <= kSerialPieces) continue;
    const int64_t chain = first + found[i];
    const R r = job.reduction(chain);
    const int64_t share = ceil_div(length, groups), from = min(length, local * share);
    State state;
    r.reset(state);
    merge_pieces(r, state, chain, from, min(length, from + share));
    states[thread_index()] = state;
    block_sync();
    if (local == i % groups) {
      State whole = states[lane];
      for (int other = 1; other < groups; ++other) {
        const State later = states[other * group + lane];
        r.merge(whole, later);
      }
      job.finish(chain, length, r, whole);
    }
    block_sync();
  }
}

}  // namespace seqkernels::bags_cuda
