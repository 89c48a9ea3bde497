// SPDX-License-Identifier: Apache-2.0
// Eight 4-bit codes of a dword to registers of an A fragment, less their zero points.
//
// To 16-bit floats, four registers. A code put into the lowest bits of a float whose last place is 1 adds itself to it: 1024 in fp16, 128 in bf16. So one
// lop3 makes a pair of floats, and one multiply-add takes the base and the zero point away; all of this is exact, and
// so are the weights that the tensor cores see: integers from -15 to 15. Scales wait until a group is summed.
//
// To bytes, two registers. 128 + u - z lies between 113 and 143, so four such sums in a register never carry into each
// other; as signed bytes they are u - z with the sign bit turned around.
#pragma once

#include "device.h"
#include "groups.h"

namespace turbo::cuda {

inline constexpr int kAndOr = 0xEA;  // lop3: (a & b) | c

TM_DEVICE uint32_t both_halves(uint32_t half) { return half * 0x00010001u; }

/// What to add for z of the channels g and g + 8: -(base + z).
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

/// What to add for z of the channels g and g + 8: 128 - z in every byte.
TM_DEVICE ZeroPoints byte_zero_points(uint32_t z, uint32_t z8) {
  return {(128 - z) * 0x01010101u, (128 - z8) * 0x01010101u};
}

/// a0: channel g, a1: channel g + 8; bytes in the order of codes of x.
TM_DEVICE void dequantize_bytes(uint32_t codes, const ZeroPoints& zero, uint32_t& a0, uint32_t& a1) {
  constexpr uint32_t kNibbles = 0x0F0F0F0F, kSigns = 0x80808080;
  a0 = ((codes & kNibbles) + zero.low) ^ kSigns;
  a1 = ((codes >> 4 & kNibbles) + zero.high) ^ kSigns;
}

}  // namespace turbo::cuda
