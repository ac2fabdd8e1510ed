// Working memory of a kernel: one aligned block, carved in two passes (measure, then hand out).
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

// Asks for large pages where a large block has not been written yet; advice, nothing depends on it.
void advise_large_pages(void* data, size_t bytes);

}  // namespace seqkernels
