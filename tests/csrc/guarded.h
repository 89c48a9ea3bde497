// SPDX-License-Identifier: Apache-2.0
// Memory whose neighbours cannot be touched: exact buffers between pages without access.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace test {

/// Which end of the buffer touches a forbidden page; the rest of its last page holds a canary.
enum class Edge { begin, end };

/// `count` elements of T that start right after a forbidden page or end right before one.
template <class T>
class Guarded {
 public:
  Guarded(int64_t count, Edge edge) : count_(count), page_(sysconf(_SC_PAGESIZE)) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    inner_ = (bytes + page_ - 1) / page_ * page_;
    void* const map = mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) fail("mmap");
    base_ = static_cast<char*>(map);
    if (inner_ && mprotect(base_ + page_, inner_, PROT_READ | PROT_WRITE)) fail("mprotect");
    std::memset(base_ + page_, kCanary, inner_);
    data_ = base_ + page_ + (edge == Edge::begin ? 0 : inner_ - bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, inner_ + 2 * page_); }

  T* data() { return reinterpret_cast<T*>(data_); }
  const T* data() const { return reinterpret_cast<const T*>(data_); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }

  /// Nothing beside the elements was written in their own pages.
  bool canary_intact() const {
    const char* const end = data_ + count_ * sizeof(T);
    for (const char* p = base_ + page_; p < base_ + page_ + inner_; ++p)
      if ((p < data_ || p >= end) && static_cast<unsigned char>(*p) != kCanary) return false;
    return true;
  }

 private:
  static constexpr unsigned char kCanary = 0xA5;
  [[noreturn]] static void fail(const char* what) {
    std::perror(what);
    std::exit(2);
  }
  int64_t count_, page_, inner_ = 0;
  char* base_ = nullptr;
  char* data_ = nullptr;
};

}  // namespace test
