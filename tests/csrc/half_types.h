// SPDX-License-Identifier: Apache-2.0
// bf16 and fp16 as bits, for the tests' plain reference: exact values only, nothing is rounded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace test {

using turbo::cpu::DType;

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

/// Writes v, which the type must be able to hold (for fp16: zero or a normal number).
inline void store(char* to, DType dtype, float v) {
  const uint32_t bits = bits_of(v);
  if (dtype == DType::f32) {
    std::memcpy(to, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::f16) {
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    half = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude) half |= static_cast<uint16_t>((magnitude - (112u << 23)) >> 13);
  }
  std::memcpy(to, &half, 2);
}

inline double load(const char* from, DType dtype) {
  if (dtype == DType::f32) {
    float v;
    std::memcpy(&v, from, 4);
    return v;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  if (dtype == DType::bf16) return float_of(static_cast<uint32_t>(half) << 16);
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = half & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(1024 + mantissa, exponent - 25)
                  : sign * std::ldexp(mantissa, -24);
}

/// Distance from 1 to the next number.
inline double epsilon(DType dtype) {
  return dtype == DType::f32 ? 0x1p-23 : dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
}

/// Bits of the significand: integers below 2 to this power are exact.
inline int significand_bits(DType dtype) {
  return dtype == DType::f32 ? 24 : dtype == DType::f16 ? 11 : 8;
}

}  // namespace test
