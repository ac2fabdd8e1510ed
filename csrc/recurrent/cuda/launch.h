// Recurrent layers on a GPU: what an op calls. Free of torch and CUDA types.
//
// The argument structs are those of recurrent.h with pointers to the device, but for the walk: of it only T, B, N and,
// for packed rows, batch_sizes are read, which stay on the host. N counts the rows of y, T * B where they are padded;
// saved_rows is N. options.reset has the order of the rows of y.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "recurrent/recurrent.h"

namespace seqkernels {

struct CudaLayout {
  const int64_t* lengths;  // [B] on the device: real steps of a padded batch, in any order, zeros too; or null
  bool packed;
  int64_t x_step, x_across;  // row (t, b) of x begins at t * x_step + b * x_across; packed row n at n * x_step
  bool tf32;                 // products of float32 may be made of TF32
};

struct CudaDevice {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
  // As a user describes it: how many blocks run at once is then reckoned, one to a multiprocessor, and not asked.
  bool described = false;
};
CudaDevice current_cuda_device();

enum class CudaTier {
  kNone,
  kCell,     // of one step: the products, and the cell on them
  kCluster,  // a cluster of blocks walks all steps of some sequences, the weights in its shared memory
  kGrid,     // teams of blocks, one on each multiprocessor, do so; they tell each other their states in global memory
  kSteps,    // one launch a step (two of a cell with two products)
};
const char* cuda_tier_name(CudaTier tier);

// Which tiers may walk a layer: all, unless the environment variable SEQKERNELS_CUDA_TIERS, a list of names with commas
// between them, or the user says otherwise. Setting returns what it was.
bool allows_tier(CudaTier tier);
std::vector<std::string> set_cuda_tiers(const std::vector<std::string>& names);

// Whether products of float32 may be made of TF32, as the user last said; no unless told. Returns what it was.
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
