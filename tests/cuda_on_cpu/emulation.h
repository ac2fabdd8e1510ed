// The machine behind device_emulated.h: each CUDA thread is a fibre, blocks that may wait for each other (of a cluster,
// of a cooperative grid) are resident together, all others run one after another, and everything happens in the calling
// thread. What goes wrong is thrown out of launch() as std::runtime_error, with the line of the kernel.
//
// Always checked: bounds and alignment of global and shared memory, barriers that not all threads reach, deadlock.
// Shared memory starts as bytes of 0xff, which is NaN. On request (settings(), SEQKERNELS_EMULATION="races,unwritten"):
//   races      two accesses to one byte, one a plain write, by threads that nothing orders
//   unwritten  shared memory is read that nobody wrote
//   backward   threads start last first; seed=N: in a random order, also after barriers
// An entry point that takes part in a report is not inlined: its return address is the place in the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace seqkernels {

struct LaunchConfig;

namespace emulation {

struct Block;
struct Thread {
  int index;                                // in its block
  int64_t x, y, z, grid_x, grid_y, grid_z;  // its block, and the grid
  int block_threads;
  int cluster_rank, cluster_blocks;
  struct State;  // what only the scheduler sees
  State* state;
};

extern Thread* current;
extern bool watching;  // whether accesses must be noted

// Numbers by name: races, unwritten, backward, seed; of the device: major, minor, multiprocessors, shared_bytes,
// l2_bytes, cluster_blocks (of the largest cluster); counted: launches, threads, switches.
std::map<std::string, int64_t>& settings();

#define SK_ENTRY __attribute__((noinline))

// ---- launching ----
using Call = void (*)(void* context);
SK_ENTRY void run(const LaunchConfig& config, const void* kernel, Call call, void* context);
int64_t resident_blocks(const LaunchConfig& config);

// ---- memory ----
enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite };
SK_ENTRY void note(const void* address, int64_t bytes, Access access);
// `what` names the kind of memory; elements [i, i + n) of [0, count).
[[noreturn]] SK_ENTRY void out_of_bounds(const char* what, int64_t i, int64_t n, int64_t count, int64_t element_bytes);
[[noreturn]] SK_ENTRY void misaligned(const char* what, const void* address, int64_t bytes);
SK_ENTRY void check_known(const void* address, int64_t bytes);
void know_array(const void* address, int64_t bytes, const char* name);
void forget_array(const void* address);
SK_ENTRY char* dynamic_shared(int64_t offset, int64_t bytes);
SK_ENTRY char* static_shared(const void* key, int64_t bytes);
SK_ENTRY char* peer_shared(char* mine, int rank);  // the same place in another block of the cluster
SK_ENTRY void check_peer(const void* address);     // its block still runs

// ---- order ----
SK_ENTRY int block_barrier(const char* kind, bool predicate);
SK_ENTRY void named_barrier(int id, int threads, bool wait);
SK_ENTRY void cluster_barrier_arrive();
SK_ENTRY void cluster_barrier_wait();
SK_ENTRY void grid_barrier();
SK_ENTRY void yield(const char* why);  // lets the others run
// An access that orders others: call acquire after reading, release before writing.
SK_ENTRY void acquire(const void* address, bool ordered);
enum class Release { kRelaxedStore, kStore, kRelaxedUpdate, kUpdate };
SK_ENTRY void release(const void* address, Release how);
SK_ENTRY void fence();

// ---- warps ----
// The last lane of the mask to come performs the operation for all: operands[lane] is what each lane passed, or null.
using Perform = void (*)(void** operands);
SK_ENTRY void collective(const char* kind, uint32_t mask, void* operand, Perform perform);
// Operands of the collectives.
struct Shuffle {
  static constexpr int kMaxBytes = 16;
  unsigned char value[kMaxBytes], result[kMaxBytes];
  int bytes, source;  // the lane to read from; its own where it stays
};
void perform_shuffle(void** operands);
struct Vote {
  uint32_t value, ballot, match;  // lanes whose value is not 0; lanes with the same value
};
void perform_vote(void** operands);
struct Fragments {
  float* d;
  const uint32_t *a, *b;
};
void perform_mma_bf16(void** operands);
void perform_mma_f16(void** operands);
void perform_mma_tf32(void** operands);
struct Matrices {
  const uint16_t* row;
  uint32_t* result;
  int count;
  bool transposed;
};
void perform_load_matrices(void** operands);

// ---- asynchronous copies ----
SK_ENTRY void copy_async(char* to, const char* from, int bytes, int valid_bytes);
SK_ENTRY void copy_async_commit();
SK_ENTRY void copy_async_wait(int pending);

// ---- barriers in shared memory ----
SK_ENTRY void mbarrier_init(const void* barrier, int arrivals);
SK_ENTRY void mbarrier_arrive(const void* barrier, int64_t expect_bytes);
SK_ENTRY void mbarrier_wait(const void* barrier, int parity);
// The bytes arrive when somebody looks at the barrier: now where a thread waits there already. `from` is read then
// (a copy), or null: they are in `value` (a store of at most 16).
SK_ENTRY void deliver_async(char* to, const char* from, const void* value, int64_t bytes, const void* barrier);

}  // namespace emulation
}  // namespace seqkernels
