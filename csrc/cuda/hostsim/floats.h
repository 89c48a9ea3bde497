// SPDX-License-Identifier: Apache-2.0
// fp16 and bf16 as bits, to and from float and double, as the device's conversions round: to nearest, halves to even.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace turbo::hostsim {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                          : std::ldexp(static_cast<float>(mantissa), -24));
}

/// Rounds v to `digits` significant bits with a smallest step of 2^least and a largest power of two of 2^most.
inline double round_to(double v, int digits, int least, int most) {
  if (v == 0 || !std::isfinite(v)) return v;
  const int step = std::max(std::ilogb(v) - (digits - 1), least);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(v, -step)), step);
  return std::fabs(rounded) >= std::ldexp(1.0, most + 1) ? std::copysign(INFINITY, v) : rounded;
}

inline uint16_t to_bf16(double v) {
  if (std::isnan(v)) return 0x7FFF;
  const float rounded = static_cast<float>(round_to(v, 8, -133, 127));
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16);
}

inline uint16_t to_f16(double v) {
  if (std::isnan(v)) return 0x7FFF;
  const double r = round_to(v, 11, -24, 15);
  const uint16_t sign = std::signbit(r) ? 0x8000 : 0;
  if (std::isinf(r)) return sign | 0x7C00;
  if (r == 0) return sign;
  const int exponent = std::ilogb(r);
  const double size = std::fabs(r);
  if (exponent < -14) return sign | static_cast<uint16_t>(std::ldexp(size, 24));
  return static_cast<uint16_t>(sign | (exponent + 15) << 10 | (static_cast<int>(std::ldexp(size, 10 - exponent)) & 1023));
}

/// The float next to v toward zero, v itself if it is one.
inline float toward_zero(double v) {
  const float nearest = static_cast<float>(v);
  if (std::isfinite(v) && std::fabs(static_cast<double>(nearest)) > std::fabs(v)) return std::nextafter(nearest, 0.0f);
  return nearest;
}

}  // namespace turbo::hostsim
