// Writes the table descriptors of a call to device memory.
#include "embedding_bag/cuda/bags.cuh"

namespace seqkernels::bags_cuda {

// Descriptors are passed as kernel parameters, a few per launch, so that no host memory must outlive the call.
struct TablePack {
  static constexpr int kMaxCount = 15;
  TableDescriptor tables[kMaxCount];
  TableDescriptor* to;
  int64_t from, count;
  const int64_t* values_before;  // null, or an array over all tables
};
static_assert(sizeof(TablePack) <= 4096, "the limit of kernel parameters on every device");

SK_KERNEL(32) bag_tables_kernel(const SK_GRID_CONSTANT TablePack pack) {
  const auto to = global<TableDescriptor>(pack.to, pack.from + pack.count);
  const int i = thread_index();
  if (i >= pack.count) return;
  TableDescriptor table = pack.tables[i];
  if (pack.values_before != nullptr) {
    table.values_before = global<const int64_t>(pack.values_before, pack.from + pack.count)[pack.from + i];
  }
  to[pack.from + i] = table;
}

ManyTables upload_tables(const TableDescriptor* tables, int64_t count, TableDescriptor* to, void* stream,
                         const int64_t* values_before) {
  for (int64_t from = 0; from < count; from += TablePack::kMaxCount) {
    TablePack pack{};
    pack.to = to;
    pack.from = from;
    pack.values_before = values_before;
    pack.count = min(TablePack::kMaxCount, count - from);
    for (int64_t i = 0; i < pack.count; ++i) pack.tables[i] = tables[from + i];
    LaunchConfig config;
    config.block = 32;
    config.stream = stream;
    launch(bag_tables_kernel, config, pack);
  }
  return {to, count};
}

}  // namespace seqkernels::bags_cuda
