// SPDX-License-Identifier: Apache-2.0
// AVX-512 with BF16, activations kept: weights become exact bf16 integers, two per lane, for vdpbf16ps.
//
// Per 64 bytes of 4-bit weights (128 weights, 16 channels): 1 load, 3 shifts, 4 table permutes and, for each
// row, 4 dots; a broadcast of activations serves 4 tiles (2 for many rows). One row is bound by memory (12
// vector operations on a line that takes 7 to 14 cycles to arrive); from 3 to 8 rows on the dot units are
// the limit (one dot a cycle on Zen 4, two on Zen 5).
//
// Per 64 bytes of 8-bit weights (64 weights): 1 load, 9 shifts, 4 conversions, 2 joins and, for each row, 2 dots.
#include "avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"

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

template <class I, DType D>
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
    return Avx512::load_d<D>(scale + v * 16 * dtype_size(D), 16);
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
