// SPDX-License-Identifier: Apache-2.0
// device.h for a C++ compiler: every function of device_ptx.h on the simulator.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../elements.h"
#include "block.h"
#include "floats.h"
#include "instructions.h"
#include "sites.h"

#define TM_DEVICE inline
#define TM_UNROLL
#define TM_NO_UNROLL

namespace turbo::cuda {

inline int thread_index() { return static_cast<int>(hostsim::block().thread_index()); }
inline int block_index_x() { return static_cast<int>(hostsim::block().index(0)); }
inline int block_index_y() { return static_cast<int>(hostsim::block().index(1)); }

/// Where a function was called from; no argument of it under nvcc.
using From = std::source_location;
inline void sync_threads(const From& from = From::current()) {
  if (!hostsim::left_out("sync_threads", from)) hostsim::block().sync_threads();
}
inline void sync_warp(const From& from = From::current()) {
  if (!hostsim::left_out("sync_warp", from)) hostsim::block().sync_warp();
}
inline void thread_fence(const From& from = From::current()) {
  if (!hostsim::left_out("thread_fence", from)) hostsim::block().fence();
}

template <class T>
T load_global(const T* at) {
  T v;
  hostsim::block().load_global(reinterpret_cast<hostsim::Address>(at), &v, sizeof v);
  return v;
}
template <class T>
T load_global_volatile(const T* at) {
  return load_global(at);
}
template <class T>
void store_global(T* at, T value) {
  hostsim::block().store_global(reinterpret_cast<hostsim::Address>(at), &value, sizeof value);
}
inline uint32_t atomic_add(uint32_t* at, uint32_t value) {
  return hostsim::block().atomic_global(reinterpret_cast<hostsim::Address>(at),
                                        [=](uint32_t before) { return before + value; });
}

inline uint32_t shared_base() { return 0; }
template <class T>
T load_shared(uint32_t address) {
  T v;
  hostsim::block().load_shared(address, &v, sizeof v, hostsim::block().thread_index());
  return v;
}
inline uint16_t load_shared_16(uint32_t address) { return load_shared<uint16_t>(address); }
inline uint32_t load_shared_32(uint32_t address) { return load_shared<uint32_t>(address); }
inline Vec2 load_shared_64(uint32_t address) { return load_shared<Vec2>(address); }
inline Vec4 load_shared_128(uint32_t address) { return load_shared<Vec4>(address); }
inline void store_shared_16(uint32_t address, uint16_t v) { hostsim::block().store_shared(address, &v, 2); }
inline void store_shared_32(uint32_t address, uint32_t v) { hostsim::block().store_shared(address, &v, 4); }
inline void store_shared_128(uint32_t address, const Vec4& v) { hostsim::block().store_shared(address, &v, 16); }

inline void cp_async_16(uint32_t to, const void* from, int read_bytes) {
  hostsim::block().copy_async({to, reinterpret_cast<hostsim::Address>(from), 16, static_cast<uint32_t>(read_bytes)});
}
inline void cp_async_16_once(uint32_t to, const void* from, int read_bytes) { cp_async_16(to, from, read_bytes); }
inline void cp_async_commit() { hostsim::block().commit_copies(); }
template <int Pending>
void cp_async_wait(const From& from = From::current()) {
  if (!hostsim::left_out("cp_async_wait", from)) hostsim::block().wait_copies(Pending);
}

inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address) { hostsim::ldmatrix_x4(d, row_address); }
inline hostsim::Half half(F16) { return hostsim::Half::f16; }
inline hostsim::Half half(BF16) { return hostsim::Half::bf16; }
template <class T>
void mma_m16n8k16(T type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  hostsim::mma_m16n8k16(half(type), d, a, b);
}
inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  hostsim::mma_m16n8k32(d, a, b);
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return hostsim::shuffle_xor(value, static_cast<unsigned>(mask));
}
inline uint32_t shuffle(uint32_t value, int source) { return hostsim::shuffle(value, static_cast<unsigned>(source)); }

template <int Table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  return hostsim::lop3(a, b, c, Table);
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return hostsim::prmt(a, b, selector); }
template <class T>
uint32_t fma2(T type, uint32_t a, uint32_t b, uint32_t c) {
  return hostsim::fma2(half(type), a, b, c);
}
inline float to_float(F16, uint16_t bits) { return hostsim::f16_to_float(bits); }
inline float to_float(BF16, uint16_t bits) { return hostsim::bf16_to_float(bits); }
inline uint16_t from_float(F16, float v) { return hostsim::to_f16(v); }
inline uint16_t from_float(BF16, float v) { return hostsim::to_bf16(v); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float add(float a, float b) { return a + b; }
inline int32_t add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float exponential(float v) { return std::exp(v); }
inline float hyperbolic_tangent(float v) { return std::tanh(v); }
inline float erf_complement(float v) { return std::erfc(v); }
inline int32_t round_to_int(float v) { return static_cast<int32_t>(std::nearbyint(v)); }
inline float to_float(int32_t v) { return static_cast<float>(v); }
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float v) { return std::bit_cast<uint32_t>(v); }

}  // namespace turbo::cuda
