// SPDX-License-Identifier: Apache-2.0
// Weights that are floats of 4 or 8 bits, AVX2 with FMA and F16C, 8 channels a register: they become fp32.
//
// Per 64 bytes of e4m3 (64 weights, 16 channels): 2 loads, 6 + 8 shifts, 8 ands, 8 multiplications and, for each row,
// 8 multiply-adds. Of e2m1 (128 weights): 2 loads, 28 shifts, 16 permutes, 16 ands, 16 ors and, for each row, 16
// multiply-adds. Both are bound by the decoding for one row, and decoded once for 32 rows and more (panel_kernel.h).
#include "fp32_dot_avx2.h"
#include "quantize_e4m3.h"

namespace turbo::cpu {
namespace {

template <class I, DType D>
struct E4m3 : Fp32Dot<I, D, DType::f32> {
  static constexpr int kDots = 4;
  static constexpr bool kZeroPoints = false, kPanels = true;
  using Environment = KeepSubnormals;

  template <int J>
  static __m256i decode(__m256i raw) {
    return _mm256_castps_si256(Avx2::e4m3<J>(raw));
  }
};

template <DType D>
struct Kept8 : E4m3<Kept8<D>, D> {};

struct Rounded8 : E4m3<Rounded8, DType::f32> {
  static constexpr bool kRounded = true, kReadsInPlace = false;
  static constexpr int64_t kManyFrom = 8;  // x is converted anyway

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    QuantizeE4m3<Avx2>::prepare<Fp32Units<Avx2>>(a, x, out);
  }
};

template <DType D, DType S>
struct Kept4 : Fp32Dot<Kept4<D, S>, D, S> {
  static constexpr int kDots = 8;
  static constexpr bool kZeroPoints = false, kPanels = true;

  /// k = J sits at nibble J/2 of the low (even J) or high (odd J) half of a dword; vpermps looks at the low 3 bits.
  template <int J>
  static __m256i decode(__m256i raw) {
    constexpr int kShift = 4 * (J % 2 * 4 + J / 2);
    const __m256i index = kShift ? _mm256_srli_epi32(raw, kShift) : raw;
    const __m256i top = kShift < 28 ? _mm256_slli_epi32(raw, 28 - kShift) : raw;
    const Vec8 size = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2m1), index);
    return _mm256_or_si256(_mm256_castps_si256(size),
                           _mm256_and_si256(top, _mm256_set1_epi32(static_cast<int>(0x80000000))));
  }
};

template <DType D>
const GemmIsa& kept(const Gemm& a) {
  if (a.layout.code == Code::e4m3) return Kernel<Kept8<D>>::kTable;
  return a.scale_dtype == DType::e8m0 ? Kernel<Kept4<D, DType::e8m0>>::kTable
                                      : Kernel<Kept4<D, DType::e4m3>>::kTable;
}

}  // namespace

const GemmIsa& gemm_float_avx2(const Gemm& a) {
  if (a.activations != Activations::kept) return Kernel<Rounded8>::kTable;
  if (a.dtype == DType::bf16) return kept<DType::bf16>(a);
  return a.dtype == DType::f16 ? kept<DType::f16>(a) : kept<DType::f32>(a);
}

}  // namespace turbo::cpu
