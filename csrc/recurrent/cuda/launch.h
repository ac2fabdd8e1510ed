// Recurrent layers on a GPU: entry points of the ops. Free of torch and CUDA types.
//
// The argument structs are those of recurrent.h with device pointers. Of Walk, only T, B, N and, for packed rows,
// batch_sizes on the host are read. N is the number of rows of y, T * B for a padded batch; saved_rows is N.
// options.reset is in the order of the rows of y.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "recurrent/recurrent.h"

namespace seqkernels {

struct CudaLayout {
  const int64_t* lengths;  // [B] on the device, or null: valid steps of each sequence of a padded batch, in any order
  bool packed;
  int64_t x_step, x_across;  // row (t, b) of x starts at t * x_step + b * x_across; packed row n at n * x_step
  bool tf32;                 // float32 products may use TF32
};

struct CudaDevice {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // per block
  // Described by the user: the number of resident blocks is then estimated, one per multiprocessor.
  bool described = false;
};
CudaDevice current_cuda_device();

enum class CudaTier {
  kNone,
  kCell,     // a single step: the products, then the cell
  kCluster,  // each cluster of blocks runs all steps of some sequences, with the weights in shared memory
  kGrid,     // teams of blocks, one block per multiprocessor, exchange states through global memory
  kSteps,    // one launch per step, two for cells with two products
};
const char* cuda_tier_name(CudaTier tier);

// The enabled tiers: all, or those of the environment variable SEQKERNELS_CUDA_TIERS, a comma-separated list, or of
// set_cuda_tiers, which returns the previous ones.
bool allows_tier(CudaTier tier);
std::vector<std::string> set_cuda_tiers(const std::vector<std::string>& names);

// Whether float32 products may use TF32; off by default. set_allows_tf32 returns the previous value.
bool allows_tf32();
bool set_allows_tf32(bool allow);

enum class PassKind { kForward, kBackward };

// Which kernels run one pass over a layer, and why others do not.
struct CudaPlan {
  CudaTier tier;
  int cluster, rows, block;          // blocks and sequences of a cluster, a team's or a step's tile; threads of a block
  int teams;                         // of a direction
  int64_t grid[3];                   // blocks of the time loop, or of a step that all sequences have
  int64_t shared_bytes;              // of a block
  int64_t workspace;                 // bytes
  std::vector<std::string> reasons;  // "<tier>: <why not>"
  std::shared_ptr<const void> shape;  // the sizes that the tier derived from the arguments
};

// Reads kind, dtype, walk, directions, heads, D, H, P, weights (present or not) and options. recompute: a backward pass
// without `saved`.
CudaPlan plan_recurrent_cuda(CellKind kind, PassKind pass, const RecurrentArgs& args, const CudaLayout& layout,
                             bool recompute, const CudaDevice& device);

// Asynchronous and without allocations, so both can be captured in a graph. Rows of y, cells and saved that belong to
// no sequence become zeros. workspace: plan.workspace bytes, aligned to 256.
void launch_recurrent_forward(CellKind kind, const ForwardArgs& args, const CudaLayout& layout, const CudaPlan& plan,
                              void* workspace, void* stream);
// dx: [N, D], zero in rows that belong to no sequence. saved null: it is recomputed.
void launch_recurrent_backward(CellKind kind, const BackwardArgs& args, const CudaLayout& layout, const CudaPlan& plan,
                               void* workspace, void* stream);

}  // namespace seqkernels
