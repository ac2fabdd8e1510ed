// Counts the distinct rows of each table, for sparse gradients.
#include <vector>

#include "embedding_bag/cuda/sorted_rows.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

struct CountArgs {
  Sorted sorted;
  uint32_t* ordinals;  // [groups + 1] rows that begin in each group, later in preceding groups
  int64_t groups;
  ManyTables tables;
  int64_t* values_before;  // [tables + 1]
};

SK_KERNEL(kThreads) bag_heads_kernel(const SK_GRID_CONSTANT CountArgs a) {
  const int64_t i = grid_thread_index();
  const uint32_t heads = ballot(i < a.sorted.N && a.sorted.begins(i));
  if (lane_index() == 0 && i < a.sorted.N) {
    global<uint32_t>(a.ordinals, a.groups + 1)[i / kPerGroup] = static_cast<uint32_t>(popcount(heads));
  }
}

// Prefix sums over all groups; launched with one block.
SK_KERNEL(kThreads) bag_ordinals_kernel(const SK_GRID_CONSTANT CountArgs a) {
  constexpr int kBatch = 8;  // groups per thread and step
  SK_SHARED(uint32_t, sums, kWarps);
  const auto ordinals = global<uint32_t>(a.ordinals, a.groups + 1);
  uint32_t before = 0;
  for (int64_t first = 0; first < a.groups; first += kThreads * kBatch) {
    const int64_t mine = first + thread_index() * kBatch;
    uint32_t counts[kBatch], sum = 0, total;
    SK_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      counts[j] = mine + j < a.groups ? load<Cache::kDefault>(ordinals, mine + j) : 0u;
      sum += counts[j];
    }
    uint32_t place = before + block_scan(sum, total, sums);
    SK_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      if (mine + j < a.groups) ordinals[mine + j] = place;
      place += counts[j];
    }
    before += total;
  }
  if (thread_index() == 0) ordinals[a.groups] = before;
}

// One thread per table, and one for the end of the last table.
SK_KERNEL(kThreads) bag_values_kernel(const SK_GRID_CONSTANT CountArgs a) {
  const int64_t i = grid_thread_index();
  if (i > a.tables.count) return;
  uint32_t row = a.sorted.none;
  if (i < a.tables.count) {
    const TableDescriptor table = global<const TableDescriptor>(a.tables.descriptors, a.tables.count)[i];
    row = static_cast<uint32_t>(table.rows_before);
  }
  const int64_t at = a.sorted.lower_bound(row, 0, a.sorted.N), group = at / kPerGroup;
  const uint32_t preceding = global<const uint32_t>(a.ordinals, a.groups + 1)[group];
  int64_t ordinal = preceding;
  for (int64_t j = group * kPerGroup; j < at; ++j) ordinal += a.sorted.begins(j);
  global<int64_t>(a.values_before, a.tables.count + 1)[i] = ordinal;
}

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

void count_bag_rows(const BagForward& bags, int64_t* counts, void* memory, void* stream) {
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, true);
  for (int64_t i = 0; i < bags.count; ++i) counts[i] = 0;
  if (m.groups == 0 || bounds_of(bags).bags == 0) return;
  const CountArgs args{m.sorted(bags), m.ordinals, m.groups, {m.tables, bags.count}, m.values_before};
  launch(bag_heads_kernel, blocks_of(m.sort.n, stream), args);
  launch(bag_ordinals_kernel, blocks_of(1, stream), args);
  launch(bag_values_kernel, blocks_of(bags.count + 1, stream), args);
  std::vector<int64_t> before(bags.count + 1);
  read_back(before.data(), m.values_before, (bags.count + 1) * 8, stream);
  for (int64_t i = 0; i < bags.count; ++i) counts[i] = before[i + 1] - before[i];
}

}  // namespace seqkernels
