// SPDX-License-Identifier: Apache-2.0
// Loops that measure what this processor can do at best: the limits that a kernel is judged by.
// One thread's share only; the caller times them and runs one on each thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbo::cpu {

/// The multiply-add instruction that a peak loop consists of.
enum class DotKind : int {
  bf16,   ///< vdpbf16ps: two bf16 products added to each fp32 lane (AVX-512 BF16)
  int8,   ///< vpdpbusd: four u8*s8 products added to each int32 lane (AVX-512 VNNI, else AVX-VNNI)
  fma32,  ///< vfmadd: one fp32 product added to each lane (AVX-512, else AVX2+FMA)
  amx_bf16,  ///< tdpbf16ps: 32 bf16 products added to each of 16 x 16 fp32
  amx_int8,  ///< tdpbssd: 64 s8*s8 products added to each of 16 x 16 int32
  amx_bf16_l2,  ///< the same with the tile loads of a GEMM of 2 x 2 C tiles: A tiles come from the
  amx_int8_l2,  ///< second-level cache, B tiles from the first
};

/// Reads `bytes` bytes from `p` (any alignment) once, front to back.
/// Returns the sum modulo 2^64 of the buffer's little-endian 64-bit words, the last one zero
/// padded: the same whatever the instruction set, and additive over cuts at multiples of 8 bytes.
uint64_t read_lines(const void* p, size_t bytes);

/// Runs `iterations` rounds of independent multiply-adds; only the kinds with `_l2` touch memory.
/// Returns the scalar multiply-adds done, 0 when this processor lacks the instruction.
int64_t dot_loop(DotKind kind, int64_t iterations);

}  // namespace turbo::cpu
