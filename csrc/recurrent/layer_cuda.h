// What the tiers of recurrent layers on a GPU share on the host. Included by their .cu files only.
#pragma once

#include <cstdint>
#include <vector>

#include "recurrent/recurrent_cuda.h"
#include "recurrent/steps_cuda.cuh"

namespace seqkernels::cuda {

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Hands out a workspace, or, without one, says how large it must be.
class Space {
 public:
  explicit Space(void* start) : start_(static_cast<char*>(start)) {}
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

// What the loop of backward leaves for the products behind it.
struct AfterLoop {
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
void run_empty(const LayerArgs& layer, DType dtype, const void* from_h, const void* from_c, void* to_h, void* to_c,
               void* stream);
void run_product(DType dtype, bool tf32, ProductArgs args, void* stream);
// In how many parts a long K is cut, and the elements of their sums.
int64_t product_splits(int64_t M, int64_t N, int64_t K);
int64_t partial_of_product(int64_t M, int64_t N, int64_t K);
Matrix input_matrix(const RecurrentArgs& args, const CudaLayout& layout, bool k_in_line);
void run_from_x(const RecurrentArgs& args, const CudaLayout& layout, int64_t gates, bool separate, int direction,
                int64_t first, int64_t rows, void* to, void* stream);
void run_gradients(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const LayerArgs& layer,
                   const AfterLoop& of, void* stream);
int64_t partial_bytes(const RecurrentArgs& args, int64_t gates, bool stages, int64_t first_gates);

// What forward would have saved, made from the states that it left: every row starts from states that are known, so the
// recurrent product is one for all of them.
struct SavedAgain {
  void *saved, *from_x, *from_h;  // nulls where forward saved it; of `rows` rows at a time
  int64_t rows;
  void carve(Space& space, int64_t gates, const RecurrentArgs& args, bool wanted);
};
// Leaves it to layer.saved. fed: [directions, rows, H] where h is masked; q: likewise, [directions, at.rows, H], of
// cells with two products.
void make_saved_again(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const SavedAgain& at,
                      LayerArgs& layer, void* fed, void* q, void* stream);

std::vector<int64_t> offsets_of(const Walk& walk, bool packed);

inline void set_launch(CudaPlan::Pass& plan, const LaunchConfig& config) {
  plan.grid[0] = config.grid.x;
  plan.grid[1] = config.grid.y;
  plan.grid[2] = config.grid.z;
  plan.block = config.block;
  plan.shared_bytes = config.shared_bytes;
}

// The cluster tier, in recurrent_cluster_cuda.cu. Appends to reasons where it does not take the layer.
enum class PassKind { kForward, kBackward };
CudaPlan::Pass plan_cluster(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                            bool recompute, const CudaDevice& device);
void forward_by_clusters(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, const CudaPlan::Pass& plan,
                         void* workspace, void* stream);
void backward_by_clusters(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const CudaPlan::Pass& plan,
                          void* workspace, void* stream);

// The grid tier, in recurrent_grid_cuda.cu, likewise.
CudaPlan::Pass plan_grid(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                         bool recompute, const CudaDevice& device);
void forward_by_grid(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, const CudaPlan::Pass& plan,
                     void* workspace, void* stream);
void backward_by_grid(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const CudaPlan::Pass& plan,
                      void* workspace, void* stream);

}  // namespace seqkernels::cuda
