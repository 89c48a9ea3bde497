// SPDX-License-Identifier: Apache-2.0
// Activations as units of bf16 pairs, AVX-512 with BF16. Internal linkage, see gemm_kernel.h.
#pragma once

#include "avx512.h"

namespace turbo::cpu {
namespace {

/// `D` is the dtype of x: bf16, or fp16, which has 11 significant bits where bf16 has 8: x = hi + lo exactly, one unit
/// for each.
template <DType D>
struct Bf16Units {
  static constexpr int kPlanes = D == DType::f16 ? 2 : 1;
  static constexpr bool kReadsInPlace = D == DType::bf16;

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    if constexpr (D == DType::bf16) {
      __builtin_memcpy(units, x, k * 2);
      __builtin_memset(reinterpret_cast<char*>(units) + k * 2, 0, count * 4 - k * 2);
    } else {
      // hi of 16 values in the lower half, lo in the upper; interleaved by pairs of k.
      const __m512i interleave = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
      for (int64_t i = 0; i < count; i += 16) {
        const int64_t left = k - i;
        const Vec16 v = Avx512::load_d<D>(x + i * 2, static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16));
        const __m256i hi = to_bf16(v);
        // infinity - infinity would be NaN: nothing is left of what is not finite.
        const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(1e38f), _CMP_LT_OQ);
        const __m256i lo = to_bf16(_mm512_maskz_sub_ps(finite, v, from_bf16(hi)));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(hi), lo, 1);
        const int64_t units_left = count - i;
        _mm512_mask_storeu_epi32(units + i, first_lanes(units_left < 16 ? static_cast<int>(units_left) : 16),
                                 _mm512_permutexvar_epi32(interleave, both));
      }
    }
  }

  static float sum_units(const Unit* units, int64_t count) {
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
    Vec16 acc = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i;
      const __mmask16 m = first_lanes(left < 16 ? static_cast<int>(left) : 16);
      acc = _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(ones),
                             reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(m, units + i)));
    }
    return _mm512_reduce_add_ps(acc);
  }
};

}  // namespace
}  // namespace turbo::cpu
