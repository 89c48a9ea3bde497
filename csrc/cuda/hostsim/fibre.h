// SPDX-License-Identifier: Apache-2.0
// A fibre: a function with a stack of its own that runs until it suspends itself. x86-64, System V calls.
#pragma once

namespace turbo::hostsim {

class Fibre {
 public:
  using Body = void (*)(void* argument);

  /// Gets ready to run body(argument) on the stack that ends at `stack_end` (aligned to 16 bytes). Body must not
  /// return by an exception, and must not return at all: it suspends for good.
  void prepare(void* stack_end, Body body, void* argument);
  /// Runs the fibre until it suspends; called outside of it.
  void resume();
  /// Goes back to whoever resumed; called inside of it.
  void suspend();

 private:
  static void enter();

  void* own_ = nullptr;     // stack pointer while it does not run
  void* caller_ = nullptr;  // stack pointer of the one that resumed
  Body body_ = nullptr;
  void* argument_ = nullptr;
};

/// `count` stacks of one size, each with a page below it that no one may touch.
class Stacks {
 public:
  Stacks() = default;
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  /// Makes sure that there are `count`; those that exist are kept.
  void reserve(unsigned count);
  /// The end of stack `index`.
  void* end(unsigned index) const;

 private:
  char* memory_ = nullptr;
  unsigned count_ = 0;
};

}  // namespace turbo::hostsim
