// SPDX-License-Identifier: Apache-2.0
// Products of bf16 pairs, 16 channels a register: what the AVX-512 BF16 kernels share.
#pragma once

#include "avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"

namespace turbo::cpu {
namespace {

/// `D` is the dtype of x, `S` that of scales.
template <class I, DType D, DType S = D>
struct Bf16Dot : KeptGroups<I, Avx512> {
  // fp16 has 11 significant bits, bf16 has 8: x = hi + lo exactly, one unit for each.
  static constexpr int kPlanes = D == DType::f16 ? 2 : 1;
  static constexpr bool kReadsInPlace = D == DType::bf16;
  // 16 accumulators, packed and decoded weights, 1 broadcast and 1 table of 32 registers; most of the
  // 16 totals stay in the rest. For many rows 2 x 8 halves the decoding against 4 x 4 (3 to 5 % faster
  // on Zen 5); 4 x 6 and 2 x 10 spill all totals: 2 % slower at group 32, not faster at group 128.
  using Few = RegisterTile<4, 4>;
  using Many = RegisterTile<2, 8>;

  /// Not the intrinsic: with it the compiler would broadcast again, from memory, for every dot, and
  /// two loads a cycle would be the bound.
  static void dot(Vec16& acc, __m512i weights, __m512i unit) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(unit));
  }

  static Vec16 scale_vec(const char* scale, int v) {
    return Avx512::load_full<S>(scale + v * 16 * dtype_size(S));
  }

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    prepare_kept<I>(a, x, out, I::kDots * kPlanes);
  }

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    if constexpr (D == DType::bf16) {
      __builtin_memcpy(units, x, k * 2);
      __builtin_memset(reinterpret_cast<char*>(units) + k * 2, 0, count * 4 - k * 2);
    } else {
      // hi of 16 values in the lower half, lo in the upper; interleaved by pairs of k.
      const __m512i interleave =
          _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
      for (int64_t i = 0; i < count; i += 16) {
        const int64_t left = k - i;
        const Vec16 v =
            Avx512::load_d<D>(x + i * 2, static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16));
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
