// Workspace of a kernel: one aligned block of memory. Callers first measure its size, then divide it into arrays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace seqkernels {

class Memory {
 public:
  explicit Memory(size_t bytes);  // throws std::bad_alloc
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* get() const { return data_; }

 private:
  char* data_;
  size_t bytes_;
};

// Advises the system to back a large block with huge pages. Call it before the first write; it has no effect on
// results.
void advise_large_pages(void* data, size_t bytes);

}  // namespace seqkernels
