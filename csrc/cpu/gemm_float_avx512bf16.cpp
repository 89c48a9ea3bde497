// SPDX-License-Identifier: Apache-2.0
// Weights that are floats of 4 bits, AVX-512 with BF16: as gemm_avx512bf16.cpp has it for integers of 4 bits, with
// another table. e2m1 is exact in bf16.
#include "bf16_dot_avx512.h"

namespace turbo::cpu {
namespace {

/// bf16 of the 16 codes, twice; a dword holds two entries.
inline __m512i e2m1_bf16() {
  const __m256i once = _mm256_setr_epi32(0x3F000000, 0x3FC03F80, 0x40404000, 0x40C04080,
                                         static_cast<int>(0xBF008000), static_cast<int>(0xBFC0BF80),
                                         static_cast<int>(0xC040C000), static_cast<int>(0xC0C0C080));
  return _mm512_broadcast_i64x4(once);
}

template <DType D, DType S>
struct Kept4 : Bf16Dot<Kept4<D, S>, D, S> {
  static constexpr int kDots = 4;
  static constexpr bool kZeroPoints = false;

  /// vpermw looks at the low 5 bits of a lane, the topmost of which belongs to the next weight.
  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_permutexvar_epi16(J ? _mm512_srli_epi16(raw, 4 * J) : raw, e2m1_bf16());
  }
};

template <DType D>
const GemmIsa& kept(const Gemm& a) {
  return a.scale_dtype == DType::e8m0 ? Kernel<Kept4<D, DType::e8m0>>::kTable
                                      : Kernel<Kept4<D, DType::e4m3>>::kTable;
}

}  // namespace

const GemmIsa& gemm_float_avx512bf16(const Gemm& a) {
  return a.dtype == DType::bf16 ? kept<DType::bf16>(a) : kept<DType::f16>(a);
}

}  // namespace turbo::cpu
