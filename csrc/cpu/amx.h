// SPDX-License-Identifier: Apache-2.0
// The tile instructions of AMX under names of their own: eight tiles of up to 16 rows of 64 bytes, and what multiplies
// them. With TM_AMX_SIMULATOR the same names are plain C++ (amx_simulator.h), which runs on every processor.
//
// A product adds A [rows, K] times B to C [rows, 16]. A row of A holds 16 dwords of consecutive k: pairs of bf16 or
// four bytes. Row i of B holds dword i of 16 channels: the 16 lanes of a line of layout.h, decoded. Each dword of C is
// one fp32 or int32.
#pragma once

#include <cstdint>

namespace turbo::cpu {
namespace {

inline constexpr int kTileRows = 16;       // of a tile at most
inline constexpr int64_t kTileRowBytes = 64;
inline constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;

/// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace
}  // namespace turbo::cpu

#ifdef TM_AMX_SIMULATOR
#include "amx_simulator.h"
#else

namespace turbo::cpu {
namespace {

// Not the intrinsics: GCC's take tile numbers as tokens of the preprocessor, and do not tell the compiler what they
// read.

inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

/// Keeps the compiler from moving accesses to memory past this place: it does not know what tile_load reads and
/// tile_store writes. One between a write and its read is enough.
[[gnu::always_inline]] inline void tile_fence() { asm volatile("" ::: "memory"); }

template <int T>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
/// Rows of tile T from `p` on, `stride` bytes apart.
template <int T>
[[gnu::always_inline]] inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T));
}
/// The same, leaving the first-level cache to others: for what is not read again soon.
template <int T>
[[gnu::always_inline]] inline void tile_stream(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T));
}
template <int T>
[[gnu::always_inline]] inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T));
}

/// C += A * B in fp32: for each element the products of even k and those of odd k are summed from 0 on by fused
/// multiply-adds, k ascending; the two sums are added, and their sum is added to C. Subnormal numbers count as 0, as
/// operands and as results, whatever MXCSR says.
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
/// C += A * B in int32, modulo 2^32; both signed.
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_s8s8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
/// The same with unsigned A and signed B.
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace turbo::cpu

#endif
