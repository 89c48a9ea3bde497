// SPDX-License-Identifier: Apache-2.0
// What all parts of the test program share: counters, and the instruction sets to run on.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "isa.h"

namespace test {

inline int failures = 0;
inline int64_t checks = 0;

inline void fail(const std::string& what) {
  std::printf("FAILED %s\n", what.c_str());
  if (++failures > 20) std::exit(1);
}

/// Calls run(isa) for every instruction set of this processor.
template <class Run>
void on_every_isa(const Run& run) {
  using namespace turbo::cpu;
  for (int i = 1; i < kIsas; ++i)
    if (isa_supported(static_cast<Isa>(i))) run(static_cast<Isa>(i));
}

}  // namespace test
