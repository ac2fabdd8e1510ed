// Which access came before which. A thread knows, of every other thread, up to which moment of its life what it did is
// ordered before now; synchronisation passes that on (vector clocks). An access that is not known of is concurrent.
//
// Vectors would be long, and after a barrier they are all the same: so what a thread knows is one immutable object that
// many share, a page of clocks for each block it has heard of, and a page is shared until somebody knows more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace seqkernels {
namespace emulation {

using Clocks = std::vector<uint32_t>;                                          // of one block's threads
using Known = std::vector<std::pair<int64_t, std::shared_ptr<const Clocks>>>;  // by block, ascending
using Knowledge = std::shared_ptr<const Known>;

// A thread's place in time.
struct Clock {
  int64_t block = 0;
  uint32_t thread = 0, threads = 1;
  uint32_t now = 1;
  Knowledge known;
};

// Collects what several know.
class Join {
 public:
  void add(const Knowledge& known) {
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
  // All that the thread did until now; what it does next is a later moment.
  void add(Clock& clock) {
    add(clock.known);
    uint32_t& mine = owned(page_of(clock.block), clock.threads)[clock.thread];
    mine = std::max(mine, clock.now++);
  }
  Knowledge result() {
    auto known = std::make_shared<Known>();
    for (auto& [block, page] : pages_) {
      known->emplace_back(block, page.shared ? page.shared : std::make_shared<const Clocks>(page.own));
    }
    return known;
  }
  void clear() { *this = Join(); }
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
  Knowledge last_;
};

inline Knowledge moment(Clock& clock) {
  Join join;
  join.add(clock);
  return join.result();
}
inline void learn(Clock& clock, const Knowledge& known) {
  if (!known || known == clock.known) return;
  if (!clock.known) {
    clock.known = known;
    return;
  }
  Join join;
  join.add(clock.known);
  join.add(known);
  clock.known = join.result();
}

// Who touched a byte, and when.
struct Record {
  int64_t block = -1;
  uint32_t thread = 0, when = 0;
  const void* place = nullptr;
  bool atomic = false;
  explicit operator bool() const { return block >= 0; }
  bool before(const Clock& clock) const {
    if (block == clock.block && thread == clock.thread) return true;
    if (!clock.known) return false;
    const Known& known = *clock.known;
    const auto at =
        std::lower_bound(known.begin(), known.end(), block, [](auto& page, int64_t b) { return page.first < b; });
    return at != known.end() && at->first == block && (*at->second)[thread] >= when;
  }
};

// The last write of each byte, and two reads since: the first that is not ordered before the second, and the latest.
// Bytes are kept in groups of 4 until one is touched alone.
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
