// The parts of torch's stable ABI that common/parallel.cpp uses, over std::thread: a new thread for every piece, which
// starts late by a random time.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <random>
#include <thread>
#include <vector>

namespace torch::stable {
inline uint32_t number_of_threads = 1;
inline uint32_t get_num_threads() { return number_of_threads; }
}  // namespace torch::stable

#define TORCH_ERROR_CODE_CHECK(call) static_cast<void>(call)

inline int torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                              void* context) {
  thread_local std::minstd_rand random{7};
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) {
    threads.emplace_back([=, delay = random() % 4 == 0 ? random() % 300 : 0] {
      if (delay > 0) usleep(delay);
      body(i, i + 1, context);
    });
  }
  body(begin, begin + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
