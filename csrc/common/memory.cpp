#include "common/memory.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace seqkernels {

namespace {

constexpr size_t kAlignment = 64;       // a cache line, and the widest vector
constexpr size_t kHugePage = 2u << 20;  // large blocks ask for these: a 4 KiB page costs a fault of some 0.5 us
// One block of at most this much is kept for the next call: fresh pages have to be cleared by the system each time,
// which for a layer with H = 1024 takes as long as a tenth of its work.
constexpr size_t kKept = 128u << 20;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

std::mutex mutex;
Block kept;

Block take_kept(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  return kept.bytes >= bytes ? std::exchange(kept, Block{}) : Block{};
}

Block keep(Block block) {  // returns what is to be freed
  if (block.bytes > kKept) return block;
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept.bytes < block.bytes) std::swap(kept, block);
  return block;
}

}  // namespace

void advise_large_pages(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Memory::Memory(size_t bytes) {
  Block block = take_kept(bytes);
  if (block.data == nullptr) {
    const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
    block.bytes = (bytes / alignment + 1) * alignment;
    block.data = static_cast<char*>(std::aligned_alloc(alignment, block.bytes));
    if (block.data == nullptr) throw std::bad_alloc();
    if (alignment == kHugePage) advise_large_pages(block.data, block.bytes);
  }
  data_ = block.data;
  bytes_ = block.bytes;
}

Memory::~Memory() { std::free(keep({data_, bytes_}).data); }

}  // namespace seqkernels
