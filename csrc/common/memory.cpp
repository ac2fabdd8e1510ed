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

Memory::Memory(size_t bytes) {
  Block block = take_kept(bytes);
  if (block.data == nullptr) {
    const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
    block.bytes = (bytes / alignment + 1) * alignment;
    block.data = static_cast<char*>(std::aligned_alloc(alignment, block.bytes));
    if (block.data == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == kHugePage) madvise(block.data, block.bytes, MADV_HUGEPAGE);  // advice: nothing depends on it
#endif
  }
  data_ = block.data;
  bytes_ = block.bytes;
}

Memory::~Memory() { std::free(keep({data_, bytes_}).data); }

}  // namespace seqkernels
