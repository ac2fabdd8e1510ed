// The device interface of this project's CUDA kernels. With nvcc, each function is an intrinsic or a PTX instruction.
// With SEQKERNELS_EMULATE_CUDA and a C++ compiler, tests/cuda_on_cpu/device_emulated.h replaces the device half of this
// header: each CUDA thread is a fibre, each barrier switches fibres, and memory accesses are checked. Kernel files
// include this header and torch-free headers only and access the device through these functions alone, so that one
// source serves both.
//
//   template <class T>
//   SK_KERNEL(kThreads, kBlocksPerMultiprocessor) scale_kernel(const SK_GRID_CONSTANT ScaleArgs args) {
//     const Global<const T> x = global<const T>(args.x, args.n);  // the count is the bound that the emulation checks
//     const Global<T> y = global<T>(args.y, args.n);
//     SharedArena arena;
//     const Shared<float> tile = arena.array<float>(kThreads);
//     ...
//   }
//   launch(scale_kernel<T>, LaunchConfig{blocks, kThreads, shared_bytes, .., stream}, args);
//
// Blocks are one-dimensional. Pointers to global and shared memory are Global<T> and Shared<T>. `x[i]` is a T& under
// nvcc and a checked proxy under the emulation; name the type of a value that is read: `const float v = x[i]`. There
// are no floating-point atomics, because results must not depend on the order of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

#if defined(SEQKERNELS_EMULATE_CUDA)
#define SK_KERNEL(...) inline void
#define SK_GRID_CONSTANT
#define SK_DEVICE inline
#define SK_HOST_DEVICE inline
#define SK_UNROLL
#define SK_NO_UNROLL
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#define SK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define SK_GRID_CONSTANT __grid_constant__  // the parameter must be const; it is read in place from constant memory
#define SK_DEVICE __device__ __forceinline__
#define SK_HOST_DEVICE __host__ __device__ __forceinline__
#define SK_UNROLL _Pragma("unroll")
#define SK_NO_UNROLL _Pragma("unroll 1")
#endif

namespace seqkernels {

// Launch configuration. Sizes are in blocks, threads and bytes; `cluster` blocks along x form a cluster (1: none).
struct LaunchConfig {
  struct Grid {
    int64_t x = 1, y = 1, z = 1;
    Grid(int64_t x_ = 1, int64_t y_ = 1, int64_t z_ = 1) : x(x_), y(y_), z(z_) {}
  };
  Grid grid;
  int block = 1;
  int64_t shared_bytes = 0;  // dynamic shared memory
  int cluster = 1;
  bool cooperative = false;  // all blocks are resident: grid_sync() and spinning on other blocks are allowed
  void* stream = nullptr;

  std::string text(const std::string& kernel) const {
    std::ostringstream out;
    out << kernel << " with grid (" << grid.x << ", " << grid.y << ", " << grid.z << "), block " << block
        << ", shared memory " << shared_bytes << " bytes, cluster " << cluster << (cooperative ? ", cooperative" : "");
    return out.str();
  }
};

// Limits of the current device.
struct DeviceLimits {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // maximum dynamic shared memory of a block
  int64_t l2_bytes;
  bool clusters() const { return major >= 9; }
};

namespace device {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Up to 16 bytes that are moved by one instruction. Its address must be aligned to its size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "a vector access moves at most 16 bytes");
  T values[N];
  SK_HOST_DEVICE T& operator[](int i) { return values[i]; }
  SK_HOST_DEVICE const T& operator[](int i) const { return values[i]; }
};

// Cache behaviour of a load or store. kReadOnly: memory that no thread writes during the kernel. kStreaming: memory
// that is accessed once. kL2: bypasses the L1 cache.
enum class Cache { kDefault, kReadOnly, kStreaming, kL2 };

// A barrier in shared memory that counts arrivals and bytes (mbarrier).
struct alignas(8) MBarrier {
  uint64_t state;
};

template <class To, class From>
SK_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace device
}  // namespace seqkernels

#if defined(SEQKERNELS_EMULATE_CUDA)
#include "device_emulated.h"
#else

namespace seqkernels {
namespace device {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;  // kernels with clusters compile to a trap
#else
constexpr bool kHasClusters = true;
#endif
// Emits PTX that needs compute capability 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SK_SM90(...) __trap()
#else
#define SK_SM90(...) __VA_ARGS__
#endif

// Thread and block indices.

SK_DEVICE int thread_index() { return threadIdx.x; }
SK_DEVICE int lane_index() { return threadIdx.x % kWarp; }
SK_DEVICE int warp_index() { return threadIdx.x / kWarp; }
SK_DEVICE int block_threads() { return blockDim.x; }
SK_DEVICE int64_t block_index() { return blockIdx.x; }
SK_DEVICE int64_t block_index_y() { return blockIdx.y; }
SK_DEVICE int64_t block_index_z() { return blockIdx.z; }
SK_DEVICE int64_t grid_blocks() { return gridDim.x; }
SK_DEVICE int64_t grid_blocks_y() { return gridDim.y; }
SK_DEVICE int64_t grid_blocks_z() { return gridDim.z; }
// Along x, for grid-stride loops: `for (int64_t i = grid_thread_index(); i < n; i += grid_threads())`.
SK_DEVICE int64_t grid_thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
SK_DEVICE int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Memory.

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// A pointer to global memory. `count` elements are accessible; only the emulation stores and checks this number.
template <class T>
class Global {
 public:
  SK_DEVICE Global() : pointer_(nullptr) {}
  SK_DEVICE Global(T* pointer, int64_t /*count*/) : pointer_(pointer) {}
  template <class U, class = std::enable_if_t<std::is_same<const U, T>::value>>
  SK_DEVICE Global(Global<U> other) : pointer_(other.get()) {}
  SK_DEVICE T& operator[](int64_t i) const { return pointer_[i]; }
  SK_DEVICE Global operator+(int64_t i) const { return Global(pointer_ + i, 0); }
  SK_DEVICE explicit operator bool() const { return pointer_ != nullptr; }
  SK_DEVICE T* get() const { return pointer_; }

 private:
  T* pointer_;
};
template <class T>
SK_DEVICE Global<T> global(std::conditional_t<std::is_const<T>::value, const void*, void*> pointer, int64_t count) {
  return Global<T>(static_cast<T*>(pointer), count);
}

// A pointer to shared memory of this block.
template <class T>
class Shared {
 public:
  SK_HOST_DEVICE Shared() : pointer_(nullptr) {}
  SK_HOST_DEVICE Shared(T* pointer, int64_t /*count*/) : pointer_(pointer) {}
  template <class U, class = std::enable_if_t<std::is_same<const U, T>::value>>
  SK_DEVICE Shared(Shared<U> other) : pointer_(other.get()) {}
  SK_DEVICE T& operator[](int64_t i) const { return pointer_[i]; }
  SK_DEVICE Shared operator+(int64_t i) const { return Shared(pointer_ + i, 0); }
  SK_DEVICE explicit operator bool() const { return pointer_ != nullptr; }
  SK_DEVICE T* get() const { return pointer_; }
  SK_DEVICE uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer_)); }
  // Reinterprets the same bytes as elements of another type.
  template <class U>
  SK_DEVICE Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(pointer_), 0);
  }

 private:
  T* pointer_;
};

// Divides the block's dynamic shared memory into arrays. All threads must request the same arrays in the same order.
class SharedArena {
 public:
  template <class T>
  SK_DEVICE Shared<T> array(int64_t count, int align = 16) {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    offset_ = (offset_ + align - 1) / align * align;
    T* start = reinterpret_cast<T*>(dynamic_shared_memory + offset_);
    offset_ += static_cast<uint32_t>(count * sizeof(T));
    return Shared<T>(start, count);
  }

 private:
  uint32_t offset_ = 0;
};
// Computes LaunchConfig::shared_bytes on the host from the same sequence of calls.
class SharedBytes {
 public:
  template <class T>
  SK_HOST_DEVICE Shared<T> array(int64_t count, int align = 16) {
    bytes_ = (bytes_ + align - 1) / align * align + count * static_cast<int64_t>(sizeof(T));
    return Shared<T>();
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};
// SK_SHARED(float, partial, 32) declares a static shared array as a variable of type Shared<float>.
#define SK_SHARED(type, name, count)            \
  __shared__ __align__(16) type name##_[count]; \
  const ::seqkernels::device::Shared<type> name(name##_, count)

template <Cache kCache, class Word>
SK_DEVICE Word load_word(const Word* p) {
  if constexpr (kCache == Cache::kReadOnly) return __ldg(p);
  if constexpr (kCache == Cache::kStreaming) return __ldcs(p);
  if constexpr (kCache == Cache::kL2) return __ldcg(p);
  return *p;
}
template <Cache kCache, class Word>
SK_DEVICE void store_word(Word* p, Word word) {
  if constexpr (kCache == Cache::kStreaming) {
    __stcs(p, word);
  } else if constexpr (kCache == Cache::kL2) {
    __stcg(p, word);
  } else {
    *p = word;
  }
}

// Loads N elements from index i. The address must be aligned to N * sizeof(T) bytes.
template <int N, Cache kCache = Cache::kDefault, class T>
SK_DEVICE Vec<std::remove_const_t<T>, N> load_vec(Global<T> x, int64_t i) {
  using Word = typename WordOf<N * sizeof(T)>::type;
  return bit_cast<Vec<std::remove_const_t<T>, N>>(load_word<kCache>(reinterpret_cast<const Word*>(x.get() + i)));
}
template <int N, class T>
SK_DEVICE Vec<std::remove_const_t<T>, N> load_vec(Shared<T> x, int64_t i) {
  return *reinterpret_cast<const Vec<std::remove_const_t<T>, N>*>(x.get() + i);
}
template <Cache kCache = Cache::kDefault, class T, int N>
SK_DEVICE void store_vec(Global<T> x, int64_t i, const Vec<T, N>& v) {
  using Word = typename WordOf<N * sizeof(T)>::type;
  store_word<kCache>(reinterpret_cast<Word*>(x.get() + i), bit_cast<Word>(v));
}
template <class T, int N>
SK_DEVICE void store_vec(Shared<T> x, int64_t i, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(x.get() + i) = v;
}
// Loads or stores one element with an explicit cache behaviour.
template <Cache kCache, class T>
SK_DEVICE std::remove_const_t<T> load(Global<T> x, int64_t i) {
  return load_vec<1, kCache>(x, i)[0];
}
template <Cache kCache, class T>
SK_DEVICE void store(Global<T> x, int64_t i, T v) {
  store_vec<kCache>(x, i, Vec<T, 1>{{v}});
}
template <class T>
SK_DEVICE void prefetch_l2(Global<T> x, int64_t i) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x.get() + i));
}

// Memory ordering at device scope, for integers of 32 or 64 bits.

#define SK_ORDERED(name, op32, op64)                                                            \
  template <class T>                                                                            \
  SK_DEVICE std::remove_const_t<T> name(Global<T> x, int64_t i) {                               \
    static_assert(std::is_integral<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "integer"); \
    if constexpr (sizeof(T) == 4) {                                                             \
      uint32_t v;                                                                               \
      asm volatile(op32 " %0, [%1];" : "=r"(v) : "l"(x.get() + i) : "memory");                  \
      return static_cast<T>(v);                                                                 \
    } else {                                                                                    \
      uint64_t v;                                                                               \
      asm volatile(op64 " %0, [%1];" : "=l"(v) : "l"(x.get() + i) : "memory");                  \
      return static_cast<T>(v);                                                                 \
    }                                                                                           \
  }
SK_ORDERED(load_acquire, "ld.acquire.gpu.global.u32", "ld.acquire.gpu.global.u64")
SK_ORDERED(load_relaxed, "ld.relaxed.gpu.global.u32", "ld.relaxed.gpu.global.u64")
#undef SK_ORDERED
#define SK_ORDERED(name, op32, op64)                                                                \
  template <class T>                                                                                \
  SK_DEVICE void name(Global<T> x, int64_t i, T v) {                                                \
    static_assert(std::is_integral<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "integer");     \
    if constexpr (sizeof(T) == 4) {                                                                 \
      asm volatile(op32 " [%0], %1;" ::"l"(x.get() + i), "r"(static_cast<uint32_t>(v)) : "memory"); \
    } else {                                                                                        \
      asm volatile(op64 " [%0], %1;" ::"l"(x.get() + i), "l"(static_cast<uint64_t>(v)) : "memory"); \
    }                                                                                               \
  }
SK_ORDERED(store_release, "st.release.gpu.global.u32", "st.release.gpu.global.u64")
SK_ORDERED(store_relaxed, "st.relaxed.gpu.global.u32", "st.relaxed.gpu.global.u64")
// Adds v without returning the old value. Earlier writes of this thread are visible to a thread that acquires the sum.
SK_ORDERED(add_release, "red.release.gpu.global.add.u32", "red.release.gpu.global.add.u64")
#undef SK_ORDERED
SK_DEVICE void fence_device() { __threadfence(); }
SK_DEVICE void fence_block() { __threadfence_block(); }
// Call this in a loop that waits for another thread. The emulation then runs other threads; without it, the loop hangs.
SK_DEVICE void pause() { __nanosleep(20); }
// Waits until a monotonically increasing flag reaches `wanted`.
template <class T>
SK_DEVICE void wait_acquire(Global<T> flags, int64_t i, std::remove_const_t<T> wanted) {
  while (load_acquire(flags, i) < wanted) {
  }
}
// The slot of a double buffer in a round, and the other slot. Tests exchange them (tests/cuda_on_cpu/mutants.py).
SK_DEVICE int slot_of(int round) { return round & 1; }
SK_DEVICE int other_slot(int slot) { return 1 - slot; }

// Atomics on integers: relaxed; each returns the old value.

#define SK_ATOMIC(name, intrinsic)                                                                    \
  template <template <class> class Pointer, class T>                                                  \
  SK_DEVICE T name(Pointer<T> x, int64_t i, T v) {                                                    \
    static_assert(std::is_integral<T>::value, "no atomics in float");                                 \
    using Native = std::conditional_t<sizeof(T) == 8, unsigned long long,                             \
                                      std::conditional_t<std::is_signed<T>::value, int, unsigned>>;   \
    return static_cast<T>(intrinsic(reinterpret_cast<Native*>(x.get() + i), static_cast<Native>(v))); \
  }
SK_ATOMIC(atomic_add, ::atomicAdd)
SK_ATOMIC(atomic_or, ::atomicOr)
SK_ATOMIC(atomic_and, ::atomicAnd)
SK_ATOMIC(atomic_exchange, ::atomicExch)
#undef SK_ATOMIC
#define SK_ATOMIC(name, intrinsic)                                                                             \
  template <template <class> class Pointer, class T>                                                           \
  SK_DEVICE T name(Pointer<T> x, int64_t i, T v) {                                                             \
    static_assert(std::is_integral<T>::value, "no atomics in float");                                          \
    using Wide = std::conditional_t<std::is_signed<T>::value, long long, unsigned long long>;                  \
    using Native =                                                                                             \
        std::conditional_t<sizeof(T) == 8, Wide, std::conditional_t<std::is_signed<T>::value, int, unsigned>>; \
    return static_cast<T>(intrinsic(reinterpret_cast<Native*>(x.get() + i), static_cast<Native>(v)));          \
  }
SK_ATOMIC(atomic_max, ::atomicMax)
SK_ATOMIC(atomic_min, ::atomicMin)
#undef SK_ATOMIC
template <template <class> class Pointer, class T>
SK_DEVICE T atomic_compare_exchange(Pointer<T> x, int64_t i, T expected, T desired) {
  using Native = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  return static_cast<T>(
      ::atomicCAS(reinterpret_cast<Native*>(x.get() + i), static_cast<Native>(expected), static_cast<Native>(desired)));
}

// Warp operations. All lanes of `mask` must call them. A shuffle does not order memory accesses; warp_sync does.

SK_DEVICE void warp_sync(uint32_t mask = kAllLanes) { __syncwarp(mask); }
SK_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kAllLanes) { return __ballot_sync(mask, predicate); }
SK_DEVICE bool any_lane(bool predicate, uint32_t mask = kAllLanes) { return __any_sync(mask, predicate); }
SK_DEVICE bool all_lanes(bool predicate, uint32_t mask = kAllLanes) { return __all_sync(mask, predicate); }
// Returns the lanes of the mask that hold the same value.
SK_DEVICE uint32_t match_any(uint32_t value, uint32_t mask = kAllLanes) { return __match_any_sync(mask, value); }

template <class T, class F>
SK_DEVICE T by_words(T value, F&& f) {
  static_assert(sizeof(T) <= 4 || sizeof(T) % 4 == 0, "words of 32 bits");
  if constexpr (sizeof(T) < 4) {
    uint32_t word = 0;
    memcpy(&word, &value, sizeof(T));
    word = f(word);
    memcpy(&value, &word, sizeof(T));
  } else {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    SK_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) words[i] = f(words[i]);
    memcpy(&value, words, sizeof(T));
  }
  return value;
}
// Shuffles accept any trivially copyable type. The source lane is relative to a group of `width` lanes.
template <class T>
SK_DEVICE T shuffle(T value, int lane, int width = kWarp, uint32_t mask = kAllLanes) {
  return by_words(value, [=](uint32_t w) { return __shfl_sync(mask, w, lane, width); });
}
template <class T>
SK_DEVICE T shuffle_xor(T value, int lanes, int width = kWarp, uint32_t mask = kAllLanes) {
  return by_words(value, [=](uint32_t w) { return __shfl_xor_sync(mask, w, lanes, width); });
}
template <class T>
SK_DEVICE T shuffle_down(T value, int delta, int width = kWarp, uint32_t mask = kAllLanes) {
  return by_words(value, [=](uint32_t w) { return __shfl_down_sync(mask, w, delta, width); });
}
template <class T>
SK_DEVICE T shuffle_up(T value, int delta, int width = kWarp, uint32_t mask = kAllLanes) {
  return by_words(value, [=](uint32_t w) { return __shfl_up_sync(mask, w, delta, width); });
}

SK_DEVICE int popcount(uint32_t bits) { return __popc(bits); }
SK_DEVICE int leading_zeros(uint32_t bits) { return __clz(bits); }
SK_DEVICE int first_set(uint32_t bits) { return __ffs(bits) - 1; }  // -1: none
SK_DEVICE uint32_t lanes_before() { return (1u << lane_index()) - 1; }

// Block and grid barriers.

SK_DEVICE void block_sync() { __syncthreads(); }
SK_DEVICE int block_sync_count(bool predicate) { return __syncthreads_count(predicate); }
SK_DEVICE bool block_sync_or(bool predicate) { return __syncthreads_or(predicate); }
// Named barriers 1 to 15 for `threads` threads of the block, in whole warps. named_sync waits; named_arrive does not.
SK_DEVICE void named_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SK_DEVICE void named_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Synchronises all blocks of a cooperative launch.
SK_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// Asynchronous copies from global to shared memory.

// Copies 4, 8 or 16 aligned bytes. If not valid, writes zeros and does not read the source.
template <int kBytes, class T, class U>
SK_DEVICE void copy_async(Shared<T> to, Global<U> from, bool valid = true) {
  static_assert(std::is_same<T, std::remove_const_t<U>>::value, "a copy keeps the type");
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
  // The ignore-src operand costs one predicate; a variable source size costs four instructions.
  const int ignored = !valid;
  if constexpr (kBytes == 16) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\ncp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;\n}" ::"r"(
            to.address()),
        "l"(from.get()), "r"(ignored)
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\ncp.async.ca.shared.global [%0], [%1], %2, p;\n}" ::"r"(to.address()),
        "l"(from.get()), "n"(kBytes), "r"(ignored)
        : "memory");
  }
}
// Copies the first `count` elements and writes zeros behind them.
template <int kBytes, class T, class U>
SK_DEVICE void copy_async_part(Shared<T> to, Global<U> from, int count) {
  static_assert(std::is_same<T, std::remove_const_t<U>>::value, "a copy keeps the type");
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
  const int bytes = count * static_cast<int>(sizeof(T));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from.get()), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()), "l"(from.get()), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
SK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending copy groups of this thread are incomplete. Other threads see the data after a barrier.
template <int kPending>
SK_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Clusters, distributed shared memory and mbarriers (compute capability 9.0).

SK_DEVICE int cluster_rank() {
  uint32_t rank = 0;
  SK_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return static_cast<int>(rank);
}
SK_DEVICE int cluster_blocks() {
  uint32_t count = 1;
  SK_SM90(asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count)));
  return static_cast<int>(count);
}
SK_DEVICE void cluster_arrive() { SK_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory")); }
SK_DEVICE void cluster_wait() { SK_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory")); }
SK_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Shared memory of a block of the cluster, possibly this one. The owner must not have exited: end kernels with
// cluster_sync().
template <class T>
class Remote {
 public:
  SK_DEVICE Remote() : address_(0) {}
  SK_DEVICE explicit Remote(uint32_t address) : address_(address) {}
  SK_DEVICE Remote operator+(int64_t i) const { return Remote(address_ + static_cast<uint32_t>(i * sizeof(T))); }
  SK_DEVICE uint32_t address() const { return address_; }

 private:
  uint32_t address_;
};
template <class T>
SK_DEVICE Remote<T> remote(Shared<T> mine, int rank) {
  uint32_t address = 0;
  SK_SM90(asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(mine.address()), "r"(rank)));
  return Remote<T>(address);
}
template <class T, int N>
SK_DEVICE void store_vec(Remote<T> x, int64_t i, const Vec<T, N>& v) {
  constexpr int kBytes = sizeof(T) * N;
  const uint32_t p = (x + i).address();
  if constexpr (kBytes == 16) {
    const auto w = bit_cast<uint4>(v);
    SK_SM90(asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(w.x), "r"(w.y), "r"(w.z),
                         "r"(w.w) : "memory"));
  } else if constexpr (kBytes == 8) {
    const auto w = bit_cast<uint2>(v);
    SK_SM90(asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(p), "r"(w.x), "r"(w.y) : "memory"));
  } else if constexpr (kBytes == 4) {
    SK_SM90(asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(p), "r"(bit_cast<uint32_t>(v)) : "memory"));
  } else {
    static_assert(kBytes == 2, "2, 4, 8 or 16 bytes");
    SK_SM90(asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(p), "h"(bit_cast<uint16_t>(v)) : "memory"));
  }
}
template <int N, class T>
SK_DEVICE Vec<T, N> load_vec(Remote<T> x, int64_t i) {
  constexpr int kBytes = sizeof(T) * N;
  const uint32_t p = (x + i).address();
  if constexpr (kBytes == 16) {
    uint4 w{};
    SK_SM90(asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z),
                         "=r"(w.w) : "r"(p) : "memory"));
    return bit_cast<Vec<T, N>>(w);
  } else if constexpr (kBytes == 8) {
    uint2 w{};
    SK_SM90(asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "r"(p) : "memory"));
    return bit_cast<Vec<T, N>>(w);
  } else if constexpr (kBytes == 4) {
    uint32_t w = 0;
    SK_SM90(asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(w) : "r"(p) : "memory"));
    return bit_cast<Vec<T, N>>(w);
  } else {
    static_assert(kBytes == 2, "2, 4, 8 or 16 bytes");
    uint16_t w = 0;
    SK_SM90(asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(w) : "r"(p) : "memory"));
    return bit_cast<Vec<T, N>>(w);
  }
}
template <class T>
SK_DEVICE void store(Remote<T> x, int64_t i, T v) {
  store_vec(x, i, Vec<T, 1>{{v}});
}
template <class T>
SK_DEVICE T load(Remote<T> x, int64_t i) {
  return load_vec<1>(x, i)[0];
}

// Initialises a barrier for `arrivals` arrivals per phase. One thread calls it; mbarrier_init_fence() and a block or
// cluster barrier must follow before any use.
SK_DEVICE void mbarrier_init(Shared<MBarrier> b, int64_t i, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"((b + i).address()), "r"(arrivals) : "memory");
}
SK_DEVICE void mbarrier_init_fence() { SK_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory")); }
SK_DEVICE void mbarrier_arrive(Shared<MBarrier> b, int64_t i) {
  SK_SM90(asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"((b + i).address()) : "memory"));
}
// Arrives and adds `bytes` to the number of bytes that the current phase waits for.
SK_DEVICE void mbarrier_arrive_expect(Shared<MBarrier> b, int64_t i, int bytes) {
  SK_SM90(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"((b + i).address()),
                       "r"(bytes) : "memory"));
}
SK_DEVICE void mbarrier_arrive(Remote<MBarrier> b, int64_t i) {
  SK_SM90(
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"((b + i).address()) : "memory"));
}
// Waits for the phase with this parity to complete. Phases are numbered from 0; on a new barrier, parity 1 counts as
// complete. Afterwards this thread sees all writes to shared memory that blocks of the cluster made before they
// arrived. The fence is restricted to shared memory, which costs nothing; an acquire on the wait itself would also
// invalidate the L1 cache for data of other blocks.
SK_DEVICE void mbarrier_wait(Shared<MBarrier> b, int64_t i, int parity) {
  uint32_t over = 0;
  do {
    SK_SM90(
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(over) : "r"((b + i).address()),
                     "r"(parity) : "memory"));
  } while (over == 0);
  SK_SM90(asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" :: : "memory"));
}
// Stores 4, 8 or 16 bytes into shared memory of a block; the barrier, in the same block, counts the bytes on arrival.
template <class T, int N>
SK_DEVICE void store_async(Remote<T> x, int64_t i, const Vec<T, N>& v, Remote<MBarrier> barrier) {
  constexpr int kBytes = sizeof(T) * N;
  const uint32_t p = (x + i).address();
  if constexpr (kBytes == 16) {
    const auto w = bit_cast<uint4>(v);
    SK_SM90(asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(p),
        "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(barrier.address()) : "memory"));
  } else if constexpr (kBytes == 8) {
    const auto w = bit_cast<uint64_t>(v);
    SK_SM90(asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(p),
                         "l"(w), "r"(barrier.address()) : "memory"));
  } else {
    static_assert(kBytes == 4, "4, 8 or 16 bytes");
    SK_SM90(asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(p),
                         "r"(bit_cast<uint32_t>(v)), "r"(barrier.address()) : "memory"));
  }
}
// One thread copies `count` elements, a multiple of 16 bytes with both addresses aligned to 16; the barrier counts the
// bytes. Earlier writes to the source need fence_async() and a barrier. To a block of the cluster:
template <class T, class U>
SK_DEVICE void copy_bulk(Remote<T> to, Shared<U> from, int64_t count, Remote<MBarrier> barrier) {
  SK_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to.address()),
      "r"(from.address()), "r"(static_cast<uint32_t>(count * sizeof(T))), "r"(barrier.address()) : "memory"));
}
// From global memory to this block:
template <class T, class U>
SK_DEVICE void copy_bulk(Shared<T> to, Global<U> from, int64_t count, Shared<MBarrier> barrier) {
  SK_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to.address()),
      "l"(from.get()), "r"(static_cast<uint32_t>(count * sizeof(T))), "r"(barrier.address()) : "memory"));
}
// Makes this thread's writes to shared memory visible to later asynchronous copies from there.
SK_DEVICE void fence_async() { SK_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

// Matrix fragments. With g = lane / 4 and t = lane % 4 (PTX ISA, "Warp Level Matrix Instructions"), and the element
// with the lower index in the low half of a pair:
//   m16n8k16  A [16, 16]:  a0 (g, 2t..), a1 (g + 8, 2t..), a2 (g, 2t + 8..), a3 (g + 8, 2t + 8..)
//             B [16, 8]:   b0 (2t.., g), b1 (2t + 8.., g)
//   m16n8k8   A [16, 8]:   a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4)
//             B [8, 8]:    b0 (t, g), b1 (t + 4, g)
//   both      C, D [16, 8]: c0, c1 (g, 2t), (g, 2t + 1); c2, c3 (g + 8, 2t), (g + 8, 2t + 1)

// d += a b with T = BFloat16 or Half.
template <class T>
SK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<T, BFloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same<T, Half>::value, "BFloat16 or Half");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
// d += a b with TF32 operands: float32 bits of which the hardware reads the upper 19 (round with to_tf32).
SK_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
SK_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
// Loads N matrices of 8 x 8 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8 (16 aligned bytes).
// Of each matrix it receives the pair (g, 2t), (g, 2t + 1); transposed: (2t, g), (2t + 1, g).
template <int N, bool kTransposed = false, class T>
SK_DEVICE void load_matrices(uint32_t (&r)[N], Shared<T> row) {
  static_assert(sizeof(T) == 2 && (N == 1 || N == 2 || N == 4), "1, 2 or 4 matrices of 16-bit elements");
  const uint32_t p = row.address();
  if constexpr (N == 4) {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(p)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(p)
                   : "memory");
    }
  } else if constexpr (N == 2) {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(p)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(p)
                   : "memory");
    }
  } else {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
    }
  }
}

// Arithmetic. Call expf, tanhf, fmaf, sqrtf, exp, fma and so on directly. The compiler does not contract multiply and
// add
// (-fmad=false, as on the CPU): write fmaf.

// Conversion from a storage type to its compute type and back, rounding to nearest even.
SK_DEVICE float widen(float x) { return x; }
SK_DEVICE double widen(double x) { return x; }
SK_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
SK_DEVICE float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Packs two elements of a half type into one word, `low` at the lower address.
template <class T>
SK_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same<T, BFloat16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same<T, Half>::value, "BFloat16 or Half");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}
template <class T, class C>
SK_DEVICE T narrow(C x) {
  static_assert(std::is_floating_point<C>::value, "from float or double");
  if constexpr (sizeof(T) == 2) {  // converting a pair is faster than converting one value
    return T{static_cast<uint16_t>(pack_pair<T>(static_cast<float>(x), 0.0f))};
  } else {
    return static_cast<T>(x);
  }
}
template <class T>
SK_DEVICE Vec<float, 2> unpack_pair(uint32_t pair) {
  return {{widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})}};
}
// Approximations with an error of about 2 ulp; subnormal results are flushed to zero. fast_tanh (the hardware's tanh)
// has a relative error of about 2^-11.
SK_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SK_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SK_DEVICE float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#undef SK_SM90
}  // namespace device

// Host functions.

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears a non-sticky error, so that later calls do not report it
  throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(error));
}

inline DeviceLimits device_limits() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "no current device");
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "a device attribute could not be read");
    return value;
  };
  return {ask(cudaDevAttrComputeCapabilityMajor), ask(cudaDevAttrComputeCapabilityMinor),
          ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          ask(cudaDevAttrL2CacheSize)};
}

namespace device {
inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "a kernel";
  int failed = 0;
  char* const readable = abi::__cxa_demangle(mangled, nullptr, nullptr, &failed);
  const std::string name = failed == 0 ? readable : mangled;
  std::free(readable);
  return name;
}

// The runtime's form of a launch configuration. Sets the attributes that the kernel needs for it.
struct RuntimeConfig {
  RuntimeConfig(const void* kernel_, const LaunchConfig& config_) : kernel(kernel_), config(config_) {
    if (config.shared_bytes > 48 * 1024) {
      setup_error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(config.shared_bytes));
    }
    if (config.cluster > 8 && setup_error == cudaSuccess) {
      setup_error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    launch.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
    launch.blockDim = dim3(config.block);
    launch.dynamicSmemBytes = config.shared_bytes;
    launch.stream = static_cast<cudaStream_t>(config.stream);
    launch.attrs = attributes;
    if (config.cluster > 1) {
      attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[launch.numAttrs].val.clusterDim.x = config.cluster;
      attributes[launch.numAttrs].val.clusterDim.y = 1;
      attributes[launch.numAttrs++].val.clusterDim.z = 1;
    }
    if (config.cooperative) {
      attributes[launch.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[launch.numAttrs++].val.cooperative = 1;
    }
  }
  RuntimeConfig(const RuntimeConfig&) = delete;
  // Formats the configuration only on an error, to keep launches fast.
  void check(cudaError_t error, const char* what) const {
    if (error != cudaSuccess) check_cuda(error, what + config.text(kernel_name(kernel)));
  }
  // Occupancy: `count`, or 0 if the device does not support the configuration.
  int64_t resident(cudaError_t error, int64_t count) const {
    if (error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration ||
        error == cudaErrorInvalidValue || error == cudaErrorLaunchOutOfResources || error == cudaErrorNotSupported) {
      cudaGetLastError();  // as in check_cuda
      return 0;
    }
    check(error, "the occupancy of ");
    return count;
  }
  const void* const kernel;
  const LaunchConfig& config;
  cudaError_t setup_error = cudaSuccess;
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attributes[2]{};
};
}  // namespace device

// Runs kernel(args...) on the stream. Throws an error that shows the configuration if CUDA rejects it. An empty grid
// launches nothing.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Args&&... args) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  const device::RuntimeConfig runtime(reinterpret_cast<const void*>(kernel), config);
  runtime.check(runtime.setup_error, "");
  runtime.check(cudaLaunchKernelEx(&runtime.launch, kernel, static_cast<Parameters>(args)...), "");
}
// Number of blocks (clusters) of this configuration that the device holds at once, the limit of a cooperative launch; 0
// if the device does not support the configuration.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), const LaunchConfig& config) {
  const device::RuntimeConfig runtime(reinterpret_cast<const void*>(kernel), config);
  int each = 0;
  cudaError_t error = runtime.setup_error;
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, config.block, config.shared_bytes);
  }
  return runtime.resident(error, static_cast<int64_t>(each) * device_limits().multiprocessors);
}
template <class... Parameters>
int64_t resident_clusters(void (*kernel)(Parameters...), const LaunchConfig& config) {
  const device::RuntimeConfig runtime(reinterpret_cast<const void*>(kernel), config);
  int count = 0;
  cudaError_t error = runtime.setup_error;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &runtime.launch);
  return runtime.resident(error, count);
}
inline void fill_bytes(void* device_memory, int byte, int64_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(device_memory, byte, bytes, static_cast<cudaStream_t>(stream)), "memset");
}
// Waits for the stream, so it cannot be captured in a CUDA graph.
inline void read_back(void* host, const void* device_memory, int64_t bytes, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(host, device_memory, bytes, cudaMemcpyDeviceToHost, queue), "copy to the host");
  check_cuda(cudaStreamSynchronize(queue), "a kernel before a copy to the host");
}

}  // namespace seqkernels

#endif  // SEQKERNELS_EMULATE_CUDA
