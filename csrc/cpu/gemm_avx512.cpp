// SPDX-License-Identifier: Apache-2.0
// AVX-512 without BF16 and VNNI, and fp32 activations on every AVX-512.
//
// Activations kept: weights become fp32. Per 64 bytes of 4-bit weights (128 weights, 16 channels): 1 load, 7
// shifts, 8 table permutes and, for each row, 8 multiply-adds: bound by the ports that all of these share on
// Intel (23 operations on two: 11.5 cycles for one row). Of 8-bit weights (64): 7 shifts, 4 conversions, 4
// multiply-adds; from 32 rows on these are decoded once for all (panel_kernel.h).
// Activations as integers: weights become 16-bit integers, two per lane, for vpmaddwd and vpaddd. The byte
// dot of this instruction set, vpmaddubsw, saturates at 16 bits.
#include "fp32_dot_avx512.h"
#include "quantize.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Kept4 : Fp32Dot<Kept4<D>, D> {
  static constexpr int kDots = 8;

  /// k = J sits at nibble J/2 of the low (even J) or high (odd J) half of a dword.
  template <int J>
  static __m512i decode(__m512i raw) {
    constexpr int kShift = 4 * (J % 2 * 4 + J / 2);
    const __m512i index = kShift ? _mm512_srli_epi32(raw, kShift) : raw;
    return _mm512_castps_si512(_mm512_permutexvar_ps(index, signed_nibbles_f32()));
  }
  static Vec16 zero_vec(const uint32_t* zero, int v) {
    return _mm512_permutexvar_ps(Avx512::zero_nibbles(zero, v), signed_nibbles_f32());
  }
};

template <DType D>
struct Kept8 : Fp32Dot<Kept8<D>, D> {
  static constexpr int kDots = 4;
  static constexpr bool kPanels = true;

  template <int J>
  static __m512i decode(__m512i raw) {
    const __m512i top = J < 3 ? _mm512_slli_epi32(raw, 24 - 8 * J) : raw;
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24)));
  }
  static Vec16 zero_vec(const uint32_t* zero, int v) {
    return _mm512_cvtepi32_ps(Avx512::zero_bytes(zero, v));
  }
};

template <class I, DType S>
struct WordDot : IntegerGroups<I, Avx512> {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<4, 4>;
  using Many = RegisterTile<2, 8>;

  static void dot(__m512i& acc, __m512i weights, __m512i unit) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(weights, unit));
  }
  static Vec16 scale_vec(const char* scale, int v) {
    return Avx512::load_d<S>(scale + v * 16 * dtype_size(S), 16);
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx512>::template prepare<typename I::Format>(a, x, out);
  }
};

template <DType S>
struct Integer4 : WordDot<Integer4<S>, S> {
  using Format = Units4<true>;
  static constexpr int kDots = 4;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  /// Codes q + 8 of the pair (2J, 2J + 1).
  template <int J>
  static __m512i decode(__m512i raw) {
    const __m512i low = J ? _mm512_srli_epi16(raw, 4 * J) : raw;
    // (low & 15) ^ 8
    return _mm512_ternarylogic_epi32(low, _mm512_set1_epi16(15), _mm512_set1_epi16(8), 0x6A);
  }
  static __m512i zero_vec(const uint32_t* zero, int v) {
    return _mm512_ternarylogic_epi32(Avx512::zero_nibbles(zero, v), _mm512_set1_epi32(15),
                                     _mm512_set1_epi32(8), 0x6A);
  }
};

struct Integer8 : WordDot<Integer8, DType::f32> {
  using Format = Units8<true>;
  static constexpr int kDots = 2;
  static int64_t zero_dwords(const Layout&) { return kTileN; }

  /// The even or the odd bytes.
  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_srai_epi16(J ? raw : _mm512_slli_epi16(raw, 8), 8);
  }
  static __m512i zero_vec(const uint32_t* sums, int v) { return _mm512_loadu_si512(sums + v * 16); }
};

}  // namespace

const GemmIsa& gemm_avx512(const Gemm& a) {
  if (a.activations == Activations::kept) {
    if (a.layout.bits == 4) {
      if (a.dtype == DType::bf16) return Kernel<Kept4<DType::bf16>>::kTable;
      return a.dtype == DType::f16 ? Kernel<Kept4<DType::f16>>::kTable : Kernel<Kept4<DType::f32>>::kTable;
    }
    if (a.dtype == DType::bf16) return Kernel<Kept8<DType::bf16>>::kTable;
    return a.dtype == DType::f16 ? Kernel<Kept8<DType::f16>>::kTable : Kernel<Kept8<DType::f32>>::kTable;
  }
  if (a.layout.bits == 8) return Kernel<Integer8>::kTable;
  if (a.scale_dtype == DType::bf16) return Kernel<Integer4<DType::bf16>>::kTable;
  return a.scale_dtype == DType::f16 ? Kernel<Integer4<DType::f16>>::kTable
                                     : Kernel<Integer4<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
