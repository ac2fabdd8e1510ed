// The emulated device behind device_emulated.h. Each CUDA thread is a fibre, and everything runs in the calling thread.
// Blocks that may wait for each other (of a cluster or a cooperative grid) are resident together; all others run one
// after another. launch() throws failures as std::runtime_error, with the line of the kernel.
//
// Always checked: bounds and alignment of global and shared memory, divergent barriers, deadlock. Shared memory is
// filled with 0xff bytes (NaN). On request (settings(), or the environment variable
// SEQKERNELS_EMULATION="races,unwritten"):
//   races      two unordered accesses to one byte by different threads, at least one of them a plain write
//   unwritten  a read of uninitialised shared memory
//   backward   threads start in reverse order; seed=N: in random order, also after barriers
//   schedule   which thread runs next where several can; a party is a block, or with party=1 a warp:
//              0 round robin over all threads
//              1 depth first: a party runs until all its threads must wait; parties in the order of their number, with
//                seed=N in random order
//              2 starvation: party N % parties of seed=N runs only if no other can
//              3 random priorities of parties, changed at random moments (PCT: Burckhardt et al., "A Randomized
//                Scheduler with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010)
//   stale      an ordered load returns the oldest value that a device may return, and one newer with each repetition,
//              and an acquire orders only what the release of that value ordered. Implies races.
// Entry points that appear in reports are not inlined: their return address is the location in the kernel.
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
  int index;                                // within its block
  int64_t x, y, z, grid_x, grid_y, grid_z;  // of its block; size of the grid
  int block_threads;
  int cluster_rank, cluster_blocks;
  struct State;  // private to the scheduler
  State* state;
};

extern Thread* current;
extern bool recording;  // whether accesses must be recorded

// Settings and counters by name. Checks: races, unwritten, backward, seed, schedule, party,
// stale. Device: major, minor, multiprocessors,
// shared_bytes, l2_bytes, cluster_blocks (of the largest cluster). Counters: launches, threads, switches.
std::map<std::string, int64_t>& settings();

#define SK_ENTRY __attribute__((noinline))

// Weakened calls, for mutants.py: the synchronisation of kernels consists of calls of these operations, and a test must
// fail if the calls at some addresses in the kernels are weakened.
enum class Operation {
  kWait,
  kPublish,
  kBlockBarrier,
  kWarpBarrier,
  kNamedBarrier,
  kClusterBarrier,
  kGridBarrier,
  kFence,
  kArrive,
  kPhase,
  kCopies,
  kDelivery,
  kSlot,
  kUpdate
};
// kRemoved: no operation; kOneLess: waits for one event less; kRelaxed: orders no other accesses; kOther: the other
// slot.
enum class Weakening { kNone, kRemoved, kOneLess, kRelaxed, kOther };

// Launching.
using Call = void (*)(void* context);
SK_ENTRY void run(const LaunchConfig& config, const void* kernel, Call call, void* context);
int64_t resident_blocks(const LaunchConfig& config);

// Memory.
enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite };
SK_ENTRY void record_access(const void* address, int64_t bytes, Access access);
// `what` names the kind of memory. The access covers elements [i, i + n) of [0, count).
[[noreturn]] SK_ENTRY void out_of_bounds(const char* what, int64_t i, int64_t n, int64_t count, int64_t element_bytes);
[[noreturn]] SK_ENTRY void misaligned(const char* what, const void* address, int64_t bytes);
SK_ENTRY void check_registered(const void* address, int64_t bytes);
void register_array(const void* address, int64_t bytes, const char* name);
void unregister_array(const void* address);
SK_ENTRY char* dynamic_shared(int64_t offset, int64_t bytes);
SK_ENTRY char* static_shared(const void* key, int64_t bytes);
SK_ENTRY char* peer_shared(char* mine, int rank);  // the same address in another block of the cluster
SK_ENTRY void check_peer(const void* address);     // checks that its block still runs

// Memory ordering.
SK_ENTRY int block_barrier(const char* kind, bool predicate);  // the number of threads with the predicate
SK_ENTRY void named_barrier(int id, int threads, bool wait);
SK_ENTRY void cluster_barrier_arrive();
SK_ENTRY void cluster_barrier_wait();
SK_ENTRY void cluster_barrier();
SK_ENTRY void grid_barrier();
SK_ENTRY void yield(const char* why);  // runs other threads, in a loop that waits for a value
// Ordering accesses to integers of 4 or 8 bytes. ordered_load returns the value, zero-extended. The load of
// an update returns the latest value.
enum class Acquire { kRelaxed, kAcquire, kUpdate };
SK_ENTRY uint64_t ordered_load(const void* address, int bytes, Acquire how);
enum class Release { kRelaxedStore, kStore, kRelaxedUpdate, kUpdate };
SK_ENTRY void ordered_store(void* address, int bytes, uint64_t value, Release how);
SK_ENTRY void wait_acquire(const void* address, int bytes, uint64_t wanted);  // until the value is at least `wanted`
SK_ENTRY void fence();
SK_ENTRY int slot(int slot);  // returns its argument, 0 or 1: a slot of a double buffer

// Warps.

// The last lane of the mask to arrive performs the operation for all lanes. operands[lane] is the lane's operand, or
// null.
using Perform = void (*)(void** operands);
SK_ENTRY void collective(const char* kind, uint32_t mask, void* operand, Perform perform);
// Operands of the collectives.
struct Shuffle {
  static constexpr int kMaxBytes = 16;
  unsigned char value[kMaxBytes], result[kMaxBytes];
  int bytes, source;  // lane to read from; its own if out of range
};
void perform_shuffle(void** operands);
struct Vote {
  uint32_t value, ballot, match;  // ballot: lanes with a nonzero value; match: lanes with the same value
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

// Asynchronous copies.
SK_ENTRY void copy_async(char* to, const char* from, int bytes, int valid_bytes);
SK_ENTRY void copy_async_commit();
SK_ENTRY void copy_async_wait(int pending);

// Barriers in shared memory.
SK_ENTRY void mbarrier_init(const void* barrier, int arrivals);
SK_ENTRY void mbarrier_arrive(const void* barrier, int64_t expect_bytes);
SK_ENTRY void mbarrier_wait(const void* barrier, int parity);
// An asynchronous write of `bytes` that the barrier counts. It is performed when a thread tests the barrier, or
// immediately if one already waits. A copy reads `from` at that time; for a store, `from` is null and `value` holds at
// most 16 bytes.
SK_ENTRY void deliver_async(char* to, const char* from, const void* value, int64_t bytes, const void* barrier);

}  // namespace emulation
}  // namespace seqkernels
