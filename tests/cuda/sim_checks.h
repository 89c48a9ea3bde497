// SPDX-License-Identifier: Apache-2.0
// What the tests of the simulator share: named tests, device arrays, and the expectation of a fault.
#pragma once

#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "launch.h"

namespace test {

using namespace turbo::cuda;
namespace hostsim = turbo::hostsim;

inline int failures = 0;

struct Named {
  const char* name;
  void (*run)();
};
inline std::vector<Named>& all_tests() {
  static std::vector<Named> tests;
  return tests;
}
struct Register {
  Register(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

#define SIM_TEST(name)                                \
  void name();                                        \
  const test::Register registered_##name(#name, &name); \
  void name()

inline void check(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

/// An array in device memory.
template <class T>
class Device {
 public:
  explicit Device(size_t count, const char* name, size_t shift = 0)
      : count_(count), address_(hostsim::global_memory().allocate(count * sizeof(T), name, shift)) {}
  Device(const std::vector<T>& values, const char* name) : Device(values.size(), name) {
    hostsim::global_memory().copy_in(address_, values.data(), count_ * sizeof(T));
  }
  ~Device() { hostsim::global_memory().release(address_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* data() const { return reinterpret_cast<T*>(address_); }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    hostsim::global_memory().copy_out(out.data(), address_, count_ * sizeof(T));
    return out;
  }

 private:
  size_t count_;
  hostsim::Address address_;
};

struct Shape {
  unsigned blocks = 1, threads = 32;
  uint32_t shared = 4096;
};

inline void run(const Shape& shape, const std::function<void()>& body) {
  hostsim::launch({"test", {shape.blocks, 1, 1}, shape.threads, shape.shared}, body);
}

/// The launch must end in a fault whose message has every one of `parts`.
inline void expect_fault(const std::vector<std::string>& parts, const Shape& shape, const std::function<void()>& body) {
  try {
    run(shape, body);
  } catch (const hostsim::Fault& fault) {
    const std::string said = fault.what();
    for (const std::string& part : parts)
      check(said.find(part) != std::string::npos, "expected '" + part + "' in: " + said);
    return;
  }
  check(false, "no fault, expected one with '" + parts.front() + "'");
}

/// The launch must end without a fault.
inline void expect_clean(const Shape& shape, const std::function<void()>& body) {
  try {
    run(shape, body);
  } catch (const hostsim::Fault& fault) {
    check(false, std::string("expected no fault: ") + fault.what());
  }
}

}  // namespace test
