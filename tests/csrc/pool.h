// SPDX-License-Identifier: Apache-2.0
// A thread pool of the plainest kind, so that sanitizers see every thread begin and end.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "parallel.h"

namespace test {

/// Runs the tasks on `Threads` fresh threads; every task once, in no order.
template <int Threads>
turbo::cpu::Parallel pool() {
  return {[](int64_t tasks, turbo::cpu::Parallel::Body body, void* context) {
            std::atomic<int64_t> next{0};
            const auto work = [&] {
              for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, context);
            };
            std::vector<std::thread> threads;
            for (int i = 1; i < Threads; ++i) threads.emplace_back(work);
            work();
            for (std::thread& thread : threads) thread.join();
          },
          Threads};
}

}  // namespace test
