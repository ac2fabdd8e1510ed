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

}  // namespace seqkernels
