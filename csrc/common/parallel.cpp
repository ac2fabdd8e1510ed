#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace seqkernels {

void parallel_pieces(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace seqkernels
