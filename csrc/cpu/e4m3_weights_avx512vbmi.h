// SPDX-License-Identifier: Apache-2.0
// Weights and activations that are e4m3 as exact bf16, AVX-512 with VBMI, through two tables of 128 bytes: the lower
// and the upper byte of the bf16 of each size. As bf16_weights_avx512.h has it for other weights.
#pragma once

#include "avx512.h"

namespace turbo::cpu {
namespace {

struct Tables {
  alignas(64) uint8_t low[128], high[128];
};

constexpr Tables tables() {
  Tables t{};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> 3, fraction = code & 7;
    if (exponent == 0 && fraction != 0) {  // subnormal: fraction * 2^-9
      exponent = 1;
      while (fraction < 8) {
        fraction *= 2;
        --exponent;
      }
      fraction -= 8;
    } else if (exponent == 0) {
      exponent = -120;
    }
    const int bits = (exponent + 120) << 7 | fraction << 4;
    t.low[code] = static_cast<uint8_t>(bits & 255);
    t.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return t;
}

constexpr Tables kTables = tables();

struct E4m3Pairs {
  static constexpr int kPairs = 2;

  /// Bytes 2J and 2J + 1 of each lane, each twice: the tables are asked for the lower byte in even places and for the
  /// upper one in odd places, and look at 7 bits; the sign is the eighth.
  template <int J>
  static __m512i decode(__m512i raw) {
    constexpr int kFirst = 2 * J * 0x01010101 + 0x01010000;
    const __m512i twice = _mm512_shuffle_epi8(
        raw,
        _mm512_broadcast_i32x4(_mm_setr_epi32(kFirst, kFirst + 0x04040404, kFirst + 0x08080808, kFirst + 0x0C0C0C0C)));
    constexpr __mmask64 kEven = 0x5555555555555555ull;
    __m512i both = _mm512_mask2_permutex2var_epi8(half(kTables.low), twice, kEven, half(kTables.low + 64));
    both = _mm512_mask2_permutex2var_epi8(half(kTables.high), both, ~kEven, half(kTables.high + 64));
    // both | (twice & 0x8000)
    return _mm512_ternarylogic_epi32(both, twice, _mm512_set1_epi32(static_cast<int>(0x80008000)), 0xF8);
  }

 private:
  static __m512i half(const uint8_t* table) { return _mm512_load_si512(table); }
};

/// Rounded activations as units.
struct RoundedBf16Units {
  static constexpr int64_t kBytes = 2;
  static void store16(char* out, const Vec16 (&v)[1]) {
    const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v[0]), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), upper);
  }
};

}  // namespace
}  // namespace turbo::cpu
