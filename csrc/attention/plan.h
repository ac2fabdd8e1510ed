// Splits attention on a CPU into tasks, by the sizes alone. Used by the kernels and by seqkernels.explain.
//
// Dimensions: B sequences, Hq query heads, Hk key heads, Tq queries, Tk keys.
#pragma once

#include <cstdint>

namespace seqkernels::attention {

constexpr int64_t kRows = 48;        // queries per block
constexpr int64_t kKeys = 64;        // keys per block: one bit of a word each
constexpr int64_t kChunkKeys = 512;  // keys per online softmax; chunks are merged in order

// A group is the query heads that share a key head. With few groups per thread, groups are split further.
constexpr bool group_is_task(int64_t groups, int64_t threads) { return threads == 1 || groups >= 2 * threads; }

// Number of heads per block: several if a sequence has few queries.
constexpr int64_t heads_of_block(int64_t queries, int64_t group) {
  return queries >= kRows || queries == 0 ? 1 : group < kRows / queries ? group : kRows / queries;
}

constexpr int64_t chunks_of(int64_t keys) { return (keys + kChunkKeys - 1) / kChunkKeys; }

// Number of tasks of a split group: its blocks, or the key chunks of its only block.
constexpr int64_t tasks_of_group(int64_t blocks, int64_t keys) {
  return blocks != 1 ? blocks : keys > 0 ? chunks_of(keys) : 1;
}

// Few queries per key head read keys and values in place, without packing.
constexpr int64_t kDecodeRows = 16;
constexpr bool few_queries(int64_t queries, int64_t group) { return queries * group <= kDecodeRows; }

enum class Unit { kGroup, kBlock, kChunk };

// Expected duration of forward on one thread, in ns. pairs: of a query and a key that it attends to.
constexpr double nanoseconds(double pairs, int64_t D, int64_t Dv) { return pairs * (1 + 0.06 * double(D + Dv)); }
constexpr double kBackwardOverForward = 2.5;

// The same of few queries, whose time is that of reading `bytes` of keys and values.
constexpr double decode_nanoseconds(double pairs, int64_t D, int64_t Dv, double bytes) {
  return 0.1 * bytes + pairs * (0.5 + 0.02 * double(D + Dv));
}

struct Plan {
  Unit unit;
  int64_t tasks, threads;
};

// threads: the number of useful ones, see threads_for.
constexpr Plan plan_forward(int64_t B, int64_t Hq, int64_t Hk, int64_t Tq, int64_t Tk, int64_t threads) {
  const int64_t groups = B * Hk;
  Plan plan{Unit::kGroup, groups, 1};
  if (groups > 0 && !group_is_task(groups, threads)) {
    const int64_t group = Hq / Hk, heads = heads_of_block(Tq, group);
    const int64_t blocks = (group + heads - 1) / heads * ((Tq + kRows - 1) / kRows);
    plan.unit = blocks == 1 ? Unit::kChunk : Unit::kBlock;
    plan.tasks = groups * tasks_of_group(blocks, Tk);
  }
  plan.threads = plan.tasks < 1 ? 1 : plan.tasks < threads ? plan.tasks : threads;
  return plan;
}

}  // namespace seqkernels::attention
