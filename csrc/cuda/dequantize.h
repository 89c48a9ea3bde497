// SPDX-License-Identifier: Apache-2.0
// Eight 4-bit codes of a dword to the four registers of an A fragment, less their zero points.
//
// A code put into the lowest bits of a float whose last place is 1 adds itself to it: 1024 in fp16, 128 in bf16. So one
// lop3 makes a pair of floats, and one multiply-add takes the base and the zero point away; all of this is exact, and
// so are the weights that the tensor cores see: integers from -15 to 15. Scales wait until a group is summed.
#pragma once

#include "device.h"

namespace turbo::cuda {

inline constexpr int kAndOr = 0xEA;  // lop3: (a & b) | c

/// What to add for the channels g and g + 8 of a slab: -(base + z), twice in a register.
struct ZeroPoints {
  uint32_t low, high;
};

TM_DEVICE uint32_t both_halves(uint32_t half) { return half * 0x00010001u; }

/// z of channels g and g + 8.
TM_DEVICE ZeroPoints zero_points(F16, uint32_t z, uint32_t z8) {
  // Registers of g + 8 are read 4 bits higher, so as 1024 + 16 u, and divided by 16: their base is 64, whose last
  // place is 1/16.
  return {both_halves(0xE400u | z), both_halves(0xD400u | z8 << 4)};
}
TM_DEVICE ZeroPoints zero_points(BF16, uint32_t z, uint32_t z8) {
  return {both_halves(0xC300u | z), both_halves(0xC300u | z8)};
}

TM_DEVICE void dequantize(F16 type, uint32_t codes, const ZeroPoints& zero, uint32_t (&a)[4]) {
  constexpr uint32_t kBase = 0x64006400, kOne = 0x3C003C00, kSixteenth = 0x2C002C00;
  const uint32_t upper = codes >> 8;
  a[0] = fma2(type, lop3<kAndOr>(codes, 0x000F000F, kBase), kOne, zero.low);
  a[1] = fma2(type, lop3<kAndOr>(codes, 0x00F000F0, kBase), kSixteenth, zero.high);
  a[2] = fma2(type, lop3<kAndOr>(upper, 0x000F000F, kBase), kOne, zero.low);
  a[3] = fma2(type, lop3<kAndOr>(upper, 0x00F000F0, kBase), kSixteenth, zero.high);
}

TM_DEVICE void dequantize(BF16 type, uint32_t codes, const ZeroPoints& zero, uint32_t (&a)[4]) {
  constexpr uint32_t kBase = 0x43004300, kOne = 0x3F803F80;
  TM_UNROLL
  for (int i = 0; i < 4; ++i)
    a[i] = fma2(type, lop3<kAndOr>(codes >> (4 * i), 0x000F000F, kBase), kOne, i % 2 ? zero.high : zero.low);
}

}  // namespace turbo::cuda
