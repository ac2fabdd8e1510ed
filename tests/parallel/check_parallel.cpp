// Checks common/parallel: every share runs once per phase and after all shares of the phase before, whatever thread
// runs it and however late it comes. Built with ThreadSanitizer by test_parallel.py.
//
//   check_parallel [phases | tasks | fails | callers | fork]
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "common/parallel.h"
#include "torch/csrc/stable/ops.h"

using seqkernels::Phases;
using seqkernels::Region;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

// A recurrence over `phases` steps: x[t][share] = sum of x[t - 1] + share. Not atomic: a share that runs too early,
// twice or on two threads is a data race or a wrong sum.
void run_phases(int64_t threads, int64_t shares, int64_t phases, int64_t teams) {
  Region region(threads, 1e9);
  const auto claims = std::make_unique<Phases::Claim[]>(size_t(shares * teams));
  const auto of = std::make_unique<Phases[]>(size_t(teams));
  for (int64_t i = 0; i < teams; ++i) {
    of[size_t(i)].start(region, region.threads() == 1 ? nullptr : claims.get() + i * shares, shares);
  }
  std::vector<uint64_t> x(size_t(teams * 2 * shares), 1);
  auto body = [&](int64_t thread) {
    for (int64_t k = 0; k < teams; ++k) {
      const int64_t team = (thread + k) % teams;
      uint64_t* const mine = x.data() + team * 2 * shares;
      for (int64_t t = 0; t < phases; ++t) {
        of[size_t(team)].run(t, thread % shares, [&](int64_t share) {
          uint64_t sum = 0;
          for (int64_t i = 0; i < shares; ++i) sum += mine[(t % 2) * shares + i];
          if ((t + share) % 97 == 5) usleep(100);  // longer than the spin of a waiting thread
          mine[((t + 1) % 2) * shares + share] = sum * 3 + uint64_t(share);
        });
      }
    }
  };
  region.run(body);
  std::vector<uint64_t> expected(size_t(shares), 1), next(size_t(shares), 0);
  for (int64_t t = 0; t < phases; ++t) {
    uint64_t sum = 0;
    for (const uint64_t v : expected) sum += v;
    for (int64_t i = 0; i < shares; ++i) next[size_t(i)] = sum * 3 + uint64_t(i);
    expected.swap(next);
  }
  for (int64_t team = 0; team < teams; ++team) {
    const uint64_t* const last = x.data() + (team * 2 + phases % 2) * shares;
    require(std::memcmp(last, expected.data(), size_t(shares) * 8) == 0, "the recurrence has the right values");
  }
}

void check_phases() {
  for (const int64_t threads : {1, 2, 3, 4, 8, 16}) {
    for (const int64_t shares : {1, 2, 3, 16}) {
      for (const int64_t teams : {1, 3}) run_phases(threads, shares, 150, teams);
    }
  }
}

void check_tasks() {
  for (const int64_t threads : {1, 2, 4, 16}) {
    std::vector<int> count(1000, 0), of_thread(size_t(threads), 0);
    seqkernels::parallel_for(threads, 1000, 1e9, [&](int64_t thread, int64_t i) {
      ++count[size_t(i)];
      ++of_thread[size_t(thread)];
    });
    int sum = 0;
    for (const int n : count) require(n == 1, "every task runs once");
    for (const int n : of_thread) sum += n;
    require(sum == 1000, "no two threads have the same number");
  }
}

void check_fails() {
  for (const int64_t threads : {1, 2, 8}) {
    for (int64_t at = 0; at < 30; at += 7) {
      bool caught = false;
      try {
        seqkernels::parallel_for(threads, 30, 1e9, [&](int64_t, int64_t i) {
          if (i == at) throw std::runtime_error("task");
        });
      } catch (const std::runtime_error& error) {
        caught = std::strcmp(error.what(), "task") == 0;
      }
      require(caught, "the exception of a task reaches the caller");
    }
    bool caught = false;
    try {
      Region region(threads, 1e9);
      const auto claims = std::make_unique<Phases::Claim[]>(4);
      Phases phases;
      phases.start(region, region.threads() == 1 ? nullptr : claims.get(), 4);
      auto body = [&](int64_t thread) {
        for (int64_t t = 0; t < 10; ++t) {
          phases.run(t, thread % 4, [&](int64_t share) {
            if (t == 5 && share == 2) throw std::runtime_error("share");
          });
        }
      };
      region.run(body);
    } catch (const std::runtime_error& error) {
      caught = std::strcmp(error.what(), "share") == 0;
    }
    require(caught, "the exception of a share reaches the caller");
  }
}

void check_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([] { run_phases(4, 4, 100, 2); });
  for (std::thread& caller : callers) caller.join();
}

void check_fork() {
  std::thread other([] { usleep(200000); });
  const pid_t child = fork();
  if (child == 0) {  // has one thread: a region must not start others
    Region region(4, 1e9);
    _exit(region.threads() == 1 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child after fork uses one thread");
  other.join();
}

}  // namespace

int main(int count, char** arguments) {
  const char* const what = count > 1 ? arguments[1] : "";
  seqkernels::set_always_parallel(true);
  if (std::strcmp(what, "phases") == 0) {
    check_phases();
  } else if (std::strcmp(what, "tasks") == 0) {
    check_tasks();
  } else if (std::strcmp(what, "fails") == 0) {
    check_fails();
  } else if (std::strcmp(what, "callers") == 0) {
    check_callers();
  } else if (std::strcmp(what, "fork") == 0) {
    check_fork();
  } else {
    std::fprintf(stderr, "unknown check: %s\n", what);
    return 2;
  }
  std::puts("passed");
  return 0;
}
