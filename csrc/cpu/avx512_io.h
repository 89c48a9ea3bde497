// SPDX-License-Identifier: Apache-2.0
// Loads, stores and conversions that both AVX-512 translation units share; 16 fp32 lanes a register.
#pragma once

#include <immintrin.h>

#include "layout_u4g.h"

namespace turbo::cpu {
namespace {

/// fp32 values of the 4-bit two's complement codes, for vpermps: it looks at the low 4 bits of a lane.
inline __m512 signed_nibbles_f32() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
}

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

/// Round to nearest even, NaN kept: what vcvtneps2bf16 does, but for subnormals, which stay.
inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

inline __m512 from_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

template <DType D>
struct Avx512Io {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int64_t kSize = dtype_size(D);

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float v) { return _mm512_set1_ps(v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }

  /// `count` values of type D as fp32, the other lanes 0; reads no further.
  static Vec load_d(const void* p, int count) {
    const __mmask16 m = first_lanes(count);
    if constexpr (D == DType::f32) return _mm512_maskz_loadu_ps(m, p);
    const __m256i half = _mm256_maskz_loadu_epi16(m, p);
    if constexpr (D == DType::bf16) return from_bf16(half);
    return _mm512_cvtph_ps(half);
  }

  static Vec scale_vec(const char* scale, int v) { return load_d(scale + v * kLanes * kSize, kLanes); }
  static Vec bias_vec(const char* bias, int count) { return load_d(bias, count); }

  static Vec zero_vec(const uint32_t* zero, int v) {
    const __m512i shifts =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero + v * kZeroDwords));
    const __m512i lanes = _mm512_srlv_epi32(_mm512_broadcastq_epi64(both), shifts);
    return _mm512_permutexvar_ps(lanes, signed_nibbles_f32());
  }

  static void store_y(char* y, Vec v, int count) {
    const __mmask16 m = first_lanes(count);
    if constexpr (D == DType::f32)
      _mm512_mask_storeu_ps(y, m, v);
    else if constexpr (D == DType::bf16)
      _mm256_mask_storeu_epi16(y, m, to_bf16(v));
    else
      _mm256_mask_storeu_epi16(y, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace turbo::cpu
