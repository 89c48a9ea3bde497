// SPDX-License-Identifier: Apache-2.0
// Narrow floats as bits, for the tests' plain reference: exact values only, nothing is rounded but by nearest_e4m3.
#pragma once

#include <algorithm>
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

inline double e4m3_of(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return (bits & 127) == 127 ? NAN : bits & 128 ? -size : size;
}

inline double e2m1_of(int bits) {
  static constexpr double kSizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return bits & 8 ? -kSizes[bits & 7] : kSizes[bits & 7];
}

/// The nearest e4m3 of what is within +-448, halves to even.
inline double nearest_e4m3(double v) {
  if (v == 0) return 0;
  const double step = std::ldexp(1, std::max(std::ilogb(v) - 3, -9));
  return std::nearbyint(v / step) * step;
}

inline double load(const char* from, DType dtype) {
  if (dtype == DType::e8m0) return std::ldexp(1, static_cast<uint8_t>(*from) - 127);
  if (dtype == DType::e4m3) return e4m3_of(static_cast<uint8_t>(*from));
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
