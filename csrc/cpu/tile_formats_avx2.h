// SPDX-License-Identifier: Apache-2.0
// What bf16_units_avx512.h, bf16_weights_avx512.h, e4m3_weights_avx512vbmi.h and int4_bytes_avx512.h have for AMX
// tiles, for the simulator on processors without AVX-512: AVX2 where the rest of the kernel needs it, else plain loops.
#pragma once

#include "avx2.h"
#include "quantize_e4m3.h"

namespace turbo::cpu {
namespace {

using TileVectors = Avx2;

/// 16 dwords.
struct Line {
  uint32_t dword[16];
};
inline Line load_line(const uint32_t* p) {
  Line line;
  __builtin_memcpy(&line, p, sizeof line);
  return line;
}
inline void store_line(char* p, const Line& line) { __builtin_memcpy(p, &line, sizeof line); }

/// The upper half of an fp32.
inline uint16_t upper_half(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}
inline float from_upper_half(uint32_t half) {
  const uint32_t bits = half << 16;
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
/// Rounded to nearest even, as avx512.h's to_bf16.
inline uint16_t bf16_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  if (v != v) return static_cast<uint16_t>((bits | 0x00400000) >> 16);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/// Pairs (2J, 2J + 1) of each dword as bf16; `W::value(dword, k)` is weight k.
template <class W>
struct Pairs {
  template <int J>
  static Line decode(const Line& raw) {
    Line out;
    for (int lane = 0; lane < 16; ++lane)
      out.dword[lane] = static_cast<uint32_t>(upper_half(W::value(raw.dword[lane], 2 * J))) |
                        static_cast<uint32_t>(upper_half(W::value(raw.dword[lane], 2 * J + 1))) << 16;
    return out;
  }
};

/// Weight k of 4 bits: the low half of a dword has the even ones, see layout.h.
inline uint32_t nibble(uint32_t dword, int k) { return dword >> (k / 2 * 4 + k % 2 * 16) & 15; }

struct Int4Pairs : Pairs<Int4Pairs> {
  static constexpr int kPairs = 4;
  static float value(uint32_t dword, int k) { return static_cast<float>(static_cast<int>(nibble(dword, k) ^ 8) - 8); }
  static __m256 zero_vec(const uint32_t* zero, int v) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(Avx2::zero_nibbles(zero, v), 28));
  }
};

struct Int8Pairs : Pairs<Int8Pairs> {
  static constexpr int kPairs = 2;
  static float value(uint32_t dword, int k) { return static_cast<int8_t>(dword >> 8 * k); }
  static __m256 zero_vec(const uint32_t* zero, int v) { return _mm256_cvtepi32_ps(Avx2::zero_bytes(zero, v)); }
};

struct E2m1Pairs : Pairs<E2m1Pairs> {
  static constexpr int kPairs = 4;
  static float value(uint32_t dword, int k) {
    const uint32_t code = nibble(dword, k);
    return code & 8 ? -kE2m1[code & 7] : kE2m1[code];
  }
};

struct E4m3Pairs : Pairs<E4m3Pairs> {
  static constexpr int kPairs = 2;
  static float value(uint32_t dword, int k) {
    const uint32_t code = dword >> 8 * k & 255, exponent = code >> 3 & 15, fraction = code & 7;
    const float size = exponent ? static_cast<float>(8 + fraction) * static_cast<float>(1u << exponent) * 0x1p-10f
                                : static_cast<float>(fraction) * 0x1p-9f;
    return code & 128 ? -size : size;
  }
};

struct Int4SignedBytes {
  /// The low or the high nibbles.
  template <int J>
  static Line decode(const Line& raw) {
    Line out;
    for (int lane = 0; lane < 16; ++lane) {
      const uint32_t codes = (raw.dword[lane] >> 4 * J & 0x0F0F0F0F) ^ 0x08080808;
      out.dword[lane] = ((codes | 0x80808080) - 0x08080808) ^ 0x80808080;
    }
    return out;
  }
  static __m256i zero_vec(const uint32_t* zero, int v) { return _mm256_srai_epi32(Avx2::zero_nibbles(zero, v), 28); }
};

/// Activations as units of bf16 pairs, fp16 as two bf16, as bf16_units_avx512.h has it.
template <DType D>
struct Bf16Units {
  static constexpr int kPlanes = D == DType::f16 ? 2 : 1;
  static constexpr bool kReadsInPlace = D == DType::bf16;

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    __builtin_memset(units, 0, static_cast<size_t>(count) * 4);
    auto* const halves = reinterpret_cast<char*>(units);
    for (int64_t i = 0; i < k; ++i) {
      uint16_t bits;
      __builtin_memcpy(&bits, x + 2 * i, 2);
      if constexpr (D == DType::bf16) {
        __builtin_memcpy(halves + 2 * i, &bits, 2);
      } else {
        const float v = _cvtsh_ss(bits);
        const uint16_t high = bf16_of(v);
        const float rest = v - from_upper_half(high);
        const uint16_t low = rest == rest ? bf16_of(rest) : 0;  // infinity less itself
        char* const pair = halves + i / 2 * 8 + i % 2 * 2;
        __builtin_memcpy(pair, &high, 2);
        __builtin_memcpy(pair + 4, &low, 2);
      }
    }
  }

  static float sum_units(const Unit* units, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += from_upper_half(units[i] & 0xFFFF) + from_upper_half(units[i] >> 16);
    return sum;
  }
};

struct RoundedBf16Units {
  static constexpr int64_t kBytes = 2;
  static void store16(char* out, const __m256 (&v)[2]) {
    alignas(32) float values[16];
    _mm256_store_ps(values, v[0]);
    _mm256_store_ps(values + 8, v[1]);
    for (int i = 0; i < 16; ++i) {
      const uint16_t half = upper_half(values[i]);
      __builtin_memcpy(out + 2 * i, &half, 2);
    }
  }
};

}  // namespace
}  // namespace turbo::cpu
