#include "common/memory.h"

#include <cstdlib>
#include <new>

namespace seqkernels {

namespace {
constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
}

Memory::Memory(size_t bytes)
    : data_(static_cast<char*>(std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment))) {
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::~Memory() { std::free(data_); }

}  // namespace seqkernels
