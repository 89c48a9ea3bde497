// SPDX-License-Identifier: Apache-2.0
// Weights that are floats of 4 or 8 bits, AVX-512 without BF16, and fp32 activations on every AVX-512: they become
// fp32, 16 channels a register.
//
// Per 64 bytes of e4m3 (64 weights, 16 channels): 1 load, 3 + 4 shifts, 4 ands, 4 multiplications and, for each row,
// 4 multiply-adds; from 32 rows on these are decoded once for all (panel_kernel.h). Of e2m1 (128 weights): 1 load,
// 7 shifts, 8 table permutes and, for each row, 8 multiply-adds: integers of 4 bits with another table.
#include "fp32_dot_avx512.h"
#include "quantize_e4m3.h"

namespace turbo::cpu {
namespace {

template <class I, DType D>
struct E4m3 : Fp32Dot<I, D, DType::f32> {
  static constexpr int kDots = 4;
  static constexpr bool kZeroPoints = false, kPanels = true;
  using Environment = KeepSubnormals;

  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_castps_si512(Avx512::e4m3<J>(raw));
  }
};

template <DType D>
struct Kept8 : E4m3<Kept8<D>, D> {};

struct Rounded8 : E4m3<Rounded8, DType::f32> {
  static constexpr bool kRounded = true, kReadsInPlace = false;
  static constexpr int64_t kManyFrom = 8;  // x is converted anyway

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    QuantizeE4m3<Avx512>::prepare<Fp32Units<Avx512>>(a, x, out);
  }
};

template <DType D, DType S>
struct Kept4 : Fp32Dot<Kept4<D, S>, D, S> {
  static constexpr int kDots = 8;
  static constexpr bool kZeroPoints = false;

  static __m512 table() {
    const __m256 sizes = _mm256_loadu_ps(kE2m1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(sizes), _mm256_xor_ps(sizes, _mm256_set1_ps(-0.0f)), 1);
  }

  /// k = J sits at nibble J/2 of the low (even J) or high (odd J) half of a dword.
  template <int J>
  static __m512i decode(__m512i raw) {
    constexpr int kShift = 4 * (J % 2 * 4 + J / 2);
    const __m512i index = kShift ? _mm512_srli_epi32(raw, kShift) : raw;
    return _mm512_castps_si512(_mm512_permutexvar_ps(index, table()));
  }
};

template <DType D>
const GemmIsa& kept(const Gemm& a) {
  if (a.layout.code == Code::e4m3) return Kernel<Kept8<D>>::kTable;
  return a.scale_dtype == DType::e8m0 ? Kernel<Kept4<D, DType::e8m0>>::kTable
                                      : Kernel<Kept4<D, DType::e4m3>>::kTable;
}

}  // namespace

const GemmIsa& gemm_float_avx512(const Gemm& a) {
  if (a.activations != Activations::kept) return Kernel<Rounded8>::kTable;
  if (a.dtype == DType::bf16) return kept<DType::bf16>(a);
  return a.dtype == DType::f16 ? kept<DType::f16>(a) : kept<DType::f32>(a);
}

}  // namespace turbo::cpu
