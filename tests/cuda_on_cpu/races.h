// Race detection by vector clocks. For every other thread, a thread's clock holds the latest moment that is ordered
// before now; synchronisation merges clocks. Two accesses are concurrent if neither is ordered before the other.
//
// Full vectors would be large, and after a barrier all threads hold the same one. A clock is therefore an immutable,
// shared object: one page of counters per block, copied only when it changes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace seqkernels {
namespace emulation {

using Clocks = std::vector<uint32_t>;                                               // of one block's threads
using ClockPages = std::vector<std::pair<int64_t, std::shared_ptr<const Clocks>>>;  // by block, ascending
using ClockSnapshot = std::shared_ptr<const ClockPages>;

// The clock of a thread.
struct Clock {
  int64_t block = 0;
  uint32_t thread = 0, threads = 1;
  uint32_t now = 1;
  ClockSnapshot known;
};

// Merges several clocks.
class ClockMerge {
 public:
  void add(const ClockSnapshot& known) {
    if (!known || known == last_) return;
    last_ = known;
    for (const auto& [block, clocks] : *known) {
      Page& page = page_of(block);
      if (!page.shared && page.own.empty()) {
        page.shared = clocks;
      } else if (page.shared != clocks) {
        Clocks& own = owned(page, clocks->size());
        for (size_t i = 0; i < own.size(); ++i) own[i] = std::max(own[i], (*clocks)[i]);
      }
    }
  }
  // Adds everything the thread has done so far, and advances its counter.
  void add(Clock& clock) {
    add(clock.known);
    uint32_t& mine = owned(page_of(clock.block), clock.threads)[clock.thread];
    mine = std::max(mine, clock.now++);
  }
  ClockSnapshot result() {
    auto known = std::make_shared<ClockPages>();
    for (auto& [block, page] : pages_) {
      known->emplace_back(block, page.shared ? page.shared : std::make_shared<const Clocks>(page.own));
    }
    return known;
  }
  void clear() { *this = ClockMerge(); }
  bool empty() const { return pages_.empty(); }

 private:
  struct Page {
    std::shared_ptr<const Clocks> shared;
    Clocks own;
  };
  Page& page_of(int64_t block) {
    auto at = std::lower_bound(pages_.begin(), pages_.end(), block, [](auto& p, int64_t b) { return p.first < b; });
    if (at == pages_.end() || at->first != block) at = pages_.insert(at, {block, {}});
    return at->second;
  }
  static Clocks& owned(Page& page, size_t threads) {
    if (page.shared) page.own = *page.shared;
    page.shared = nullptr;
    page.own.resize(threads);
    return page.own;
  }
  std::vector<std::pair<int64_t, Page>> pages_;
  ClockSnapshot last_;
};

inline ClockSnapshot snapshot(Clock& clock) {
  ClockMerge join;
  join.add(clock);
  return join.result();
}
inline void merge_clock(Clock& clock, const ClockSnapshot& known) {
  if (!known || known == clock.known) return;
  if (!clock.known) {
    clock.known = known;
    return;
  }
  ClockMerge join;
  join.add(clock.known);
  join.add(known);
  clock.known = join.result();
}

// An access to a byte: by which thread, when and where.
struct Record {
  int64_t block = -1;
  uint32_t thread = 0, when = 0;
  const void* location = nullptr;
  bool atomic = false;
  explicit operator bool() const { return block >= 0; }
  bool before(const Clock& clock) const {
    if (block == clock.block && thread == clock.thread) return true;
    if (!clock.known) return false;
    const ClockPages& known = *clock.known;
    const auto at =
        std::lower_bound(known.begin(), known.end(), block, [](auto& page, int64_t b) { return page.first < b; });
    return at != known.end() && at->first == block && (*at->second)[thread] >= when;
  }
};

// Shadow memory: the last write of each byte and two reads since, the first that is not ordered before the second, and
// the latest. A cell covers 4 bytes until an access touches only a part of them.
class Shadow {
 public:
  struct Cell {
    Record write, first_read, last_read;
  };
  // Calls visit(Cell&) for the bytes [address, address + bytes).
  template <class F>
  void each(const void* address, int64_t bytes, F&& visit) {
    auto at = reinterpret_cast<uintptr_t>(address);
    const uintptr_t end = at + bytes;
    while (at < end) {
      Page& page = pages_[at / kPage];
      if (page.cells.empty()) page.cells.resize(kPage / page.grain);
      const uintptr_t stop = std::min<uintptr_t>(end, (at / kPage + 1) * kPage);
      if (page.grain > 1 && (at % page.grain || stop % page.grain)) split(page);
      for (; at < stop; at += page.grain) visit(page.cells[at % kPage / page.grain]);
    }
  }
  void forget(const void* address, int64_t bytes) {
    const auto start = reinterpret_cast<uintptr_t>(address);
    for (uintptr_t page = start / kPage; page <= (start + bytes - 1) / kPage; ++page) pages_.erase(page);
  }
  void clear() { pages_.clear(); }

 private:
  static constexpr uintptr_t kPage = 1024;
  struct Page {
    uintptr_t grain = 4;
    std::vector<Cell> cells;
  };
  static void split(Page& page) {
    std::vector<Cell> cells(kPage);
    for (uintptr_t i = 0; i < kPage; ++i) cells[i] = page.cells[i / page.grain];
    page.cells = std::move(cells);
    page.grain = 1;
  }
  std::unordered_map<uintptr_t, Page> pages_;
};

}  // namespace emulation
}  // namespace seqkernels
