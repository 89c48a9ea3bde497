// SPDX-License-Identifier: Apache-2.0
// The warp-wide instructions of device.h on fibres; where fragments lie is written there.
#pragma once

#include <cstdint>

namespace turbo::hostsim {

enum class Half : int { f16, bf16 };

/// d += a * b, 16 x 8 x 16. Products are exact; the sum of every eight of them and what was there before is rounded
/// toward zero, which is what A100 was measured to do (Fasi et al., "Numerical behavior of NVIDIA tensor cores",
/// 2021) up to the bits it keeps while it aligns. PTX leaves both open.
void mma_m16n8k16(Half type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
/// d += a * b, 16 x 8 x 32, s8, wrapping around as 32-bit integers do.
void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

/// Four 8 x 8 matrices of 16-bit elements; lane 8 * i + r names row r of matrix i.
void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address);

/// The value of lane `lane ^ mask`.
uint32_t shuffle_xor(uint32_t value, unsigned mask);
/// The value of lane `source`.
uint32_t shuffle(uint32_t value, unsigned source);

uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, unsigned table);
uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector);
/// a * b + c on both halves, one rounding each (for operands whose exact result fits a double).
uint32_t fma2(Half type, uint32_t a, uint32_t b, uint32_t c);

}  // namespace turbo::hostsim
