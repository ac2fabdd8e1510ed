// The emulated half of csrc/common/device.cuh: the same functions, documented there, on a machine without a GPU.
#pragma once

#include <cmath>
#include <tuple>
#include <type_traits>

#include "emulation.h"

#define SK_ALWAYS inline __attribute__((always_inline))

namespace seqkernels {
namespace device {

constexpr bool kHasClusters = true;
using emulation::Access;
using emulation::current;

// Thread and block indices.

SK_ALWAYS int thread_index() { return current->index; }
SK_ALWAYS int lane_index() { return current->index % kWarp; }
SK_ALWAYS int warp_index() { return current->index / kWarp; }
SK_ALWAYS int block_threads() { return current->block_threads; }
SK_ALWAYS int64_t block_index() { return current->x; }
SK_ALWAYS int64_t block_index_y() { return current->y; }
SK_ALWAYS int64_t block_index_z() { return current->z; }
SK_ALWAYS int64_t grid_blocks() { return current->grid_x; }
SK_ALWAYS int64_t grid_blocks_y() { return current->grid_y; }
SK_ALWAYS int64_t grid_blocks_z() { return current->grid_z; }
SK_ALWAYS int64_t grid_thread_index() { return current->x * current->block_threads + current->index; }
SK_ALWAYS int64_t grid_threads() { return current->grid_x * current->block_threads; }

// Memory.

SK_ALWAYS void record_if_enabled(const void* address, int64_t bytes, Access access) {
  if (__builtin_expect(emulation::recording, 0)) emulation::record_access(address, bytes, access);
}

// Proxy for a T& in device memory: conversion reads, assignment writes, and both are recorded. It cannot be stored in a
// variable, so `auto v = x[i]`, which would read later than it appears to, does not compile.
template <class T>
class Ref {
 public:
  SK_ALWAYS explicit Ref(T* p) : p_(p) {}
  SK_ALWAYS operator T() && { return read(); }
  SK_ALWAYS void operator=(const T& v) && { write(v); }
  SK_ALWAYS void operator=(const Ref& other) && { write(other.read()); }
#define SK_ASSIGN(op)                              \
  template <class U>                               \
  SK_ALWAYS void operator op## = (const U& v) && { \
    write(static_cast<T>(read() op v));            \
  }
  SK_ASSIGN(+)
  SK_ASSIGN(-)
  SK_ASSIGN(*)
  SK_ASSIGN(|)
  SK_ASSIGN(&)
  SK_ASSIGN(^)
#undef SK_ASSIGN

 private:
  SK_ALWAYS T read() const {
    record_if_enabled(p_, sizeof(T), Access::kRead);
    return *p_;
  }
  SK_ALWAYS void write(const T& v) const {
    record_if_enabled(p_, sizeof(T), Access::kWrite);
    *p_ = v;
  }
  T* p_;
};

// A pointer with its array: elements [first, last), counted from the pointer.
template <class T>
class Checked {
 public:
  using Value = std::remove_const_t<T>;
  SK_ALWAYS T* at(int64_t i, int64_t n, const char* what) const {
    if (__builtin_expect(i < first_ || i + n > last_, 0)) {
      emulation::out_of_bounds(what, i - first_, n, last_ - first_, sizeof(T));
    }
    T* p = p_ + i;
    if (__builtin_expect(reinterpret_cast<uintptr_t>(p) % (n == 1 ? alignof(T) : n * sizeof(T)) != 0, 0)) {
      emulation::misaligned(what, p, n * sizeof(T));
    }
    return p;
  }
  SK_ALWAYS explicit operator bool() const { return p_ != nullptr; }
  SK_ALWAYS T* get() const { return p_; }
  SK_ALWAYS int64_t first() const { return first_; }
  SK_ALWAYS int64_t last() const { return last_; }

 protected:
  SK_ALWAYS Checked(T* p, int64_t first, int64_t last) : p_(p), first_(first), last_(last) {}
  T* p_;
  int64_t first_, last_;
};

#define SK_POINTER(Name, kWhat)                                                                                 \
  template <class T>                                                                                            \
  class Name : public Checked<T> {                                                                              \
   public:                                                                                                      \
    using typename Checked<T>::Value;                                                                           \
    static constexpr const char* kName = kWhat;                                                                 \
    SK_ALWAYS Name() : Checked<T>(nullptr, 0, 0) {}                                                             \
    SK_ALWAYS Name(T* p, int64_t count) : Checked<T>(p, 0, p ? count : 0) {}                                    \
    SK_ALWAYS Name(T* p, int64_t first, int64_t last) : Checked<T>(p, first, last) {}                           \
    template <class U, class = std::enable_if_t<std::is_same<const U, T>::value>>                               \
    SK_ALWAYS Name(const Name<U>& other) : Checked<T>(other.get(), other.first(), other.last()) {}              \
    SK_ALWAYS Name operator+(int64_t i) const { return Name(this->p_ + i, this->first_ - i, this->last_ - i); } \
    SK_ALWAYS auto operator[](int64_t i) const {                                                                \
      T* p = this->at(i, 1, kName);                                                                             \
      if constexpr (std::is_const<T>::value) {                                                                  \
        record_if_enabled(p, sizeof(T), Access::kRead);                                                         \
        return *p;                                                                                              \
      } else {                                                                                                  \
        return Ref<T>(p);                                                                                       \
      }                                                                                                         \
    }
SK_POINTER(Global, "global memory")
};
SK_POINTER(Shared, "shared memory")
template <class U>
SK_ALWAYS Shared<U> as() const {
  if (reinterpret_cast<uintptr_t>(this->p_) % alignof(U)) emulation::misaligned(kName, this->p_, sizeof(U));
  return Shared<U>(reinterpret_cast<U*>(this->p_),
                   this->first_ * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(U)),
                   this->last_ * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(U)));
}
};
SK_POINTER(Remote, "shared memory of the cluster")
}
;
#undef SK_POINTER

template <class T>
SK_ALWAYS Global<T> global(std::conditional_t<std::is_const<T>::value, const void*, void*> pointer, int64_t count) {
  if (pointer) emulation::check_registered(pointer, count * static_cast<int64_t>(sizeof(T)));
  return Global<T>(static_cast<T*>(pointer), count);
}

class SharedBytes {
 public:
  template <class T>
  Shared<T> array(int64_t count, int align = 16) {
    bytes_ = (bytes_ + align - 1) / align * align + count * static_cast<int64_t>(sizeof(T));
    return Shared<T>();
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};
class SharedArena {
 public:
  template <class T>
  SK_ALWAYS Shared<T> array(int64_t count, int align = 16) {
    offset_ = (offset_ + align - 1) / align * align;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    char* start = emulation::dynamic_shared(offset_, bytes);
    offset_ += bytes;
    return Shared<T>(reinterpret_cast<T*>(start), count);
  }

 private:
  int64_t offset_ = 0;
};
#define SK_SHARED(type, name, count)             \
  static const char name##_key = 0;              \
  const ::seqkernels::device::Shared<type> name( \
      reinterpret_cast<type*>(::seqkernels::emulation::static_shared(&name##_key, (count) * sizeof(type))), count)

template <int N, class Pointer>
SK_ALWAYS auto load_vec_from(const Pointer& x, int64_t i) {
  using T = typename Pointer::Value;
  const auto* p = x.at(i, N, Pointer::kName);
  record_if_enabled(p, N * sizeof(T), Access::kRead);
  Vec<T, N> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class Pointer, class T, int N>
SK_ALWAYS void store_vec_to(const Pointer& x, int64_t i, const Vec<T, N>& v) {
  T* p = x.at(i, N, Pointer::kName);
  record_if_enabled(p, N * sizeof(T), Access::kWrite);
  memcpy(p, &v, sizeof(v));
}
template <int N, Cache kCache = Cache::kDefault, class T>
SK_ALWAYS Vec<std::remove_const_t<T>, N> load_vec(Global<T> x, int64_t i) {
  return load_vec_from<N>(x, i);
}
template <int N, class T>
SK_ALWAYS Vec<std::remove_const_t<T>, N> load_vec(Shared<T> x, int64_t i) {
  return load_vec_from<N>(x, i);
}
template <Cache kCache = Cache::kDefault, class T, int N>
SK_ALWAYS void store_vec(Global<T> x, int64_t i, const Vec<T, N>& v) {
  store_vec_to(x, i, v);
}
template <class T, int N>
SK_ALWAYS void store_vec(Shared<T> x, int64_t i, const Vec<T, N>& v) {
  store_vec_to(x, i, v);
}
template <Cache kCache, class T>
SK_ALWAYS std::remove_const_t<T> load(Global<T> x, int64_t i) {
  return load_vec_from<1>(x, i)[0];
}
template <Cache kCache, class T>
SK_ALWAYS void store(Global<T> x, int64_t i, T v) {
  store_vec_to(x, i, Vec<T, 1>{{v}});
}
template <class T>
SK_ALWAYS void prefetch_l2(Global<T> x, int64_t i) {
  x.at(i, 1, x.kName);
}

// Memory ordering.

template <class T>
SK_ALWAYS std::remove_const_t<T> load_ordered(Global<T> x, int64_t i, emulation::Acquire how) {
  static_assert(std::is_integral<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "integer");
  T* p = x.at(i, 1, x.kName);
  return static_cast<std::remove_const_t<T>>(emulation::ordered_load(p, sizeof(T), how));
}
template <class T>
SK_ALWAYS std::remove_const_t<T> load_acquire(Global<T> x, int64_t i) {
  return load_ordered(x, i, emulation::Acquire::kAcquire);
}
template <class T>
SK_ALWAYS std::remove_const_t<T> load_relaxed(Global<T> x, int64_t i) {
  return load_ordered(x, i, emulation::Acquire::kRelaxed);
}
template <class Pointer, class T>
SK_ALWAYS void store_ordered(const Pointer& x, int64_t i, T v, emulation::Release how) {
  static_assert(std::is_integral<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "integer");
  emulation::ordered_store(x.at(i, 1, x.kName), sizeof(T), static_cast<std::make_unsigned_t<T>>(v), how);
}
template <class T>
SK_ALWAYS void store_release(Global<T> x, int64_t i, T v) {
  store_ordered(x, i, v, emulation::Release::kStore);
}
template <class T>
SK_ALWAYS void store_relaxed(Global<T> x, int64_t i, T v) {
  store_ordered(x, i, v, emulation::Release::kRelaxedStore);
}
template <class T>
SK_ALWAYS void add_release(Global<T> x, int64_t i, T v) {
  store_ordered(x, i, static_cast<T>(*x.at(i, 1, x.kName) + v), emulation::Release::kUpdate);
}
SK_ALWAYS void fence_device() { emulation::fence(); }
SK_ALWAYS void fence_block() { emulation::fence(); }
SK_ALWAYS int slot_of(int round) { return emulation::slot(round & 1); }
SK_ALWAYS int other_slot(int slot) { return emulation::slot(1 - slot); }
SK_ALWAYS void pause() { emulation::yield("a pause"); }
template <class T>
SK_ALWAYS void wait_acquire(Global<T> flags, int64_t i, std::remove_const_t<T> wanted) {
  using U = std::make_unsigned_t<std::remove_const_t<T>>;
  static_assert(std::is_same<U, std::remove_const_t<T>>::value, "unsigned");
  emulation::wait_acquire(flags.at(i, 1, flags.kName), sizeof(T), wanted);
}

// Atomics.

template <class Pointer, class F>
SK_ALWAYS auto update(const Pointer& x, int64_t i, F&& f) {
  using T = typename Pointer::Value;
  const T* p = x.at(i, 1, x.kName);
  const T old = static_cast<T>(emulation::ordered_load(p, sizeof(T), emulation::Acquire::kUpdate));
  store_ordered(x, i, f(old), emulation::Release::kRelaxedUpdate);
  return old;
}
#define SK_ATOMIC(name, expression)                       \
  template <template <class> class Pointer, class T>      \
  SK_ALWAYS T name(const Pointer<T>& x, int64_t i, T v) { \
    return update(x, i, [v](T old) -> T {                 \
      (void)old;                                          \
      return expression;                                  \
    });                                                   \
  }
SK_ATOMIC(atomic_add,
          static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(v)))
SK_ATOMIC(atomic_or, old | v)
SK_ATOMIC(atomic_and, old& v)
SK_ATOMIC(atomic_exchange, v)
SK_ATOMIC(atomic_max, old < v ? v : old)
SK_ATOMIC(atomic_min, v < old ? v : old)
#undef SK_ATOMIC
template <template <class> class Pointer, class T>
SK_ALWAYS T atomic_compare_exchange(const Pointer<T>& x, int64_t i, T expected, T desired) {
  return update(x, i, [=](T old) { return old == expected ? desired : old; });
}

// Warp operations.

SK_ALWAYS void warp_sync(uint32_t mask = kAllLanes) { emulation::collective("warp barrier", mask, nullptr, nullptr); }
SK_ALWAYS emulation::Vote vote(const char* kind, uint32_t value, uint32_t mask) {
  emulation::Vote vote{value, 0, 0};
  emulation::collective(kind, mask, &vote, emulation::perform_vote);
  return vote;
}
SK_ALWAYS uint32_t ballot(bool predicate, uint32_t mask = kAllLanes) { return vote("ballot", predicate, mask).ballot; }
SK_ALWAYS bool any_lane(bool predicate, uint32_t mask = kAllLanes) { return vote("any", predicate, mask).ballot != 0; }
SK_ALWAYS bool all_lanes(bool predicate, uint32_t mask = kAllLanes) {
  return vote("all", !predicate, mask).ballot == 0;
}
SK_ALWAYS uint32_t match_any(uint32_t value, uint32_t mask = kAllLanes) { return vote("match", value, mask).match; }

template <class T>
SK_ALWAYS T shuffle_from(T value, int source, uint32_t mask, const char* kind) {
  static_assert(sizeof(T) <= emulation::Shuffle::kMaxBytes && std::is_trivially_copyable<T>::value, "a plain type");
  emulation::Shuffle shuffle;
  memcpy(shuffle.value, &value, sizeof(T));
  shuffle.bytes = sizeof(T);
  shuffle.source = source;
  emulation::collective(kind, mask, &shuffle, emulation::perform_shuffle);
  memcpy(&value, shuffle.result, sizeof(T));
  return value;
}
template <class T>
SK_ALWAYS T shuffle(T value, int lane, int width = kWarp, uint32_t mask = kAllLanes) {
  return shuffle_from(value, lane_index() / width * width + (lane & (width - 1)), mask, "shuffle");
}
template <class T>
SK_ALWAYS T shuffle_xor(T value, int lanes, int width = kWarp, uint32_t mask = kAllLanes) {
  // A source lane in a later group returns the lane's own value; one in an earlier group is read.
  const int self = lane_index(), source = self ^ lanes;
  return shuffle_from(value, source / width > self / width ? self : source, mask, "shuffle_xor");
}
template <class T>
SK_ALWAYS T shuffle_down(T value, int delta, int width = kWarp, uint32_t mask = kAllLanes) {
  const int self = lane_index();
  return shuffle_from(value, self % width + delta < width ? self + delta : self, mask, "shuffle_down");
}
template <class T>
SK_ALWAYS T shuffle_up(T value, int delta, int width = kWarp, uint32_t mask = kAllLanes) {
  const int self = lane_index();
  return shuffle_from(value, self % width - delta >= 0 ? self - delta : self, mask, "shuffle_up");
}

SK_ALWAYS int popcount(uint32_t bits) { return __builtin_popcount(bits); }
SK_ALWAYS int leading_zeros(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }
SK_ALWAYS int first_set(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
SK_ALWAYS uint32_t lanes_before() { return (1u << lane_index()) - 1; }

// Block and grid barriers.

SK_ALWAYS void block_sync() { emulation::block_barrier("block barrier", false); }
SK_ALWAYS int block_sync_count(bool predicate) { return emulation::block_barrier("block barrier", predicate); }
SK_ALWAYS bool block_sync_or(bool predicate) { return emulation::block_barrier("block barrier", predicate) != 0; }
SK_ALWAYS void named_sync(int id, int threads) { emulation::named_barrier(id, threads, /*wait=*/true); }
SK_ALWAYS void named_arrive(int id, int threads) { emulation::named_barrier(id, threads, /*wait=*/false); }
SK_ALWAYS void grid_sync() { emulation::grid_barrier(); }

// Asynchronous copies from global to shared memory.

template <int kBytes, class T, class U>
SK_ALWAYS void copy_async(Shared<T> to, Global<U> from, bool valid = true) {
  static_assert(std::is_same<T, std::remove_const_t<U>>::value, "a copy keeps the type");
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
  constexpr int64_t n = kBytes / sizeof(T);
  char* target = reinterpret_cast<char*>(to.at(0, n, to.kName));
  const char* source = valid ? reinterpret_cast<const char*>(from.at(0, n, from.kName)) : nullptr;
  record_if_enabled(target, kBytes, Access::kWrite);
  if (valid) record_if_enabled(source, kBytes, Access::kRead);
  emulation::copy_async(target, source, kBytes, valid ? kBytes : 0);
}
template <int kBytes, class T, class U>
SK_ALWAYS void copy_async_part(Shared<T> to, Global<U> from, int count) {
  static_assert(std::is_same<T, std::remove_const_t<U>>::value, "a copy keeps the type");
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
  constexpr int n = kBytes / sizeof(T);
  if (count < 0 || count > n) emulation::out_of_bounds("a part of a copy", 0, count, n, sizeof(T));
  char* target = reinterpret_cast<char*>(to.at(0, n, to.kName));
  record_if_enabled(target, kBytes, Access::kWrite);
  const char* source = nullptr;
  if (count > 0) {
    from.at(count - 1, 1, from.kName);
    source = reinterpret_cast<const char*>(from.at(0, 1, from.kName));
    if (reinterpret_cast<uintptr_t>(source) % kBytes != 0) emulation::misaligned(from.kName, source, kBytes);
    record_if_enabled(source, count * static_cast<int>(sizeof(T)), Access::kRead);
  }
  emulation::copy_async(target, source, kBytes, count * static_cast<int>(sizeof(T)));
}
SK_ALWAYS void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
SK_ALWAYS void copy_async_wait() {
  emulation::copy_async_wait(kPending);
}

// Clusters, distributed shared memory and mbarriers.

SK_ALWAYS int cluster_rank() { return current->cluster_rank; }
SK_ALWAYS int cluster_blocks() { return current->cluster_blocks; }
SK_ALWAYS void cluster_arrive() { emulation::cluster_barrier_arrive(); }
SK_ALWAYS void cluster_wait() { emulation::cluster_barrier_wait(); }
SK_ALWAYS void cluster_sync() { emulation::cluster_barrier(); }
template <class T>
SK_ALWAYS Remote<T> remote(Shared<T> mine, int rank) {
  char* start = reinterpret_cast<char*>(mine.get() + mine.first());
  T* theirs = reinterpret_cast<T*>(emulation::peer_shared(start, rank)) - mine.first();
  return Remote<T>(theirs, mine.first(), mine.last());
}
template <class T, int N>
SK_ALWAYS void store_vec(Remote<T> x, int64_t i, const Vec<T, N>& v) {
  emulation::check_peer(x.get());
  store_vec_to(x, i, v);
}
template <int N, class T>
SK_ALWAYS Vec<T, N> load_vec(Remote<T> x, int64_t i) {
  emulation::check_peer(x.get());
  return load_vec_from<N>(x, i);
}
template <class T>
SK_ALWAYS void store(Remote<T> x, int64_t i, T v) {
  store_vec(x, i, Vec<T, 1>{{v}});
}
template <class T>
SK_ALWAYS T load(Remote<T> x, int64_t i) {
  return load_vec<1>(x, i)[0];
}

SK_ALWAYS void mbarrier_init(Shared<MBarrier> b, int64_t i, int arrivals) {
  emulation::mbarrier_init(b.at(i, 1, b.kName), arrivals);
}
SK_ALWAYS void mbarrier_init_fence() {}
SK_ALWAYS void mbarrier_arrive(Shared<MBarrier> b, int64_t i) { emulation::mbarrier_arrive(b.at(i, 1, b.kName), 0); }
SK_ALWAYS void mbarrier_arrive_expect(Shared<MBarrier> b, int64_t i, int bytes) {
  emulation::mbarrier_arrive(b.at(i, 1, b.kName), bytes);
}
SK_ALWAYS void mbarrier_arrive(Remote<MBarrier> b, int64_t i) {
  emulation::check_peer(b.get());
  emulation::mbarrier_arrive(b.at(i, 1, b.kName), 0);
}
SK_ALWAYS void mbarrier_wait(Shared<MBarrier> b, int64_t i, int parity) {
  emulation::mbarrier_wait(b.at(i, 1, b.kName), parity);
}
template <class T, int N>
SK_ALWAYS void store_async(Remote<T> x, int64_t i, const Vec<T, N>& v, Remote<MBarrier> barrier) {
  static_assert(sizeof(v) == 4 || sizeof(v) == 8 || sizeof(v) == 16, "4, 8 or 16 bytes");
  emulation::check_peer(x.get());
  emulation::deliver_async(reinterpret_cast<char*>(x.at(i, N, x.kName)), nullptr, &v, sizeof(v),
                           barrier.at(0, 1, barrier.kName));
}
template <class T, class Target, class Source, class Barrier>
SK_ALWAYS void copy_bulk_to(const Target& to, const Source& from, int64_t count, const Barrier& barrier) {
  static_assert(std::is_same<T, typename Source::Value>::value, "a copy keeps the type");
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  char* target = reinterpret_cast<char*>(to.at(0, 1, to.kName));
  const char* source = reinterpret_cast<const char*>(from.at(0, 1, from.kName));
  to.at(count - 1, 1, to.kName);
  from.at(count - 1, 1, from.kName);
  if (reinterpret_cast<uintptr_t>(target) % 16 || bytes % 16) emulation::misaligned(to.kName, target, 16);
  if (reinterpret_cast<uintptr_t>(source) % 16) emulation::misaligned(from.kName, source, 16);
  emulation::deliver_async(target, source, nullptr, bytes, barrier.at(0, 1, barrier.kName));
}
template <class T, class U>
SK_ALWAYS void copy_bulk(Remote<T> to, Shared<U> from, int64_t count, Remote<MBarrier> barrier) {
  emulation::check_peer(to.get());
  copy_bulk_to<T>(to, from, count, barrier);
}
template <class T, class U>
SK_ALWAYS void copy_bulk(Shared<T> to, Global<U> from, int64_t count, Shared<MBarrier> barrier) {
  copy_bulk_to<T>(to, from, count, barrier);
}
SK_ALWAYS void fence_async() {}

// Matrix fragments.

template <class T>
SK_ALWAYS void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, BFloat16>::value || std::is_same<T, Half>::value, "BFloat16 or Half");
  emulation::Fragments fragments{d, a, b};
  constexpr bool kBFloat16 = std::is_same<T, BFloat16>::value;
  emulation::collective("mma", kAllLanes, &fragments,
                        kBFloat16 ? emulation::perform_mma_bf16 : emulation::perform_mma_f16);
}
SK_ALWAYS void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Fragments fragments{d, a, b};
  emulation::collective("mma", kAllLanes, &fragments, emulation::perform_mma_tf32);
}
// Rounds to nearest, ties away from zero, to 10 mantissa bits.
SK_ALWAYS uint32_t to_tf32(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}
template <int N, bool kTransposed = false, class T>
SK_ALWAYS void load_matrices(uint32_t (&r)[N], Shared<T> row) {
  static_assert(sizeof(T) == 2 && (N == 1 || N == 2 || N == 4), "1, 2 or 4 matrices of 16-bit elements");
  // Only the first 8 N lanes pass addresses.
  const T* p = nullptr;
  if (lane_index() < 8 * N) {
    p = row.at(0, 8, row.kName);
    record_if_enabled(p, 16, Access::kRead);
  }
  emulation::Matrices matrices{reinterpret_cast<const uint16_t*>(p), r, N, kTransposed};
  emulation::collective("load_matrices", kAllLanes, &matrices, emulation::perform_load_matrices);
}

// Arithmetic.

SK_ALWAYS float widen(float x) { return x; }
SK_ALWAYS double widen(double x) { return x; }
SK_ALWAYS float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
SK_ALWAYS float widen(Half x) { return static_cast<float>(bit_cast<_Float16>(x.bits)); }
template <class T, class C>
SK_ALWAYS T narrow(C x) {
  static_assert(std::is_floating_point<C>::value, "from float or double");
  if constexpr (std::is_same<T, BFloat16>::value) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(x));
    if (std::isnan(x)) return {0x7fff};  // the NaN that the instruction returns
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else if constexpr (std::is_same<T, Half>::value) {
    if (std::isnan(x)) return {0x7fff};
    return {bit_cast<uint16_t>(static_cast<_Float16>(static_cast<float>(x)))};
  } else {
    return static_cast<T>(x);
  }
}
template <class T>
SK_ALWAYS uint32_t pack_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}
template <class T>
SK_ALWAYS Vec<float, 2> unpack_pair(uint32_t pair) {
  return {{widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})}};
}
SK_ALWAYS float fast_exp2(float x) { return exp2f(x); }
SK_ALWAYS float fast_reciprocal(float x) { return 1.0f / x; }
SK_ALWAYS float fast_tanh(float x) { return tanhf(x); }

}  // namespace device

// Host functions.

inline DeviceLimits device_limits() {
  auto& s = emulation::settings();
  return {static_cast<int>(s["major"]), static_cast<int>(s["minor"]), static_cast<int>(s["multiprocessors"]),
          s["shared_bytes"], s["l2_bytes"]};
}
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Args&&... args) {
  std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(args)...);
  auto call = [&] { std::apply(kernel, values); };
  emulation::run(
      config, reinterpret_cast<const void*>(kernel), [](void* context) { (*static_cast<decltype(call)*>(context))(); },
      &call);
}
template <class... Parameters>
int64_t resident_blocks(void (*)(Parameters...), const LaunchConfig& config) {
  return emulation::resident_blocks(config);
}
template <class... Parameters>
int64_t resident_clusters(void (*)(Parameters...), const LaunchConfig& config) {
  return config.cluster > emulation::settings()["cluster_blocks"] ? 0
                                                                  : emulation::resident_blocks(config) / config.cluster;
}
inline void fill_bytes(void* device_memory, int byte, int64_t bytes, void* /*stream*/) {
  memset(device_memory, byte, bytes);
}
inline void read_back(void* host, const void* device_memory, int64_t bytes, void* /*stream*/) {
  memcpy(host, device_memory, bytes);
}

}  // namespace seqkernels
