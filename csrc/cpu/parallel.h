// SPDX-License-Identifier: Apache-2.0
// How kernels get threads: from the caller's pool, so that no second one ever exists.
#pragma once

#include <cstdint>

namespace turbo::cpu {

/// A caller's thread pool. `run` calls body(task, context) once for every task in [0, tasks),
/// on at most `threads` threads at once, and returns when all are done.
struct Parallel {
  using Body = void (*)(int64_t task, void* context);
  void (*run)(int64_t tasks, Body body, void* context);
  int64_t threads;

  /// Runs callable(task) for every task in [0, tasks).
  template <class Callable>
  void operator()(int64_t tasks, const Callable& callable) const {
    run(
        tasks, [](int64_t task, void* context) { (*static_cast<const Callable*>(context))(task); },
        const_cast<void*>(static_cast<const void*>(&callable)));
  }
};

/// [begin, end) of part `index` when `count` items are cut into `parts` near-equal ranges.
struct Range {
  int64_t begin, end;
};
[[gnu::always_inline]] inline Range part(int64_t count, int64_t parts, int64_t index) {
  return {count * index / parts, count * (index + 1) / parts};
}

}  // namespace turbo::cpu
