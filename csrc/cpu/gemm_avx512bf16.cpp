// SPDX-License-Identifier: Apache-2.0
// AVX-512 with BF16, activations kept: weights become exact bf16 integers, two per lane, for vdpbf16ps.
//
// Per 64 bytes of 4-bit weights (128 weights, 16 channels): 1 load, 3 shifts, 4 table permutes and, for each
// row, 4 dots; a broadcast of activations serves 4 tiles (2 for many rows). One row is bound by memory (12
// vector operations on a line that takes 7 to 14 cycles to arrive); from 3 to 8 rows on the dot units are
// the limit (one dot a cycle on Zen 4, two on Zen 5).
//
// Per 64 bytes of 8-bit weights (64 weights): 1 load, 9 shifts, 4 conversions, 2 joins and, for each row, 2 dots.
#include "bf16_dot_avx512.h"

namespace turbo::cpu {
namespace {

/// bf16 of the 4-bit two's complement codes, twice: vpermw looks at the low 5 bits of a lane, and bit 4
/// belongs to the next weight, so that no mask is needed.
inline __m512i signed_nibbles_bf16() {
  // 0, 1, ..., 7 and -8, ..., -1 as the upper halves of their fp32 bits; a dword holds two entries.
  const __m256i once = _mm256_setr_epi32(0x3F800000, 0x40404000, 0x40A04080, 0x40E040C0,
                                         static_cast<int>(0xC0E0C100), static_cast<int>(0xC0A0C0C0),
                                         static_cast<int>(0xC040C080), static_cast<int>(0xBF80C000));
  return _mm512_broadcast_i64x4(once);
}

template <DType D>
struct Kept4 : Bf16Dot<Kept4<D>, D> {
  static constexpr int kDots = 4;

  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_permutexvar_epi16(J ? _mm512_srli_epi16(raw, 4 * J) : raw, signed_nibbles_bf16());
  }
  static Vec16 zero_vec(const uint32_t* zero, int v) {
    return _mm512_permutexvar_ps(Avx512::zero_nibbles(zero, v), signed_nibbles_f32());
  }
};

template <DType D>
struct Kept8 : Bf16Dot<Kept8<D>, D> {
  static constexpr int kDots = 2;
  static constexpr int64_t kManyFrom = 5;  // decoding is the bound for few rows

  /// Bytes 2J and 2J + 1 as bf16: the fp32 of an 8-bit integer has nothing in its lower half.
  template <int J>
  static __m512i decode(__m512i raw) {
    const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(raw, J ? 8 : 24), 24);
    const __m512i odd = _mm512_srai_epi32(J ? raw : _mm512_slli_epi32(raw, 16), 24);
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(_mm512_cvtepi32_ps(odd)));
  }
  static Vec16 zero_vec(const uint32_t* zero, int v) {
    return _mm512_cvtepi32_ps(Avx512::zero_bytes(zero, v));
  }
};

}  // namespace

const GemmIsa& gemm_avx512bf16(const Gemm& a) {
  if (a.layout.bits == 4)
    return a.dtype == DType::bf16 ? Kernel<Kept4<DType::bf16>>::kTable : Kernel<Kept4<DType::f16>>::kTable;
  return a.dtype == DType::bf16 ? Kernel<Kept8<DType::bf16>>::kTable : Kernel<Kept8<DType::f16>>::kTable;
}

}  // namespace turbo::cpu
