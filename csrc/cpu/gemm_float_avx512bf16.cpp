// SPDX-License-Identifier: Apache-2.0
// Weights that are floats of 4 bits, AVX-512 with BF16: as gemm_avx512bf16.cpp has it for integers of 4 bits, with
// another table. e2m1 is exact in bf16.
#include "bf16_dot_avx512.h"
#include "bf16_weights_avx512.h"

namespace turbo::cpu {
namespace {

template <DType D, DType S>
struct Kept4 : Bf16Dot<Kept4<D, S>, D, S>, E2m1Pairs {
  static constexpr int kDots = kPairs;
  static constexpr bool kZeroPoints = false;
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
