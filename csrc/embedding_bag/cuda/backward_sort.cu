// Sorts the positions of a call by row, the first step of the backward pass by rows.
#include <vector>

#include "embedding_bag/cuda/sorted_rows.cuh"

namespace seqkernels {

namespace bags_cuda {
namespace {

constexpr int kKeys = 8;  // positions per thread

struct KeyArgs {
  ManyTables tables;
  Bounds bounds;
  FaultReporter faults;
  bool wide_indices;
  int64_t N;
  uint32_t none;     // key of positions that do not count; above all rows
  uint32_t* keys;    // [N]
  uint32_t* bag_of;  // [N]
};

// Bounds::bag_at by all threads of a block, which must all call it: a few steps that divide the range into kThreads
// parts.
SK_DEVICE int64_t block_bag_at(const Bounds& bounds, int64_t position) {
  int64_t low = 0, high = bounds.bags;
  while (high - low > 1) {
    const int64_t part = ceil_div(high - low, kThreads), mine = low + thread_index() * part;
    const int before = block_sync_count(mine < high && (thread_index() == 0 || bounds.begin(mine) <= position));
    low += (before - 1) * part;
    high = min(high, low + part);
  }
  return low;
}

// Each block handles kThreads * kKeys consecutive positions. It finds the bags of the first and the last position; each
// thread searches only between these two.
SK_KERNEL(kThreads) bag_keys_kernel(const SK_GRID_CONSTANT KeyArgs a) {
  const Bounds& bounds = a.bounds;
  if (a.faults.word != nullptr) {
    for (int64_t bag = grid_thread_index(); bag < bounds.bags; bag += grid_threads()) bounds.check(bag, a.faults);
  }
  const int64_t first = block_index() * (kThreads * kKeys), last = min(first + kThreads * kKeys, a.N) - 1;
  int64_t low = 0, high = 0;
  if (bounds.offsets.data != nullptr) {
    low = block_bag_at(bounds, first);
    high = max(low, block_bag_at(bounds, last));
  }
  const int64_t begin = bounds.clamped(0).begin, end = bounds.clamped(bounds.bags - 1).end;
  const Integers indices{a.tables.of_bag(0).t.indices, a.N, a.wide_indices};
  const auto keys = global<uint32_t>(a.keys, a.N), bag_of = global<uint32_t>(a.bag_of, a.N);
  for (int k = 0; k < kKeys; ++k) {
    const int64_t position = first + k * kThreads + thread_index();
    if (position > last) return;
    uint32_t key = a.none, bag = 0;
    if (position >= begin && position < end) {
      bag = static_cast<uint32_t>(bounds.offsets.data == nullptr ? bounds.bag_at(position)
                                                                 : bounds.bag_at(position, low, high + 1));
      const TableDescriptor table = a.tables.of_bag(bag);
      const int64_t index = indices[position];
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(table.t.E)) {
        a.faults.report(BagFault::kIndex, position);
      } else if (index != table.t.padding) {
        key = static_cast<uint32_t>(table.rows_before + index);
      }
    }
    keys[position] = key;
    bag_of[position] = bag;
  }
}

void sort_positions(const BagForward& bags, const RowsMemory& m, const ManyTables& tables, BagFaultWord* fault,
                    void* stream) {
  KeyArgs args{};
  args.tables = tables;
  args.bounds = bounds_of(bags);
  args.faults.word = fault;
  args.wide_indices = bags.shape.wide_indices;
  args.N = bags.tables[0].N;
  args.none = static_cast<uint32_t>(total_rows(bags));
  args.keys = m.sort.keys[0];
  args.bag_of = m.bag_of;
  launch(bag_keys_kernel, blocks_of(max(1, ceil_div(args.N, kKeys)), stream), args);
  SortMemory sort = m.sort;
  if (!RowsMemory::by_position(bags)) sort.first_values = m.bag_of;
  launch_sort(sort, stream);
}

}  // namespace
}  // namespace bags_cuda

using namespace bags_cuda;

int64_t bag_rows_scratch_bytes(const BagForward& bags) {
  Scratch scratch(nullptr);
  RowsMemory memory(bags, scratch, true);
  return scratch.bytes();
}

void launch_bag_sort(const BagForward& bags, BagFaultWord* fault, void* memory, void* stream) {
  if (bounds_of(bags).bags == 0) return;
  Scratch scratch(memory);
  const RowsMemory m(bags, scratch, true);
  const std::vector<TableDescriptor> tables = row_descriptors(bags);
  const ManyTables descriptors = upload_tables(tables.data(), bags.count, m.tables, stream);
  sort_positions(bags, m, descriptors, fault, stream);
  if (bags.shape.mode == BagMode::kMean) launch_bag_scales(bags, descriptors, m.scales, m.tallies, stream);
}

}  // namespace seqkernels
