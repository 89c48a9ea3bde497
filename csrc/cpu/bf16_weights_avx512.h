// SPDX-License-Identifier: Apache-2.0
// Weights as exact bf16, AVX-512: each struct says how many pairs of neighbours in K a dword of weights holds (kPairs),
// and decodes pair J of the 16 channels of a line. Internal linkage, see gemm_kernel.h.
#pragma once

#include "avx512.h"

namespace turbo::cpu {
namespace {

/// Integers of 4 bits.
struct Int4Pairs {
  static constexpr int kPairs = 4;

  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_permutexvar_epi16(J ? _mm512_srli_epi16(raw, 4 * J) : raw, table());
  }
  static Vec16 zero_vec(const uint32_t* zero, int v) {
    return _mm512_permutexvar_ps(Avx512::zero_nibbles(zero, v), signed_nibbles_f32());
  }

 private:
  /// bf16 of the 4-bit two's complement codes, twice: vpermw looks at the low 5 bits of a lane, and bit 4
  /// belongs to the next weight, so that no mask is needed.
  static __m512i table() {
    // 0, 1, ..., 7 and -8, ..., -1 as the upper halves of their fp32 bits; a dword holds two entries.
    const __m256i once =
        _mm256_setr_epi32(0x3F800000, 0x40404000, 0x40A04080, 0x40E040C0, static_cast<int>(0xC0E0C100),
                          static_cast<int>(0xC0A0C0C0), static_cast<int>(0xC040C080), static_cast<int>(0xBF80C000));
    return _mm512_broadcast_i64x4(once);
  }
};

/// Integers of 8 bits.
struct Int8Pairs {
  static constexpr int kPairs = 2;

  /// Bytes 2J and 2J + 1 as bf16: the fp32 of an 8-bit integer has nothing in its lower half.
  template <int J>
  static __m512i decode(__m512i raw) {
    const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(raw, J ? 8 : 24), 24);
    const __m512i odd = _mm512_srai_epi32(J ? raw : _mm512_slli_epi32(raw, 16), 24);
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(_mm512_cvtepi32_ps(odd)));
  }
  static Vec16 zero_vec(const uint32_t* zero, int v) { return _mm512_cvtepi32_ps(Avx512::zero_bytes(zero, v)); }
};

/// e2m1.
struct E2m1Pairs {
  static constexpr int kPairs = 4;

  /// vpermw looks at the low 5 bits of a lane, the topmost of which belongs to the next weight.
  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_permutexvar_epi16(J ? _mm512_srli_epi16(raw, 4 * J) : raw, table());
  }

 private:
  /// bf16 of the 16 codes, twice; a dword holds two entries.
  static __m512i table() {
    const __m256i once =
        _mm256_setr_epi32(0x3F000000, 0x3FC03F80, 0x40404000, 0x40C04080, static_cast<int>(0xBF008000),
                          static_cast<int>(0xBFC0BF80), static_cast<int>(0xC040C000), static_cast<int>(0xC0C0C080));
    return _mm512_broadcast_i64x4(once);
  }
};

}  // namespace
}  // namespace turbo::cpu
