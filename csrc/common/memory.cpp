#include "common/memory.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace seqkernels {

namespace {
constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
constexpr size_t kHugePage =
    2u << 20;  // large blocks ask for these: a 4 KiB page costs a fault of some 0.5 us each call
}  // namespace

Memory::Memory(size_t bytes) {
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
  bytes = (bytes / alignment + 1) * alignment;
  data_ = static_cast<char*>(std::aligned_alloc(alignment, bytes));
  if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);  // advice only: nothing depends on it
#endif
}

Memory::~Memory() { std::free(data_); }

}  // namespace seqkernels
