#include "emulation.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "common/device.cuh"
#include "fibre.h"
#include "races.h"

// The address in the kernel from which this entry point was called.
#define SK_CALLER __builtin_return_address(0)

namespace seqkernels {
namespace emulation {

Thread* current = nullptr;
bool recording = false;

namespace {

constexpr int kWarp = 32;
constexpr int64_t kStaticShared = 48 * 1024;
constexpr int64_t kArenaAlign = 1024;

// Weakened calls.

struct Mutant {
  bool active = false;  // whether calls are compared or recorded
  bool recording = false;
  Weakening weakening = Weakening::kNone;
  std::set<const void*> weakened;
  std::map<const void*, Operation> sites;  // by the address after the call
};
Mutant mutant;

Weakening weakening_of(Operation operation, const void* caller) {
  if (!mutant.active) return Weakening::kNone;
  if (mutant.recording) mutant.sites[caller] = operation;
  return mutant.weakened.count(caller) ? mutant.weakening : Weakening::kNone;
}
bool removed(Operation operation, const void* caller) { return weakening_of(operation, caller) == Weakening::kRemoved; }

// Source locations and failures.

// Shortens "void seqkernels::(anonymous namespace)::f<float>(Args)" to f<float>.
std::string short_name(std::string name) {
  for (const std::string noise : {"void ", "seqkernels::", "(anonymous namespace)::"}) {
    for (size_t at = name.find(noise); at != std::string::npos; at = name.find(noise)) name.erase(at, noise.size());
  }
  if (name.empty() || name.back() != ')') return name;
  size_t open = name.size() - 1;
  for (int depth = 1; depth > 0 && open > 0;) {
    --open;
    depth += name[open] == ')' ? 1 : name[open] == '(' ? -1 : 0;
  }
  return name.substr(0, open);
}
// Makes a path relative to the source tree: the build removes this prefix, and debug information restores it.
std::string short_path(const std::string& path) {
  for (const char* root : {"/csrc/", "/tests/"}) {
    const size_t at = path.rfind(root);
    if (at != std::string::npos) return path.substr(at + 1);
  }
  return path;
}

// file:line of an address in a kernel, by binutils' addr2line: the innermost frame outside the emulation. With `name`,
// the name of the function that starts there.
std::string where(const void* address, bool name = false) {
  static std::map<std::pair<const void*, bool>, std::string> known;
  std::string& answer = known[{address, name}];
  if (!answer.empty()) return answer;
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_fname) return answer = "an unknown location";
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase) - (name ? 0 : 1);
  std::ostringstream fallback, command;
  fallback << info.dli_fname << "+0x" << std::hex << offset;
  answer = fallback.str();
  command << "LD_PRELOAD= addr2line -C -f -i -e '" << info.dli_fname << "' 0x" << std::hex << offset << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (!pipe) return answer;
  const auto line = [pipe] {
    std::string text;
    for (int c = fgetc(pipe); c != EOF && c != '\n'; c = fgetc(pipe)) text += static_cast<char>(c);
    return text;
  };
  bool found = false;
  for (std::string function = line(); !function.empty(); function = line()) {
    std::string location = line();
    location = location.substr(0, location.find(" ("));
    const auto is_of = [&](const char* file) { return location.find(file) != std::string::npos; };
    if (found || location.find('?') != std::string::npos) continue;
    if (!is_of("device_emulated.h") && !is_of("common/device.cuh") && !is_of("/include/c++/")) {
      found = true;
      answer = name ? short_name(function) : short_path(location);
    }
  }
  pclose(pipe);
  return answer;
}

// Thrown in a fibre; launch() reports it.
struct Failure {
  std::string what;
  const void* location;
};

std::string thread_name(int64_t block, int64_t thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

}  // namespace

// Synchronisation objects.

namespace {

struct Barrier {
  const char* kind = "";
  int64_t expected = 0, arrived = 0, phase = 0;
  int votes = 0, result = 0;
  bool same_place = true;  // all threads must wait at the same line
  const void* location = nullptr;
  std::vector<Thread*> waiting;
  ClockMerge join;
  ClockSnapshot known;  // at the end of the last phase
  void reset(const char* kind_, int64_t expected_, bool same_place_) {
    kind = kind_;
    expected = expected_;
    same_place = same_place_;
    arrived = phase = votes = 0;
    waiting.clear();
    join.clear();
    known = nullptr;
  }
};

// A warp operation in progress, by the lanes of one mask.
struct Collective {
  uint32_t mask = 0, arrived = 0;
  const char* kind = nullptr;
  const void* location = nullptr;
  std::array<void*, kWarp> operands{};
  std::vector<Thread*> waiting;
};
struct Warp {
  uint32_t lanes = 0, exited = 0;
  std::deque<Collective> collectives;
};

struct Delivery {
  char* to;
  const char* from;
  std::array<char, 16> value;
  int64_t bytes;
  Clock clock;
  ClockSnapshot known;
  const void* location;
};
struct SharedBarrier {
  int64_t expected = 0, pending = 0, bytes = 0, phase = 0;
  std::vector<Thread*> waiting;
  std::deque<Delivery> deliveries;
  ClockMerge join;
  ClockSnapshot known;
};

struct StaticArray {
  const void* key;
  char* start;
  int64_t bytes;
};

}  // namespace

struct Block {
  int64_t index = 0;
  int live = 0, threads = 0, cluster = 0;
  char* arena = nullptr;  // dynamic shared memory, followed by static
  int64_t static_used = 0;
  std::vector<StaticArray> statics;
  Barrier barrier;
  std::array<Barrier, 16> named;
  std::vector<Warp> warps;
};

struct Copy {
  char* to;
  std::array<char, 16> value;
  int bytes, group;
};

struct Thread::State {
  Fibre fibre;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool exited = false;
  const char* waits = nullptr;  // what the thread waits at, and where
  const void* location = nullptr;
  bool waits_for_lanes = false;  // waits for other lanes of the warp
  int64_t cluster_phase = 0;
  bool cluster_arrived = false;
  std::vector<Copy> copies;
  int copy_group = 0;
  int party = 0;
  const void* spins_on = nullptr;  // the address of the last ordered load, and the progress of the machine then
  int64_t spun_at = -1;
  std::unordered_map<const void*, int64_t> seen;  // with `stale`: the last version read at an address
  Clock clock;
  ClockMerge relaxed_reads;  // read by relaxed loads; fence() merges it into the clock
  ClockSnapshot fenced;      // the clock at the last fence, published by relaxed stores
};

namespace {

// A value of an address that ordered accesses share, and what its release ordered.
struct Version {
  uint64_t value;
  ClockSnapshot known;
  Record writer;
};

enum Schedule { kRoundRobin, kDepthFirst, kStarvation, kRandomPriorities };
constexpr uint64_t kMeanChange = 64;  // decisions of kRandomPriorities between changes of a priority

struct Machine {
  Stacks stacks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Thread::State>> states;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<char[]>> arenas;
  std::vector<Barrier> clusters;
  Barrier grid;
  std::unordered_map<const void*, SharedBarrier> shared_barriers;

  // Runnable threads: with kRoundRobin a FIFO, else one of each priority.
  Schedule schedule = kRoundRobin;
  std::deque<Thread*> in_turn;
  std::map<int, std::deque<Thread*>> ready;  // by priority, the lowest number first; no queue is empty
  std::vector<int> priorities;               // of parties
  int lowest = 0;                            // the largest number that was given to a priority
  std::vector<Thread*> spinning;             // threads that wait for a value, until there is progress
  int64_t live = 0, switches = 0;
  int64_t progress = 0;  // number of events that a thread may wait for
  int64_t spun_at = 0;   // the progress when the last thread began to spin
  int64_t idle = 0;      // number of yields since the last progress, with kRoundRobin
  Fibre host;

  const LaunchConfig* config = nullptr;
  int64_t dynamic_bytes = 0, arena_bytes = 0, resident = 0;
  bool races = false, unwritten = false, stale = false, stuck = false;
  uint64_t seed = 0;
  Call call = nullptr;
  void* context = nullptr;
  std::unique_ptr<Failure> failure;
  std::exception_ptr exception;

  Shadow shadow;
  std::unordered_map<const void*, std::vector<Version>> versions;  // by address; all with `stale`, else the last

  void advance() {
    idle = 0;
    ++progress;
  }
  uint64_t random() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 33;
  }
  void push(Thread* thread) {
    if (schedule == kRoundRobin) {
      in_turn.push_back(thread);
    } else {
      ready[priorities[thread->state->party]].push_back(thread);
    }
  }
  void wake_spinning() {
    if (spun_at == progress) return;
    for (Thread* thread : spinning) push(thread);
    spinning.clear();
  }
  // The next thread to run, or null.
  Thread* pop() {
    if (schedule == kRoundRobin) {
      if (in_turn.empty()) return nullptr;
      Thread* thread = in_turn.front();
      in_turn.pop_front();
      return thread;
    }
    wake_spinning();
    if (ready.empty()) return nullptr;
    if (schedule == kRandomPriorities && random() % kMeanChange == 0)
      lower(ready.begin()->second.front()->state->party);
    const auto first = ready.begin();
    Thread* thread = first->second.front();
    first->second.pop_front();
    if (first->second.empty()) ready.erase(first);
    return thread;
  }
  // Gives a party the lowest of all priorities.
  void lower(int party) {
    auto queue = ready.extract(priorities[party]);
    priorities[party] = queue.key() = ++lowest;
    ready.insert(std::move(queue));
  }
  void wake(std::vector<Thread*>& waiting) {
    if (seed) shuffle(waiting);
    for (Thread* thread : waiting) {
      thread->state->waits = nullptr;
      push(thread);
    }
    waiting.clear();
  }
  template <class T>
  void shuffle(std::vector<T>& list) {
    for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[random() % i]);
  }
};
Machine machine;
std::mutex launching;

Thread::State& self() { return *current->state; }

[[noreturn]] void fail(const std::string& what, const void* location) {
  throw Failure{what + " (" + thread_name(self().block->index, current->index) + ")", location};
}

// Scheduling.

void switch_to_next(Fibre& from) {
  Thread* next = machine.pop();
  if (next == nullptr) {
    machine.stuck = machine.live > 0;
    from.switch_to(machine.host);
    return;
  }
  if (next == current) return;
  ++machine.switches;
  current = next;
  from.switch_to(next->state->fibre);
}

void wait(const char* kind, const void* location) {
  Thread::State& me = self();
  me.waits = kind;
  me.location = location;
  switch_to_next(me.fibre);
}

void fibre_entry() {
  try {
    machine.call(machine.context);
  } catch (const Failure& failure) {
    machine.failure = std::make_unique<Failure>(failure);
  } catch (...) {
    machine.exception = std::current_exception();
  }
  Thread::State& me = self();
  if (machine.failure || machine.exception) me.fibre.switch_to(machine.host);
  me.exited = true;
  me.warp->exited |= 1u << me.lane;
  --me.block->live;
  --machine.live;
  machine.advance();
  switch_to_next(me.fibre);
  std::abort();  // a thread that has exited is never resumed
}

void check_same_location(const void*& first, const void* location, const char* kind) {
  if (first == location) return;
  if (where(first) != where(location)) {
    fail(std::string("divergent barrier: a thread waits at another ") + kind + ", " + where(first), location);
  }
}

void arrive(Barrier& barrier, const void* location, bool waits) {
  Thread::State& me = self();
  machine.advance();
  if (barrier.arrived == 0) {
    barrier.location = location;
  } else if (barrier.same_place) {
    check_same_location(barrier.location, location, barrier.kind);
  }
  if (machine.races) barrier.join.add(me.clock);
  if (++barrier.arrived < barrier.expected) {
    if (!waits) return;
    barrier.waiting.push_back(current);
    return wait(barrier.kind, location);
  }
  barrier.arrived = 0;
  ++barrier.phase;
  barrier.result = barrier.votes;
  barrier.votes = 0;
  if (machine.races) {
    barrier.known = barrier.join.result();
    barrier.join.clear();
    for (Thread* thread : barrier.waiting) thread->state->clock.known = barrier.known;
    if (waits) me.clock.known = barrier.known;
  }
  machine.wake(barrier.waiting);
}

std::string ranges(const std::vector<int>& sorted) {
  std::ostringstream text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    text << (i ? ", " : "") << sorted[i];
    if (j > i) text << "-" << sorted[j];
    i = j + 1;
  }
  return text.str();
}

// The report if no thread can run: which threads wait where.
std::string stuck_report() {
  bool divergent = false;
  std::ostringstream text;
  std::map<std::string, std::vector<int64_t>> blocks;  // by their report
  for (int64_t b = 0; b < machine.resident; ++b) {
    const Block& block = *machine.blocks[b];
    std::map<std::string, std::vector<int>> groups;
    for (int i = 0; i < block.threads; ++i) {
      const Thread::State& state = *machine.states[b * block.threads + i];
      if (state.exited) {
        groups["have exited"].push_back(i);
      } else if (state.waits) {
        groups[std::string("wait at ") + state.waits + ", " + where(state.location)].push_back(i);
        divergent |= state.waits == block.barrier.kind && block.live < block.threads;
        divergent |= state.waits_for_lanes;
      } else {
        groups["run"].push_back(i);
      }
    }
    std::ostringstream report;
    for (const auto& [what, threads] : groups) report << "\n    threads " << ranges(threads) << " " << what;
    blocks[report.str()].push_back(block.index);
  }
  for (const auto& [report, indices] : blocks) {
    text << "\n  block";
    for (size_t i = 0; i < indices.size() && i < 8; ++i) text << (i ? ", " : " ") << indices[i];
    if (indices.size() > 8) text << " and " << indices.size() - 8 << " more";
    text << ":" << report;
  }
  return std::string(divergent ? "divergent barrier: some threads never arrive"
                               : "deadlock: no thread can make progress") +
         text.str();
}

// Memory checks.

const char* kind_of(const void* address) {
  const auto* p = static_cast<const char*>(address);
  for (int64_t b = 0; b < machine.resident; ++b) {
    const char* arena = machine.blocks[b]->arena;
    if (p >= arena && p < arena + machine.arena_bytes) return "shared memory";
  }
  return "global memory";
}

[[noreturn]] void report_race(const Clock& clock, const void* address, const char* verb, const void* location,
                              const Record& other, const char* other_verb) {
  std::ostringstream text;
  text << "race in " << kind_of(address) << ": " << thread_name(clock.block, clock.thread) << " " << verb << " what "
       << thread_name(other.block, other.thread) << " " << other_verb << " at " << where(other.location)
       << ", and the two accesses are unordered";
  throw Failure{text.str(), location};
}

void record_access_by(Clock& clock, const void* address, int64_t bytes, Access access, const void* location) {
  const bool writes = access == Access::kWrite || access == Access::kAtomicWrite;
  const bool atomic = access == Access::kAtomicRead || access == Access::kAtomicWrite;
  const Record now{clock.block, clock.thread, clock.now, location, atomic};
  const bool wants_written = machine.unwritten && !writes && kind_of(address)[0] == 's';
  const auto concurrent = [&](const Record& other) {
    return machine.races && other && !(atomic && other.atomic) && !other.before(clock);
  };
  machine.shadow.each(address, bytes, [&](Shadow::Cell& cell) {
    if (wants_written && !cell.write) fail("a read of uninitialised shared memory", location);
    if (concurrent(cell.write)) {
      report_race(clock, address, writes ? "writes" : "reads", location, cell.write, "wrote");
    }
    if (!writes) {
      Record& read = !cell.first_read || cell.first_read.before(clock) ? cell.first_read : cell.last_read;
      read = now;
      return;
    }
    if (concurrent(cell.first_read)) report_race(clock, address, "writes", location, cell.first_read, "read");
    if (concurrent(cell.last_read)) report_race(clock, address, "writes", location, cell.last_read, "read");
    cell = {now, {}, {}};
  });
}

std::map<const char*, std::pair<int64_t, std::string>>& registered_arrays() {
  static std::map<const char*, std::pair<int64_t, std::string>> arrays;
  return arrays;
}

}  // namespace

// Launching.

std::map<std::string, int64_t>& settings() {
  static std::map<std::string, int64_t> all = [] {
    std::map<std::string, int64_t> defaults = {
        {"races", 0},           {"unwritten", 0},       {"backward", 0},        {"seed", 0},
        {"major", 9},           {"minor", 0},           {"multiprocessors", 8}, {"shared_bytes", 227 * 1024},
        {"l2_bytes", 50 << 20}, {"cluster_blocks", 16}, {"launches", 0},        {"threads", 0},
        {"switches", 0},        {"schedule", 0},        {"party", 0},           {"stale", 0}};
    std::istringstream words(std::getenv("SEQKERNELS_EMULATION") ? std::getenv("SEQKERNELS_EMULATION") : "");
    for (std::string word; std::getline(words, word, ',');) {
      const size_t equals = word.find('=');
      const std::string name = word.substr(0, equals);
      if (!defaults.count(name)) throw std::runtime_error("SEQKERNELS_EMULATION: unknown setting " + name);
      defaults[name] = equals == std::string::npos ? 1 : std::stoll(word.substr(equals + 1));
    }
    return defaults;
  }();
  return all;
}

int64_t resident_blocks(const LaunchConfig& config) {
  constexpr int64_t kThreads = 2048, kBlocks = 32, kReserved = 1024;
  const int64_t by_shared = (settings()["shared_bytes"] + kReserved) / (config.shared_bytes + kReserved);
  return settings()["multiprocessors"] * std::min({kThreads / config.block, kBlocks, by_shared});
}

namespace {

void check_config(const LaunchConfig& c) {
  const auto require = [](bool fits, const std::string& what) {
    if (!fits) throw Failure{"invalid configuration: " + what, nullptr};
  };
  const int64_t blocks = c.grid.x * c.grid.y * c.grid.z;
  require(c.grid.x < (int64_t{1} << 31) && c.grid.y < 65536 && c.grid.z < 65536, "the grid is too large");
  require(c.block >= 1 && c.block <= 1024, "a block has 1 to 1024 threads");
  require(c.shared_bytes >= 0 && c.shared_bytes <= settings()["shared_bytes"],
          "a block has at most " + std::to_string(settings()["shared_bytes"]) + " bytes of shared memory");
  require(c.cluster >= 1 && c.cluster <= settings()["cluster_blocks"] && c.grid.x % c.cluster == 0,
          "a cluster has 1 to " + std::to_string(settings()["cluster_blocks"]) + " blocks and divides the grid");
  require(c.cluster == 1 || settings()["major"] >= 9, "clusters need compute capability 9.0");
  require(
      !c.cooperative || blocks <= resident_blocks(c),
      "a cooperative grid has at most the " + std::to_string(resident_blocks(c)) + " blocks that are resident at once");
}

// Sets the priorities of the parties, blocks or warps.
void set_priorities(int64_t parties, bool backward) {
  Machine& m = machine;
  m.priorities.assign(parties, 0);
  m.lowest = 1;
  if (m.schedule == kStarvation) {
    m.priorities[settings()["seed"] % parties] = 1;
  } else if (m.schedule != kRoundRobin) {
    for (int64_t p = 0; p < parties; ++p) m.priorities[p] = static_cast<int>(backward ? parties - p : p);
    if (m.seed) m.shuffle(m.priorities);
    m.lowest = static_cast<int>(parties);
  }
}

// Resets blocks [first, first + n) to their start.
void start_blocks(int64_t first, int64_t n, const LaunchConfig& c) {
  Machine& m = machine;
  m.resident = n;
  m.shared_barriers.clear();
  m.in_turn.clear();
  m.ready.clear();
  m.spinning.clear();
  m.idle = m.progress = m.spun_at = 0;
  m.live = n * c.block;
  const int64_t warps = (c.block + kWarp - 1) / kWarp;
  const bool warp_parties = settings()["party"] != 0;
  set_priorities(warp_parties ? n * warps : n, settings()["backward"] != 0);
  m.grid.reset("a grid barrier", m.live, true);
  m.clusters.resize(n / c.cluster);
  for (Barrier& barrier : m.clusters) barrier.reset("a cluster barrier", int64_t{c.cluster} * c.block, false);
  std::vector<Thread*> threads;
  for (int64_t b = 0; b < n; ++b) {
    Block& block = *m.blocks[b];
    block.index = first + b;
    block.live = block.threads = c.block;
    block.cluster = static_cast<int>(b / c.cluster);
    block.barrier.reset("a block barrier", c.block, true);
    for (Barrier& barrier : block.named) barrier.reset("a named barrier", 0, false);
    block.static_used = 0;
    block.statics.clear();
    memset(block.arena, 0xff, m.dynamic_bytes);
    if (recording) m.shadow.forget(block.arena, m.arena_bytes);
    block.warps.resize((c.block + kWarp - 1) / kWarp);
    for (size_t w = 0; w < block.warps.size(); ++w) {
      const int lanes = std::min<int>(kWarp, c.block - static_cast<int>(w) * kWarp);
      block.warps[w].lanes = lanes == kWarp ? ~0u : (1u << lanes) - 1;
      block.warps[w].exited = 0;
      block.warps[w].collectives.clear();
    }
    for (int i = 0; i < c.block; ++i) {
      const int64_t at = b * c.block + i;
      Thread& thread = *m.threads[at];
      Thread::State& state = *m.states[at];
      thread = {i,
                block.index % c.grid.x,
                block.index / c.grid.x % c.grid.y,
                block.index / c.grid.x / c.grid.y,
                c.grid.x,
                c.grid.y,
                c.grid.z,
                c.block,
                static_cast<int>(block.index % c.grid.x % c.cluster),
                c.cluster,
                &state};
      state.block = &block;
      state.warp = &block.warps[i / kWarp];
      state.party = static_cast<int>(warp_parties ? b * warps + i / kWarp : b);
      state.spins_on = nullptr;
      state.spun_at = -1;
      state.seen.clear();
      state.lane = i % kWarp;
      state.exited = state.cluster_arrived = false;
      state.waits = nullptr;
      state.waits_for_lanes = false;
      state.copies.clear();
      state.copy_group = 0;
      if (recording) {
        state.clock = {block.index, static_cast<uint32_t>(i), static_cast<uint32_t>(c.block), 1, nullptr};
        state.relaxed_reads.clear();
        state.fenced = nullptr;
      }
      state.fibre.reset(m.stacks[at], Stacks::bytes(at), fibre_entry);
      threads.push_back(&thread);
    }
  }
  if (settings()["backward"]) std::reverse(threads.begin(), threads.end());
  if (m.seed) m.shuffle(threads);
  for (Thread* thread : threads) m.push(thread);
}

void run_blocks() {
  current = machine.pop();
  machine.host.switch_to(current->state->fibre);
  if (machine.exception) std::rethrow_exception(machine.exception);
  if (machine.failure) throw *machine.failure;
  if (machine.stuck) throw Failure{stuck_report(), nullptr};
  for (const auto& [address, barrier] : machine.shared_barriers) {
    if (!barrier.deliveries.empty()) {
      throw Failure{"a block exits before an asynchronous write to it arrives, issued", barrier.deliveries[0].location};
    }
  }
}

}  // namespace

void run(const LaunchConfig& config, const void* kernel, Call call, void* context) {
  const int64_t blocks = config.grid.x * config.grid.y * config.grid.z;
  if (blocks == 0) return;
  const std::lock_guard<std::mutex> lock(launching);
  Machine& m = machine;
  try {
    check_config(config);
    m.config = &config;
    m.stale = settings()["stale"] != 0;
    m.races = m.stale || settings()["races"] != 0;
    m.unwritten = settings()["unwritten"] != 0;
    recording = m.races || m.unwritten;
    m.seed = static_cast<uint64_t>(settings()["seed"]);
    m.schedule = static_cast<Schedule>(settings()["schedule"]);
    m.failure = nullptr;
    m.exception = nullptr;
    m.stuck = false;
    m.call = call;
    m.context = context;
    m.dynamic_bytes = config.shared_bytes;
    const int64_t n = config.cooperative ? blocks : config.cluster;
    m.arena_bytes = (m.dynamic_bytes + kArenaAlign - 1) / kArenaAlign * kArenaAlign + kStaticShared;
    m.arenas.clear();
    while (static_cast<int64_t>(m.blocks.size()) < n) m.blocks.push_back(std::make_unique<Block>());
    while (static_cast<int64_t>(m.threads.size()) < n * config.block) {
      m.threads.push_back(std::make_unique<Thread>());
      m.states.push_back(std::make_unique<Thread::State>());
    }
    for (int64_t b = 0; b < n; ++b) {
      m.arenas.emplace_back(new char[m.arena_bytes + kArenaAlign]);
      const auto start = reinterpret_cast<uintptr_t>(m.arenas.back().get());
      m.blocks[b]->arena = reinterpret_cast<char*>((start + kArenaAlign - 1) / kArenaAlign * kArenaAlign);
    }
    m.shadow.clear();
    m.versions.clear();
    const int64_t switches = m.switches;
    for (int64_t b = 0; b < blocks; b += n) {
      start_blocks(b, n, config);
      run_blocks();
    }
    ++settings()["launches"];
    settings()["threads"] += blocks * config.block;
    settings()["switches"] += m.switches - switches;
  } catch (const Failure& failure) {
    current = nullptr;
    throw std::runtime_error("CUDA on a CPU: " + failure.what +
                             (failure.location ? ", at " + where(failure.location) : std::string()) + "; in " +
                             config.text(where(kernel, /*name=*/true)));
  }
  current = nullptr;
}

// Memory.

void record_access(const void* address, int64_t bytes, Access access) {
  record_access_by(self().clock, address, bytes, access, SK_CALLER);
}

void out_of_bounds(const char* what, int64_t i, int64_t n, int64_t count, int64_t element_bytes) {
  std::ostringstream text;
  text << "out of bounds: element " << i;
  if (n > 1) text << " to " << i + n - 1;
  text << " of an array of " << count << " elements of " << element_bytes << " bytes in " << what;
  fail(text.str(), SK_CALLER);
}

void misaligned(const char* what, const void* address, int64_t bytes) {
  std::ostringstream text;
  text << "misaligned: " << bytes << " bytes at once at address " << address << " in " << what;
  fail(text.str(), SK_CALLER);
}

void register_array(const void* address, int64_t bytes, const char* name) {
  registered_arrays()[static_cast<const char*>(address)] = {bytes, name};
}
void unregister_array(const void* address) { registered_arrays().erase(static_cast<const char*>(address)); }

void check_registered(const void* address, int64_t bytes) {
  const auto& arrays = registered_arrays();
  if (arrays.empty() || bytes <= 0) return;
  const char* p = static_cast<const char*>(address);
  auto at = arrays.upper_bound(p);
  if (at == arrays.begin()) fail("out of bounds: a pointer outside all registered arrays", SK_CALLER);
  --at;
  const auto& [size, name] = at->second;
  if (p + bytes <= at->first + size) return;
  std::ostringstream text;
  text << "out of bounds: " << bytes << " bytes from byte " << p - at->first << " of " << name << ", which has "
       << size;
  fail(text.str(), SK_CALLER);
}

char* dynamic_shared(int64_t offset, int64_t bytes) {
  if (offset + bytes > machine.dynamic_bytes) {
    std::ostringstream text;
    text << "out of bounds: an array of " << bytes << " bytes from byte " << offset << " of " << machine.dynamic_bytes
         << " bytes of dynamic shared memory";
    fail(text.str(), SK_CALLER);
  }
  return self().block->arena + offset;
}

namespace {
StaticArray& static_of(Block& block, const void* key, int64_t bytes, const void* location) {
  for (StaticArray& known : block.statics) {
    if (known.key == key) return known;
  }
  char* start = block.arena + machine.arena_bytes - kStaticShared + block.static_used;
  block.static_used += (bytes + 15) / 16 * 16;
  if (block.static_used > kStaticShared) fail("more than 48 KiB of static shared memory", location);
  memset(start, 0xff, bytes);
  block.statics.push_back({key, start, bytes});
  return block.statics.back();
}
}  // namespace

char* static_shared(const void* key, int64_t bytes) { return static_of(*self().block, key, bytes, SK_CALLER).start; }

char* peer_shared(char* mine, int rank) {
  Block& block = *self().block;
  if (rank < 0 || rank >= current->cluster_blocks) fail("remote: no such block in the cluster", SK_CALLER);
  Block& peer = *machine.blocks[block.cluster * current->cluster_blocks + rank];
  if (mine >= block.arena && mine <= block.arena + machine.dynamic_bytes) return peer.arena + (mine - block.arena);
  for (const StaticArray& array : block.statics) {
    if (mine >= array.start && mine < array.start + array.bytes) {
      return static_of(peer, array.key, array.bytes, SK_CALLER).start + (mine - array.start);
    }
  }
  fail("remote: not shared memory of this block", SK_CALLER);
}

void check_peer(const void* address) {
  const auto* p = static_cast<const char*>(address);
  const int first = self().block->cluster * current->cluster_blocks;
  for (int b = first; b < first + current->cluster_blocks; ++b) {
    const Block& block = *machine.blocks[b];
    if (p < block.arena || p >= block.arena + machine.arena_bytes) continue;
    if (block.live > 0) return;
    fail("shared memory of block " + std::to_string(block.index) + ", which has exited", SK_CALLER);
  }
}

// Memory ordering.

int block_barrier(const char* kind, bool predicate) {
  if (removed(Operation::kBlockBarrier, SK_CALLER)) return predicate;
  Barrier& barrier = self().block->barrier;
  (void)kind;
  barrier.votes += predicate;
  arrive(barrier, SK_CALLER, true);
  return self().block->barrier.result;
}

void named_barrier(int id, int threads, bool wait) {
  if (removed(Operation::kNamedBarrier, SK_CALLER)) return;
  if (id < 1 || id > 15) fail("named barriers are 1 to 15", SK_CALLER);
  if (threads % kWarp) fail("a named barrier counts whole warps", SK_CALLER);
  Barrier& barrier = self().block->named[id];
  if (barrier.arrived > 0 && barrier.expected != threads) fail("a named barrier with two counts", SK_CALLER);
  barrier.expected = threads;
  arrive(barrier, SK_CALLER, wait);
}

namespace {
void arrive_at_cluster(const void* location) {
  Thread::State& me = self();
  Barrier& barrier = machine.clusters[me.block->cluster];
  if (me.cluster_arrived) fail("cluster_arrive twice without cluster_wait", location);
  me.cluster_arrived = true;
  me.cluster_phase = barrier.phase;
  arrive(barrier, location, false);
}

void wait_for_cluster(const void* location) {
  Thread::State& me = self();
  Barrier& barrier = machine.clusters[me.block->cluster];
  if (!me.cluster_arrived) fail("cluster_wait without cluster_arrive", location);
  me.cluster_arrived = false;
  if (barrier.phase == me.cluster_phase) {
    barrier.waiting.push_back(current);
    wait(barrier.kind, location);
  } else if (machine.races) {
    merge_clock(me.clock, barrier.known);
  }
}
}  // namespace

void cluster_barrier_arrive() { arrive_at_cluster(SK_CALLER); }
void cluster_barrier_wait() { wait_for_cluster(SK_CALLER); }
void cluster_barrier() {
  if (removed(Operation::kClusterBarrier, SK_CALLER)) return;
  arrive_at_cluster(SK_CALLER);
  wait_for_cluster(SK_CALLER);
}

void grid_barrier() {
  if (removed(Operation::kGridBarrier, SK_CALLER)) return;
  if (!machine.config->cooperative) fail("grid_sync needs a cooperative launch", SK_CALLER);
  arrive(machine.grid, SK_CALLER, true);
}

namespace {

// Waits until there is progress, with the schedules that have priorities.
void spin(const char* why, const void* location) {
  machine.wake_spinning();
  machine.spinning.push_back(current);
  machine.spun_at = machine.progress;
  wait(why, location);
  self().waits = nullptr;
}

// Runs the other threads that can run.
void yield_at(const char* why, const void* location) {
  constexpr int64_t kPatience = 100000, kRounds = 200;
  if (machine.schedule == kRoundRobin && ++machine.idle > kPatience + kRounds * machine.live) {
    machine.stuck = true;
    self().waits = why;
    self().location = location;
    self().fibre.switch_to(machine.host);
  }
  machine.push(current);
  wait(why, location);
  self().waits = nullptr;
}

// Runs other threads before a load at this address: with priorities, only if there was no progress since the last one.
void yield_before(const void* address, const char* why, const void* location) {
  if (machine.schedule == kRoundRobin) return yield_at(why, location);
  Thread::State& me = self();
  if (me.spins_on == address && me.spun_at == machine.progress) spin(why, location);
  me.spins_on = address;
  me.spun_at = machine.progress;
}

uint64_t value_at(const void* address, int bytes) {
  uint64_t value = 0;
  memcpy(&value, address, bytes);
  return value;
}

// The version that a load returns with `stale`: the oldest that neither this thread nor what is ordered before it has
// read or overwritten, and with each repetition the next.
const Version& oldest_version(const std::vector<Version>& versions, const void* address) {
  Thread::State& me = self();
  const auto known = me.seen.find(address);
  const int64_t last = static_cast<int64_t>(versions.size()) - 1;
  int64_t at = known == me.seen.end() ? 0 : std::min(known->second + 1, last);
  for (int64_t i = last; i > at; --i) {
    if (versions[i].writer.before(me.clock)) at = i;
  }
  me.seen[address] = at;
  if (at < last) me.spun_at = -1;  // the next load may return another value
  return versions[at];
}

}  // namespace

void yield(const char* why) {
  if (machine.schedule == kRoundRobin) yield_at(why, SK_CALLER);  // else the loads spin
}

namespace {
uint64_t ordered_load_at(const void* address, int bytes, Acquire how, const void* location) {
  if (how != Acquire::kUpdate) yield_before(address, "a flag", location);
  if (recording) record_access_by(self().clock, address, bytes, Access::kAtomicRead, location);
  const uint64_t latest = value_at(address, bytes);
  const auto found = machine.versions.find(address);
  if (!machine.races || found == machine.versions.end()) return latest;
  const std::vector<Version>& all = found->second;
  // A plain write since the last ordered one ends the history.
  const bool stale = machine.stale && how != Acquire::kUpdate && all.back().value == latest;
  const Version& version = stale ? oldest_version(all, address) : all.back();
  if (version.known && how == Acquire::kAcquire) merge_clock(self().clock, version.known);
  if (version.known && how != Acquire::kAcquire) self().relaxed_reads.add(version.known);
  return stale ? version.value : latest;
}
}  // namespace

uint64_t ordered_load(const void* address, int bytes, Acquire how) {
  return ordered_load_at(address, bytes, how, SK_CALLER);
}

void wait_acquire(const void* address, int bytes, uint64_t wanted) {
  const void* location = SK_CALLER;
  const Weakening weakening = weakening_of(Operation::kWait, location);
  if (weakening == Weakening::kRemoved) return;
  if (weakening == Weakening::kOneLess && wanted > 0) --wanted;
  const Acquire how = weakening == Weakening::kRelaxed ? Acquire::kRelaxed : Acquire::kAcquire;
  while (ordered_load_at(address, bytes, how, location) < wanted) {
  }
}

int slot(int slot) { return weakening_of(Operation::kSlot, SK_CALLER) == Weakening::kOther ? 1 - slot : slot; }

void ordered_store(void* address, int bytes, uint64_t value, Release how) {
  const void* location = SK_CALLER;
  const bool publishes = how == Release::kStore || how == Release::kUpdate;
  const Weakening weakening = weakening_of(publishes ? Operation::kPublish : Operation::kUpdate, location);
  if (weakening == Weakening::kRemoved) return;
  if (weakening == Weakening::kRelaxed) {
    how = how == Release::kStore ? Release::kRelaxedStore : how == Release::kUpdate ? Release::kRelaxedUpdate : how;
  }
  Thread::State& me = self();
  if (recording) record_access_by(me.clock, address, bytes, Access::kAtomicWrite, location);
  machine.advance();
  if (machine.races) {
    const bool ordered = how == Release::kStore || how == Release::kUpdate;
    const bool updates = how == Release::kRelaxedUpdate || how == Release::kUpdate;
    std::vector<Version>& all = machine.versions[address];
    const uint64_t latest = value_at(address, bytes);
    if (all.empty() || all.back().value != latest) all.assign({{latest, nullptr, {}}});
    Version version{value, nullptr, {me.clock.block, me.clock.thread, me.clock.now, location, true}};
    ClockMerge join;
    if (updates) join.add(all.back().known);
    join.add(ordered ? snapshot(me.clock) : me.fenced);
    if (!join.empty()) version.known = join.result();
    if (!machine.stale) all.clear();
    all.push_back(std::move(version));
    if (machine.stale) me.seen[address] = static_cast<int64_t>(all.size()) - 1;
  }
  memcpy(address, &value, bytes);
  if (machine.schedule == kRandomPriorities) yield_at("a store", location);
}

void fence() {
  if (removed(Operation::kFence, SK_CALLER)) return;
  if (!machine.races) return;
  Thread::State& me = self();
  if (!me.relaxed_reads.empty()) merge_clock(me.clock, me.relaxed_reads.result());
  me.relaxed_reads.clear();
  me.fenced = snapshot(me.clock);
}

// Warps.

void collective(const char* kind, uint32_t mask, void* operand, Perform perform) {
  if (perform == nullptr && removed(Operation::kWarpBarrier, SK_CALLER)) return;
  Thread::State& me = self();
  Warp& warp = *me.warp;
  const uint32_t mine = 1u << me.lane, needed = mask & warp.lanes;
  if (!(mask & mine)) fail(std::string(kind) + " with a mask that lacks the own lane", SK_CALLER);
  if (needed & warp.exited) fail(std::string("divergent barrier: ") + kind + " with lanes that have exited", SK_CALLER);
  machine.advance();
  Collective* all = nullptr;
  for (Collective& c : warp.collectives) {
    if (c.mask == mask) all = &c;
  }
  if (!all) {
    warp.collectives.emplace_back();
    all = &warp.collectives.back();
    all->mask = mask;
  }
  if (all->arrived == 0) {
    all->kind = kind;
    all->location = SK_CALLER;
  } else if (strcmp(all->kind, kind) != 0) {
    fail(std::string("divergent barrier: ") + kind + " while other lanes of the mask are at " + all->kind + ", " +
             where(all->location),
         SK_CALLER);
  }
  all->operands[me.lane] = operand;
  all->arrived |= mine;
  if (all->arrived != needed) {
    all->waiting.push_back(current);
    me.waits_for_lanes = true;
    wait(kind, SK_CALLER);
    me.waits_for_lanes = false;
    return;
  }
  if (perform) {
    perform(all->operands.data());
  } else if (machine.races) {
    ClockMerge join;
    for (Thread* thread : all->waiting) join.add(thread->state->clock);
    join.add(me.clock);
    me.clock.known = join.result();
    for (Thread* thread : all->waiting) thread->state->clock.known = me.clock.known;
  }
  all->arrived = 0;
  all->operands.fill(nullptr);
  machine.wake(all->waiting);
}

// Asynchronous copies.

// Reads the source immediately but writes the target only in copy_async_wait; until then the target holds NaN.
void copy_async(char* to, const char* from, int bytes, int valid_bytes) {
  Copy copy{to, {}, bytes, self().copy_group};
  if (valid_bytes > 0) memcpy(copy.value.data(), from, valid_bytes);
  memset(to, 0xff, bytes);
  self().copies.push_back(copy);
}

void copy_async_commit() { ++self().copy_group; }

void copy_async_wait(int pending) {
  const Weakening weakening = weakening_of(Operation::kCopies, SK_CALLER);
  if (weakening == Weakening::kRemoved) return;
  if (weakening == Weakening::kOneLess) ++pending;
  Thread::State& me = self();
  auto done = me.copies.begin();
  for (; done != me.copies.end() && done->group < me.copy_group - pending; ++done) {
    if (recording) record_access_by(me.clock, done->to, done->bytes, Access::kWrite, SK_CALLER);
    memcpy(done->to, done->value.data(), done->bytes);
  }
  me.copies.erase(me.copies.begin(), done);
}

// Barriers in shared memory.

namespace {

SharedBarrier& shared_barrier(const void* address, const void* location) {
  const auto at = machine.shared_barriers.find(address);
  if (at == machine.shared_barriers.end()) fail("an mbarrier that was not initialised", location);
  return at->second;
}

void finish_phase(SharedBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  if (machine.races) {
    barrier.known = barrier.join.result();
    for (Thread* thread : barrier.waiting) merge_clock(thread->state->clock, barrier.known);
  }
  machine.wake(barrier.waiting);
}

void deliver(SharedBarrier& barrier) {
  while (!barrier.deliveries.empty()) {
    Delivery d = std::move(barrier.deliveries.front());
    barrier.deliveries.pop_front();
    if (recording) {
      if (d.from) record_access_by(d.clock, d.from, d.bytes, Access::kRead, d.location);
      record_access_by(d.clock, d.to, d.bytes, Access::kWrite, d.location);
    }
    memcpy(d.to, d.from ? d.from : d.value.data(), d.bytes);
    if (machine.races) barrier.join.add(d.known);
    barrier.bytes -= d.bytes;
    finish_phase(barrier);
  }
}

bool phase_over(SharedBarrier& barrier, int parity) {
  deliver(barrier);
  if ((barrier.phase & 1) == (parity & 1)) return false;
  if (machine.races) merge_clock(self().clock, barrier.known);
  return true;
}

}  // namespace

void mbarrier_init(const void* address, int arrivals) {
  if (arrivals < 1) fail("an mbarrier waits for at least one arrival", SK_CALLER);
  SharedBarrier& barrier = machine.shared_barriers[address];
  barrier = SharedBarrier();
  barrier.expected = barrier.pending = arrivals;
}

void mbarrier_arrive(const void* address, int64_t expect_bytes) {
  if (removed(Operation::kArrive, SK_CALLER)) return;
  SharedBarrier& barrier = shared_barrier(address, SK_CALLER);
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than its phase expects", SK_CALLER);
  machine.advance();
  if (machine.races) barrier.join.add(self().clock);
  barrier.bytes += expect_bytes;
  --barrier.pending;
  finish_phase(barrier);
}

void mbarrier_wait(const void* address, int parity) {
  const Weakening weakening = weakening_of(Operation::kPhase, SK_CALLER);
  if (weakening == Weakening::kRemoved) return;
  if (weakening == Weakening::kOneLess) parity ^= 1;
  SharedBarrier& barrier = shared_barrier(address, SK_CALLER);
  while (!phase_over(barrier, parity)) {
    barrier.waiting.push_back(current);
    wait("an mbarrier", SK_CALLER);
  }
}

void deliver_async(char* to, const char* from, const void* value, int64_t bytes, const void* address) {
  if (removed(Operation::kDelivery, SK_CALLER)) return;
  SharedBarrier& barrier = shared_barrier(address, SK_CALLER);
  machine.advance();
  Delivery delivery{to, from, {}, bytes, {}, nullptr, SK_CALLER};
  if (value) memcpy(delivery.value.data(), value, bytes);
  if (recording) {
    delivery.clock = self().clock;
    if (machine.races) delivery.known = snapshot(self().clock);
  }
  barrier.deliveries.push_back(std::move(delivery));
  if (!barrier.waiting.empty()) deliver(barrier);
}

}  // namespace emulation
}  // namespace seqkernels

// Settings, for Python through ctypes.

#define SK_EXPORT extern "C" __attribute__((visibility("default")))
// Returns the previous value, or -1 for an unknown name.
SK_EXPORT int64_t seqkernels_emulation_set(const char* name, int64_t value) {
  auto& all = seqkernels::emulation::settings();
  const auto at = all.find(name);
  return at == all.end() ? -1 : std::exchange(at->second, value);
}
SK_EXPORT int64_t seqkernels_emulation_get(const char* name) {
  const auto& all = seqkernels::emulation::settings();
  const auto at = all.find(name);
  return at == all.end() ? -1 : at->second;
}

// Weakened calls, for mutants.py. Addresses are relative to the start of the module.
namespace {
const char* module_start() {
  static const char* start = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&seqkernels_emulation_get), &info);
    return static_cast<const char*>(info.dli_fbase);
  }();
  return start;
}
}  // namespace
// Starts to record the addresses of synchronising calls.
SK_EXPORT void seqkernels_emulation_record_sites() {
  auto& mutant = seqkernels::emulation::mutant;
  mutant = {};
  mutant.active = mutant.recording = true;
}
// Ends the recording. Writes up to `count` addresses and operations and returns how many there are.
SK_EXPORT int64_t seqkernels_emulation_sites(int64_t* addresses, int64_t* operations, int64_t count) {
  auto& mutant = seqkernels::emulation::mutant;
  int64_t at = 0;
  for (const auto& [address, operation] : mutant.sites) {
    if (at < count) {
      addresses[at] = static_cast<const char*>(address) - module_start();
      operations[at] = static_cast<int64_t>(operation);
    }
    ++at;
  }
  mutant.active = mutant.recording = false;
  return at;
}
// Weakens the calls at these addresses; count = 0 ends it.
SK_EXPORT void seqkernels_emulation_weaken(const int64_t* addresses, int64_t count, int weakening) {
  auto& mutant = seqkernels::emulation::mutant;
  mutant = {};
  mutant.active = count > 0;
  mutant.weakening = static_cast<seqkernels::emulation::Weakening>(weakening);
  for (int64_t i = 0; i < count; ++i) mutant.weakened.insert(module_start() + addresses[i]);
}
