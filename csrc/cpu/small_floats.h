// SPDX-License-Identifier: Apache-2.0
// Bits of the floats of 4 and 8 bits, and where they go in wider ones.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace turbo::cpu {
namespace {

/// e8m0 is fp32's exponent field; its 0 means 2^-127, which fp32 has as these bits.
constexpr int32_t kSmallestE8m0 = 0x00400000;

/// An e4m3 byte, sign extended and moved up by 7 bits, is fp16 times 2^-8 in these bits.
constexpr int16_t kE4m3InHalf = static_cast<int16_t>(0xBFFF);
/// An e4m3 byte at the top, moved down by 4 bits with its sign, is fp32 times 2^-120 in these bits.
constexpr int32_t kE4m3InFloat = static_cast<int32_t>(0x87F00000);

constexpr int32_t kExponent = 0x7F800000;
constexpr int32_t kSmallestE4m3Power = (127 - 6) << 23;
/// Makes 1.5 * 2^(e + 20) of 2^e.
constexpr int32_t kE4m3Magic = (20 << 23) | 0x00400000;

/// fp32 of the e2m1 codes without sign.
constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

/// Bits of MXCSR: subnormal fp32 count as 0, as operands and as results.
constexpr unsigned kFlushSubnormals = 0x8040;

/// Keeps subnormal fp32 what they are for as long as it lives: e4m3's own pass through them, and the caller may have
/// asked the processor to take them for 0.
class KeepSubnormals {
 public:
  KeepSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kFlushSubnormals); }
  ~KeepSubnormals() { _mm_setcsr(before_); }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
  unsigned before_;
};

}  // namespace
}  // namespace turbo::cpu
