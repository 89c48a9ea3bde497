// SPDX-License-Identifier: Apache-2.0
// Every function of device_sm90_ptx.h on the simulator.
#pragma once

#include <cstdint>

#include "../elements.h"
#include "block.h"
#include "sites.h"
#include "wgmma.h"

namespace turbo::cuda {

inline constexpr bool kHasWarpgroups = true;
inline void trap() { hostsim::block().fault("trap"); }

inline void async_proxy_fence(const From& from = From::current()) {
  if (!hostsim::left_out("async_proxy_fence", from)) hostsim::block().async_proxy_fence();
}
inline void barrier_init(uint32_t barrier, int count) {
  hostsim::block().barrier_init(barrier, static_cast<unsigned>(count));
}
inline void barrier_arrive(uint32_t barrier) { hostsim::block().barrier_arrive(barrier); }
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  hostsim::block().barrier_arrive_expect(barrier, static_cast<uint32_t>(bytes));
}
inline void barrier_arrive_copies(uint32_t barrier) { hostsim::block().barrier_arrive_copies(barrier); }
inline void barrier_wait(uint32_t barrier, uint32_t parity, const From& from = From::current()) {
  if (!hostsim::left_out("barrier_wait", from)) hostsim::block().barrier_wait(barrier, parity);
}
inline void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  hostsim::block().bulk_copy(to, reinterpret_cast<hostsim::Address>(from), static_cast<uint32_t>(bytes), barrier);
}
inline void bulk_copy_once(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  bulk_copy(to, from, bytes, barrier);
}

inline void wgmma_fence(const From& from = From::current()) {
  if (!hostsim::left_out("wgmma_fence", from)) hostsim::block().wgmma_fence();
}
inline void wgmma_commit() { hostsim::block().wgmma_commit(); }
template <int Pending>
void wgmma_wait(const From& from = From::current()) {
  if (!hostsim::left_out("wgmma_wait", from)) hostsim::block().wgmma_wait(Pending);
}
template <class T>
void pin(T&) {}

template <class T, int Columns>
void wgmma(T type, float (&d)[Columns][4], const uint32_t (&a)[4], uint64_t b) {
  hostsim::wgmma(half(type), &d[0][0], Columns, a, b);
}
template <int Columns>
void wgmma(S8, int32_t (&d)[Columns][4], const uint32_t (&a)[4], uint64_t b) {
  hostsim::wgmma(&d[0][0], Columns, a, b);
}

}  // namespace turbo::cuda
