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
constexpr size_t kHugePage = 2u << 20;  // used by large blocks: each 4 KiB page costs a page fault of about 0.5 us
// One block of at most this size is cached for the next call. The system clears new pages, which takes about a tenth of
// the time of a layer with H = 1024.
constexpr size_t kCacheLimit = 128u << 20;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

std::mutex mutex;
Block cached;

// The lock is never waited for: in a child process it may be held by a thread that does not exist there.
Block take_cached(size_t bytes) {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) return {};
  return cached.bytes >= bytes ? std::exchange(cached, Block{}) : Block{};
}

// Caches the block if it is the larger one, and returns the block to free.
Block exchange_cached(Block block) {
  if (block.bytes > kCacheLimit) return block;
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (lock.owns_lock() && cached.bytes < block.bytes) std::swap(cached, block);
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
  Block block = take_cached(bytes);
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

Memory::~Memory() { std::free(exchange_cached({data_, bytes_}).data); }

}  // namespace seqkernels
