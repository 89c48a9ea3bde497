// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 fp32 lanes and what all AVX-512 translation units share: loads, stores, conversions.
#pragma once

#include <immintrin.h>

#include "gemm_isa.h"
#include "small_floats.h"

namespace turbo::cpu {
namespace {

using Vec16 = __m512;

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

struct Avx512 {
  using Vec = __m512;
  using Raw = __m512i;
  static constexpr int kLanes = 16;

  static Raw load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Raw broadcast(const Unit* unit) { return _mm512_set1_epi32(static_cast<int>(*unit)); }
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float v) { return _mm512_set1_ps(v); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }

  static Vec load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Vec v) { _mm512_storeu_ps(p, v); }

  // ---- for elementary functions ----

  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec abs(Vec v) { return _mm512_abs_ps(v); }
  static Vec round(Vec v) { return _mm512_roundscale_ps(v, 0); }
  /// v * 2^n for whole n of -126 to 127.
  static Vec scale2(Vec v, Vec n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_mul_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
  }
  /// v < limit ? yes : no
  static Vec select_below(Vec v, Vec limit, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, limit, _CMP_LT_OQ), no, yes);
  }

  static Raw int_zero() { return _mm512_setzero_si512(); }
  static Raw int_set1(int32_t v) { return _mm512_set1_epi32(v); }
  static Raw int_mul(Raw a, Raw b) { return _mm512_mullo_epi32(a, b); }
  static Raw int_add(Raw a, Raw b) { return _mm512_add_epi32(a, b); }
  static Vec to_float(Raw v) { return _mm512_cvtepi32_ps(v); }

  /// `count` values of type D as fp32, the other lanes 0; reads no further.
  template <DType D>
  static Vec load_d(const char* p, int count) {
    const __mmask16 m = first_lanes(count);
    if constexpr (D == DType::f32) return _mm512_maskz_loadu_ps(m, p);
    if constexpr (dtype_size(D) == 1) {
      const __m128i bytes = _mm_maskz_loadu_epi8(m, p);
      if constexpr (D == DType::e8m0) {
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
        return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(kSmallestE8m0)));
      }
      const __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
      return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_and_si256(halves, _mm256_set1_epi16(kE4m3InHalf))), _mm512_set1_ps(0x1p8f));
    }
    const __m256i half = _mm256_maskz_loadu_epi16(m, p);
    if constexpr (D == DType::bf16) return from_bf16(half);
    return _mm512_cvtph_ps(half);
  }

  template <DType D>
  static Vec load_full(const char* p) {
    return load_d<D>(p, kLanes);
  }

  static Vec bias_vec(DType dtype, const char* bias, int count) {
    if (dtype == DType::bf16) return load_d<DType::bf16>(bias, count);
    return dtype == DType::f16 ? load_d<DType::f16>(bias, count) : load_d<DType::f32>(bias, count);
  }

  static void store_y(DType dtype, char* y, Vec v, int count) {
    const __mmask16 m = first_lanes(count);
    if (dtype == DType::f32)
      _mm512_mask_storeu_ps(y, m, v);
    else
      _mm256_mask_storeu_epi16(y, m, dtype == DType::bf16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // ---- zero points of one vector, see layout.h ----

  /// 4 bits: the nibble of each lane at the bottom, other nibbles above it.
  static Raw zero_nibbles(const uint32_t* zero, int v) {
    const __m512i shifts =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero + v * 2));
    return _mm512_srlv_epi32(_mm512_broadcastq_epi64(both), shifts);
  }
  /// 8 bits, sign extended.
  static Raw zero_bytes(const uint32_t* zero, int v) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + v * 4)));
  }

  // ---- weights and activations as e4m3 ----

  /// The byte J of each lane.
  template <int J>
  static Vec e4m3(Raw raw) {
    const __m512i top = J < 3 ? _mm512_slli_epi32(raw, 24 - 8 * J) : raw;
    const __m512i bits = _mm512_and_si512(_mm512_srai_epi32(top, 4), _mm512_set1_epi32(kE4m3InFloat));
    return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  }
  /// Rounds |v| <= 448 to e4m3, halves to even: beside 1.5 * 2^(e + 20), where 2^e is the power of two in v but at
  /// least 2^-6, fp32 has steps of 2^(e - 3).
  static Vec round_e4m3(Vec v) {
    const __m512i power = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(kExponent));
    const __m512i least = _mm512_max_epi32(power, _mm512_set1_epi32(kSmallestE4m3Power));
    const Vec magic = _mm512_castsi512_ps(_mm512_add_epi32(least, _mm512_set1_epi32(kE4m3Magic)));
    return _mm512_sub_ps(_mm512_add_ps(v, magic), magic);
  }

  // ---- sixteen activations at a time ----

  static constexpr int kVecs16 = 1;

  /// Bits of |v| in each lane, the larger of them and `most`: as integers they order like the floats, and NaN is
  /// the largest.
  static Raw max_abs_bits(Raw most, Vec v) {
    return _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(v)));
  }
  static uint32_t reduce_max(Raw bits) { return _mm512_reduce_max_epu32(bits); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static float reduce_min(Vec v) { return _mm512_reduce_min_ps(v); }
  static float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }

  /// The largest of 16-bit floats without their signs, as bits: these, too, order like the floats.
  static uint32_t largest_halves(const char* x, int64_t count) {
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 there = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
      most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(there, x + 2 * i), magnitude));
    }
    const __m512i low = _mm512_and_si512(most, _mm512_set1_epi32(0xFFFF));
    return _mm512_reduce_max_epu32(_mm512_max_epu32(low, _mm512_srli_epi32(most, 16)));
  }

  /// round(clamp(x / scale + zero)) as 16 bytes; half to even. A product with 1 / scale is off by less than
  /// 2^-14 where it matters, so only what lies that near to a half (or is not a number) needs the division.
  static __m128i codes(const Vec (&x)[1], Vec scale, Vec reciprocal, Vec zero) {
    Vec q = _mm512_fmadd_ps(x[0], reciprocal, zero);
    const Vec rest = _mm512_abs_ps(_mm512_sub_ps(q, _mm512_roundscale_ps(q, 0)));
    if (_mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.5f - 0x1p-14f), _CMP_NLE_UQ))
      q = _mm512_add_ps(_mm512_div_ps(x[0], scale), zero);
    q = clamped(q);
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q));
  }
  static Vec clamped(Vec q) { return _mm512_min_ps(_mm512_max_ps(q, _mm512_set1_ps(-128)), _mm512_set1_ps(127)); }

  /// The same of 64 neighbours, with one look at what is near a half: 10 operations for 16 and, to pack and store them,
  /// 3 more.
  static constexpr bool kWide = true;
  static __m512i codes64(const Vec (&x)[4], Vec scale, Vec reciprocal, Vec zero) {
    Raw whole[4];
    Vec farthest = _mm512_setzero_ps();  // from what it is rounded to
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec q = clamped(_mm512_fmadd_ps(x[i], reciprocal, zero));
      whole[i] = _mm512_cvtps_epi32(q);
      constexpr int kLargerMagnitude = 0xB;
      farthest = _mm512_range_ps(farthest, _mm512_sub_ps(q, _mm512_cvtepi32_ps(whole[i])), kLargerMagnitude);
    }
    if (_mm512_cmp_ps_mask(farthest, _mm512_set1_ps(0.5f - 0x1p-14f), _CMP_NLE_UQ)) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        whole[i] = _mm512_cvtps_epi32(clamped(_mm512_add_ps(_mm512_div_ps(x[i], scale), zero)));
    }
    const Raw words[2] = {_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3])};
    // Packing leaves dword 4 L + i where 4 i + L belongs.
    const Raw order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words[0], words[1]));
  }
};

}  // namespace
}  // namespace turbo::cpu
