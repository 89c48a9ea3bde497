// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C, 8 channels a register.
//
// Activations kept: weights become fp32 by sign extension. Per 64 bytes of 4-bit weights (128 weights, 16
// channels): 2 loads, 14 + 16 shifts, 16 conversions and, for each row, 16 multiply-adds: bound by the decoding
// for one row (46 operations on two or three units). Of 8-bit weights (64): 14 shifts, 8 conversions. From 32 rows on
// both are decoded once for all (panel_kernel.h).
// Activations as integers: 16-bit integers, two per lane, for vpmaddwd and vpaddd (vpmaddubsw saturates).
#include "fp32_dot_avx2.h"
#include "quantize.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Kept4 : Fp32Dot<Kept4<D>, D> {
  static constexpr int kDots = 8;
  static constexpr bool kPanels = true;

  /// Nibble J/2 of the low (even J) or high (odd J) half, moved to the top and back with its sign.
  template <int J>
  static __m256i decode(__m256i raw) {
    constexpr int kLeft = 28 - 4 * (J % 2 * 4 + J / 2);
    const __m256i top = kLeft ? _mm256_slli_epi32(raw, kLeft) : raw;
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28)));
  }
  static Vec8 zero_vec(const uint32_t* zero, int v) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(Avx2::zero_nibbles(zero, v), 28));
  }
};

template <DType D>
struct Kept8 : Fp32Dot<Kept8<D>, D> {
  static constexpr int kDots = 4;
  static constexpr bool kPanels = true;

  template <int J>
  static __m256i decode(__m256i raw) {
    const __m256i top = J < 3 ? _mm256_slli_epi32(raw, 24 - 8 * J) : raw;
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24)));
  }
  static Vec8 zero_vec(const uint32_t* zero, int v) {
    return _mm256_cvtepi32_ps(Avx2::zero_bytes(zero, v));
  }
};

template <class I, DType S>
struct WordDot : IntegerGroups<I, Avx2> {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<2, 2>;
  using Many = RegisterTile<1, 4>;

  static void dot(__m256i& acc, __m256i weights, __m256i unit) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(weights, unit));
  }
  static Vec8 scale_vec(const char* scale, int v) {
    return Avx2::load_full<S>(scale + v * 8 * dtype_size(S));
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx2>::template prepare<typename I::Format>(a, x, out);
  }
};

template <DType S>
struct Integer4 : WordDot<Integer4<S>, S> {
  using Format = Units4<true>;
  static constexpr int kDots = 4;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  /// Codes q + 8 of the pair (2J, 2J + 1).
  template <int J>
  static __m256i decode(__m256i raw) {
    const __m256i low = J ? _mm256_srli_epi16(raw, 4 * J) : raw;
    return _mm256_xor_si256(_mm256_and_si256(low, _mm256_set1_epi16(15)), _mm256_set1_epi16(8));
  }
  static __m256i zero_vec(const uint32_t* zero, int v) {
    return _mm256_xor_si256(_mm256_srli_epi32(Avx2::zero_nibbles(zero, v), 28), _mm256_set1_epi32(8));
  }
};

struct Integer8 : WordDot<Integer8, DType::f32> {
  using Format = Units8<true>;
  static constexpr int kDots = 2;
  static int64_t zero_dwords(const Layout&) { return kTileN; }

  /// The even or the odd bytes.
  template <int J>
  static __m256i decode(__m256i raw) {
    return _mm256_srai_epi16(J ? raw : _mm256_slli_epi16(raw, 8), 8);
  }
  static __m256i zero_vec(const uint32_t* sums, int v) { return Avx2::load(sums + v * 8); }
};

}  // namespace

const GemmIsa& gemm_avx2(const Gemm& a) {
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
