// Host code shared by the tiers of recurrent layers on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/math.h"
#include "recurrent/cuda/launch.h"
#include "recurrent/cuda/steps.cuh"

namespace seqkernels::cuda {

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Allocates from a workspace; with a null workspace, computes its size.
class WorkspaceArena {
 public:
  explicit WorkspaceArena(void* start) : start_(static_cast<char*>(start)) {}
  void* take(int64_t bytes) {
    void* at = start_ == nullptr ? nullptr : start_ + used_;
    used_ += (bytes + 255) / 256 * 256;
    return at;
  }
  int64_t bytes() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

struct ClearTarget {
  void* at;
  int64_t row, direction, width;  // elements
};

// Results of the backward time loop, for the products after it.
struct GateGradients {
  const void *dgates_x, *dgates_h, *q;
  void* fed;
  const void* dpeephole;
  void* partial;
  int64_t first_gates;
};

LayerArgs layer_args(const RecurrentArgs& args, const CudaLayout& layout, const CellShape& shape);
void run_links(const RecurrentArgs& args, const CudaLayout& layout, Link* links, void* stream);
void run_pack(const RecurrentArgs& args, bool tf32, int64_t gates, bool transposed, void* to, void* stream);
void run_clear(const RecurrentArgs& args, const CudaLayout& layout, const Link* links, std::vector<ClearTarget> targets,
               void* stream);
// The outputs of forward, whose rows beyond a sequence's length read as zero.
std::vector<ClearTarget> outputs_to_clear(const ForwardArgs& args);
// The last states of sequences of length zero: their initial states.
void run_empty(const LayerArgs& layer, const ForwardArgs& args, void* stream);
void run_recurrent_input(const LayerArgs& layer, DType dtype, void* to, void* stream);
Matrix plain_matrix(const void* at, int64_t lines, int64_t width, int64_t ld, bool k_in_line);
Matrix recurrent_matrix(const RecurrentArgs& args, const LayerArgs& layer, const void* fed, int direction,
                        int64_t first, int64_t rows, bool k_in_line);

constexpr int kPlainThreads = 256;
// A grid of blocks of kPlainThreads over `items`, for kernels that stride over the grid.
inline LaunchConfig plain_config(int64_t items, void* stream, int64_t per_block = kPlainThreads) {
  LaunchConfig config;
  config.grid = {std::min<int64_t>(ceil_div(items, per_block), 1 << 16)};
  config.block = kPlainThreads;
  config.stream = stream;
  return config;
}
void run_product(DType dtype, bool tf32, ProductArgs args, void* stream);
// Number of splits of a long K, and the elements of the partial results.
int64_t product_splits(int64_t M, int64_t N, int64_t K);
int64_t partial_of_product(int64_t M, int64_t N, int64_t K);
Matrix input_matrix(const RecurrentArgs& args, const CudaLayout& layout, bool k_in_line);
void run_from_x(const RecurrentArgs& args, const CudaLayout& layout, int64_t gates, bool separate, int direction,
                int64_t first, int64_t rows, void* to, void* stream);
void run_gradients(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const LayerArgs& layer,
                   const GateGradients& of, void* stream);
int64_t partial_bytes(const RecurrentArgs& args, int64_t gates, bool stages, int64_t first_gates);

// Buffers to recompute what forward would have saved. The states before every row are known, so all rows share one
// recurrent product.
struct RecomputedSaved {
  void *saved, *from_x, *from_h;  // null if forward saved it; `rows` rows at a time
  int64_t rows;
  void carve(WorkspaceArena& space, int64_t gates, const RecurrentArgs& args, bool wanted);
};
// Sets layer.saved. fed: [directions, rows, H] buffer for masked h; q: [directions, at.rows, H] buffer of cells with
// two products.
void recompute_saved(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const RecomputedSaved& at,
                     LayerArgs& layer, void* fed, void* q, void* stream);

inline void set_launch(CudaPlan& plan, const LaunchConfig& config) {
  plan.grid[0] = config.grid.x;
  plan.grid[1] = config.grid.y;
  plan.grid[2] = config.grid.z;
  plan.block = config.block;
  plan.shared_bytes = config.shared_bytes;
}

// The cluster tier (cluster.cu). Appends to reasons if it does not support the layer.
CudaPlan plan_cluster(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout, bool recompute,
                      const CudaDevice& device);
void forward_by_clusters(const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                         void* stream);
void backward_by_clusters(const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                          void* stream);

// The grid tier (grid.cu).
CudaPlan plan_grid(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout, bool recompute,
                   const CudaDevice& device);
void forward_by_grid(const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                     void* stream);
void backward_by_grid(const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan, void* workspace,
                      void* stream);

}  // namespace seqkernels::cuda
