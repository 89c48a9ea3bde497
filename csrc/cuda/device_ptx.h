// SPDX-License-Identifier: Apache-2.0
// device.h for nvcc: sm_80 and newer. What each function means is said here; hostsim/device.h has the same ones.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "elements.h"

#define TM_DEVICE __device__ __forceinline__
#define TM_UNROLL _Pragma("unroll")
#define TM_NO_UNROLL _Pragma("unroll 1")

namespace turbo::cuda {

TM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TM_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
TM_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }

TM_DEVICE void sync_threads() { __syncthreads(); }
TM_DEVICE void sync_warp() { __syncwarp(); }
/// What this thread wrote to global memory is seen by everyone who sees what it writes after this.
TM_DEVICE void thread_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Global memory; T is a type of 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <class T>
TM_DEVICE T load_global(const T* at) {
  return *at;
}
/// Past L1, for what other blocks wrote during this launch.
template <class T>
TM_DEVICE T load_global_volatile(const T* at);
template <>
TM_DEVICE Vec4 load_global_volatile(const Vec4* at) {
  Vec4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.v[0]), "=r"(v.v[1]), "=r"(v.v[2]), "=r"(v.v[3])
               : "l"(at)
               : "memory");
  return v;
}
template <class T>
TM_DEVICE void store_global(T* at, T value) {
  *at = value;
}
/// Adds to *at; the value before.
TM_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }

TM_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char turbo_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(turbo_shared));
}
TM_DEVICE uint32_t load_shared_32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
TM_DEVICE Vec2 load_shared_64(uint32_t address) {
  Vec2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.v[0]), "=r"(v.v[1]) : "r"(address) : "memory");
  return v;
}
TM_DEVICE Vec4 load_shared_128(uint32_t address) {
  Vec4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.v[0]), "=r"(v.v[1]), "=r"(v.v[2]), "=r"(v.v[3])
               : "r"(address)
               : "memory");
  return v;
}
TM_DEVICE uint16_t load_shared_16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}
TM_DEVICE void store_shared_16(uint32_t address, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
TM_DEVICE void store_shared_32(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
TM_DEVICE void store_shared_128(uint32_t address, const Vec4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.v[0]), "r"(v.v[1]), "r"(v.v[2]),
               "r"(v.v[3])
               : "memory");
}

/// 16 bytes to shared memory in the background, past L1: the first read_bytes come from `from`, the rest is 0. Both
/// addresses are multiples of 16, whatever read_bytes is.
TM_DEVICE void cp_async_16(uint32_t to, const void* from, int read_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read_bytes) : "memory");
}
/// The same for what is read once by the whole grid: it asks L2 to drop it first.
TM_DEVICE void cp_async_16_once(uint32_t to, const void* from, int read_bytes) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(read_bytes)
      : "memory");
}
/// All copies of this thread since the last commit become a group.
TM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most Pending of this thread's newest groups are under way.
template <int Pending>
TM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

TM_DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
}

TM_DEVICE void mma_m16n8k16(F16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TM_DEVICE void mma_m16n8k16(BF16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
TM_DEVICE void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

TM_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
TM_DEVICE uint32_t shuffle(uint32_t value, int source) { return __shfl_sync(0xFFFFFFFFu, value, source); }

/// Any function of three bits, on 32 at once: bit (4a + 2b + c) of Table is its value.
template <int Table>
TM_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}
/// Picks four of the eight bytes of (b, a) by the selector's nibbles; 8 in a nibble spreads the byte's sign.
TM_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

/// a * b + c on both halves, one rounding each.
TM_DEVICE uint32_t fma2(F16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
TM_DEVICE uint32_t fma2(BF16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

TM_DEVICE float to_float(F16, uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
TM_DEVICE float to_float(BF16, uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
TM_DEVICE uint16_t from_float(F16, float v) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
TM_DEVICE uint16_t from_float(BF16, float v) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
/// Arithmetic with one rounding to nearest, whatever the compiler's flags are.
TM_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
TM_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
TM_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
TM_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
/// Wraps around.
TM_DEVICE int32_t add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
/// Of a number and a NaN, the number.
TM_DEVICE float smaller(float a, float b) { return fminf(a, b); }
TM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
/// Within a few units in the last place.
TM_DEVICE float exponential(float v) { return expf(v); }
TM_DEVICE float hyperbolic_tangent(float v) { return tanhf(v); }
TM_DEVICE float erf_complement(float v) { return erfcf(v); }
/// The nearest integer, halves to even.
TM_DEVICE int32_t round_to_int(float v) { return __float2int_rn(v); }
TM_DEVICE float to_float(int32_t v) { return __int2float_rn(v); }
TM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
TM_DEVICE uint32_t as_bits(float v) { return __float_as_uint(v); }

}  // namespace turbo::cuda
