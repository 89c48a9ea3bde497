// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C: 4-bit weights become fp32 by sign extension, 8 channels a register.
//
// Per 64 bytes of weights (128 weights, 16 channels): 2 loads, 14 + 16 shifts, 16 conversions and, for
// each row, 16 multiply-adds: bound by the decoding for one row (46 operations on two or three units).
#include <immintrin.h>

#include "gemm_u4g_kernel.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Avx2 {
  using Vec = __m256;
  using Raw = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int64_t kSize = dtype_size(D);
  static constexpr int kDots = 8, kPlanes = 1;
  static constexpr bool kReadsInPlace = D == DType::f32;
  // Few: 2 tiles x 2 vectors x 2 rows = 8 accumulators, 4 weights, 1 activation of 16 registers.
  // Many: 1 tile x 2 vectors x 5 rows = 10, 2 and 1: the decoding is shared by more rows.
  using Few = RegisterTile<2, 2>;
  using Many = RegisterTile<1, 5>;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float v) { return _mm256_set1_ps(v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }

  static Raw load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }

  /// Nibble J/2 of the low (even J) or high (odd J) half, moved to the top and back with its sign.
  template <int J>
  static Raw decode(Raw raw) {
    constexpr int kLeft = 28 - 4 * (J % 2 * 4 + J / 2);
    const Raw top = kLeft ? _mm256_slli_epi32(raw, kLeft) : raw;
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28)));
  }

  static Raw broadcast(const Unit* unit) { return _mm256_set1_epi32(static_cast<int>(*unit)); }

  static void dot(Vec& acc, Raw weights, Raw unit) {
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(weights), _mm256_castsi256_ps(unit), acc);
  }

  static Vec from_half(__m128i half) {
    if constexpr (D == DType::bf16)
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    else
      return _mm256_cvtph_ps(half);
  }

  static Vec load_full(const char* p) {
    if constexpr (D == DType::f32)
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    else
      return from_half(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  /// `count` values of type D as fp32, the other lanes 0; reads no further.
  static Vec load_d(const char* p, int count) {
    if (count >= kLanes) return load_full(p);
    alignas(32) char buffer[kLanes * kSize] = {};
    if (count > 0) __builtin_memcpy(buffer, p, count * kSize);
    return load_full(buffer);
  }

  static Vec scale_vec(const char* scale, int v) { return load_full(scale + v * kLanes * kSize); }
  static Vec bias_vec(const char* bias, int count) { return load_d(bias, count); }

  /// Vector v is one half of tile v/2: lanes 0..7 at shifts 0..12, lanes 8..15 at 16..28.
  static Vec zero_vec(const uint32_t* zero, int v) {
    const __m256i left = _mm256_setr_epi32(28, 28, 24, 24, 20, 20, 16, 16);
    const __m256i both = _mm256_set1_epi64x(load_pair(zero + v / 2 * kZeroDwords));
    const __m256i lanes = _mm256_sllv_epi32(v % 2 ? _mm256_srli_epi32(both, 16) : both, left);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(lanes, 28));
  }

  static void store_y(char* y, Vec v, int count) {
    alignas(32) char buffer[kLanes * kSize];
    if constexpr (D == DType::f32)
      _mm256_store_ps(reinterpret_cast<float*>(buffer), v);
    else if constexpr (D == DType::f16)
      _mm_store_si128(reinterpret_cast<__m128i*>(buffer),
                      _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    else
      _mm_store_si128(reinterpret_cast<__m128i*>(buffer), to_bf16(v));
    __builtin_memcpy(y, buffer, count * kSize);
  }

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = k - i;
      _mm256_storeu_ps(reinterpret_cast<float*>(units + i),
                       load_d(x + i * kSize, static_cast<int>(left < kLanes ? left : kLanes)));
    }
  }

  static float sum_units(const Unit* units, int64_t count) {
    Vec acc = zero();
    for (int64_t i = 0; i < count; i += kLanes)
      acc = add(acc, _mm256_loadu_ps(reinterpret_cast<const float*>(units + i)));
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, acc);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
           ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }

 private:
  static long long load_pair(const uint32_t* p) {
    long long value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
  }

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

const GemmU4gIsa& gemm_u4g_avx2(DType dtype) {
  if (dtype == DType::bf16) return KernelU4g<Avx2<DType::bf16>>::kTable;
  if (dtype == DType::f16) return KernelU4g<Avx2<DType::f16>>::kTable;
  return KernelU4g<Avx2<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
