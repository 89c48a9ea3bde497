// SPDX-License-Identifier: Apache-2.0
// Hints to the system about the pages of large tensors. Where it refuses, nothing changes.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace turbo::cpu {

/// Calls advice on the whole pages of `page` bytes within [data, data + bytes).
inline void advise_pages(void* data, int64_t bytes, uintptr_t page, int advice) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

/// Before the first write: a stream of weights then misses the TLB once per 2 MiB.
inline void advise_huge_pages(void* data, int64_t bytes) {
  advise_pages(data, bytes, uintptr_t{2} << 20, MADV_HUGEPAGE);
}

/// Gives the pages back although the memory stays allocated; what was in them is lost.
inline void release_pages(void* data, int64_t bytes) { advise_pages(data, bytes, 4096, MADV_DONTNEED); }

}  // namespace turbo::cpu
