// SPDX-License-Identifier: Apache-2.0
// Vectors of 8 fp32 lanes and what both AVX2 translation units share: loads, stores, conversions.
#pragma once

#include <immintrin.h>

#include "gemm_isa.h"
#include "small_floats.h"

namespace turbo::cpu {
namespace {

using Vec8 = __m256;

struct Avx2 {
  using Vec = __m256;
  using Raw = __m256i;
  static constexpr int kLanes = 8;

  static Raw load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Raw broadcast(const Unit* unit) { return _mm256_set1_epi32(static_cast<int>(*unit)); }
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float v) { return _mm256_set1_ps(v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }

  static Vec load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Vec v) { _mm256_storeu_ps(p, v); }

  // ---- for elementary functions ----

  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec abs(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  /// v * 2^n for whole n of -126 to 127.
  static Vec scale2(Vec v, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  /// v < limit ? yes : no
  static Vec select_below(Vec v, Vec limit, Vec yes, Vec no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(v, limit, _CMP_LT_OQ));
  }

  static Raw int_zero() { return _mm256_setzero_si256(); }
  static Raw int_set1(int32_t v) { return _mm256_set1_epi32(v); }
  static Raw int_mul(Raw a, Raw b) { return _mm256_mullo_epi32(a, b); }
  static Raw int_add(Raw a, Raw b) { return _mm256_add_epi32(a, b); }
  static Vec to_float(Raw v) { return _mm256_cvtepi32_ps(v); }

  template <DType D>
  static Vec load_full(const char* p) {
    if constexpr (D == DType::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (dtype_size(D) == 1) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (D == DType::e8m0) {
        const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
        return _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(kSmallestE8m0)));
      }
      const __m128i halves = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
      return _mm256_mul_ps(_mm256_cvtph_ps(_mm_and_si128(halves, _mm_set1_epi16(kE4m3InHalf))), _mm256_set1_ps(0x1p8f));
    }
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (D == DType::bf16)
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    return _mm256_cvtph_ps(half);
  }

  /// `count` values of type D as fp32, the other lanes 0; reads no further.
  template <DType D>
  static Vec load_d(const char* p, int count) {
    if (count >= kLanes) return load_full<D>(p);
    alignas(32) char buffer[kLanes * dtype_size(D)] = {};
    if (count > 0) __builtin_memcpy(buffer, p, count * dtype_size(D));
    return load_full<D>(buffer);
  }

  static Vec bias_vec(DType dtype, const char* bias, int count) {
    if (dtype == DType::bf16) return load_d<DType::bf16>(bias, count);
    return dtype == DType::f16 ? load_d<DType::f16>(bias, count) : load_d<DType::f32>(bias, count);
  }

  static void store_y(DType dtype, char* y, Vec v, int count) {
    alignas(32) char buffer[kLanes * 4];
    if (dtype == DType::f32)
      _mm256_store_ps(reinterpret_cast<float*>(buffer), v);
    else
      _mm_store_si128(reinterpret_cast<__m128i*>(buffer),
                      dtype == DType::bf16 ? to_bf16(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    __builtin_memcpy(y, buffer, count * dtype_size(dtype));
  }

  // ---- zero points of one vector, see layout.h: vector v is one half of tile v/2 ----

  /// 4 bits: the nibble of each lane at the top, other nibbles below it.
  static Raw zero_nibbles(const uint32_t* zero, int v) {
    const __m256i left = _mm256_setr_epi32(28, 28, 24, 24, 20, 20, 16, 16);
    long long pair;
    __builtin_memcpy(&pair, zero + v / 2 * 2, sizeof pair);
    const __m256i both = _mm256_set1_epi64x(pair);
    return _mm256_sllv_epi32(v % 2 ? _mm256_srli_epi32(both, 16) : both, left);
  }
  /// 8 bits, sign extended.
  static Raw zero_bytes(const uint32_t* zero, int v) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero + v * 2)));
  }

  // ---- weights and activations as e4m3 ----

  /// The byte J of each lane.
  template <int J>
  static Vec e4m3(Raw raw) {
    const __m256i top = J < 3 ? _mm256_slli_epi32(raw, 24 - 8 * J) : raw;
    const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(top, 4), _mm256_set1_epi32(kE4m3InFloat));
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
  }
  /// Rounds |v| <= 448 to e4m3, see avx512.h.
  static Vec round_e4m3(Vec v) {
    const __m256i power = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(kExponent));
    const __m256i least = _mm256_max_epi32(power, _mm256_set1_epi32(kSmallestE4m3Power));
    const Vec magic = _mm256_castsi256_ps(_mm256_add_epi32(least, _mm256_set1_epi32(kE4m3Magic)));
    return _mm256_sub_ps(_mm256_add_ps(v, magic), magic);
  }

  // ---- sixteen activations at a time ----

  static constexpr int kVecs16 = 2;

  static Raw max_abs_bits(Raw most, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    return _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
  }
  static uint32_t reduce_max(Raw bits) {
    alignas(32) uint32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), bits);
    uint32_t most = 0;
    for (const uint32_t lane : lanes) most = lane > most ? lane : most;
    return most;
  }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static float reduce_min(Vec v) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, v);
    float least = lanes[0];
    for (const float lane : lanes) least = lane < least ? lane : least;
    return least;
  }
  static float reduce_max(Vec v) { return -reduce_min(_mm256_sub_ps(zero(), v)); }

  /// The largest of 16-bit floats without their signs, as bits: these, too, order like the floats.
  static uint32_t largest_halves(const char* x, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * i));
      most = _mm256_max_epu16(most, _mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)));
    }
    const __m256i low = _mm256_and_si256(most, _mm256_set1_epi32(0xFFFF));
    uint32_t largest = reduce_max(_mm256_max_epu32(low, _mm256_srli_epi32(most, 16)));
    for (; i < count; ++i) {
      uint16_t bits;
      __builtin_memcpy(&bits, x + 2 * i, sizeof bits);
      const uint32_t magnitude = bits & 0x7FFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
  }

  static constexpr bool kWide = false;
  /// round(clamp(x / scale + zero)) as 16 bytes; half to even. The division only near a half, see avx512.h.
  static __m128i codes(const Vec (&x)[2], Vec scale, Vec reciprocal, Vec zero) {
    __m256i q[2];
    for (int i = 0; i < 2; ++i) {
      Vec v = _mm256_fmadd_ps(x[i], reciprocal, zero);
      const Vec rest = _mm256_sub_ps(v, _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      const Vec size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), rest);
      if (_mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(0.5f - 0x1p-14f), _CMP_NLE_UQ)))
        v = _mm256_add_ps(_mm256_div_ps(x[i], scale), zero);
      q[i] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-128)), _mm256_set1_ps(127)));
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }

 private:
  /// Round to nearest even, NaN kept.
  static __m128i to_bf16(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

}  // namespace
}  // namespace turbo::cpu
