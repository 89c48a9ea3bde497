// SPDX-License-Identifier: Apache-2.0
// AVX-512 VNNI, activations as integers: vpdpbusd adds four u8 x s8 products to each lane, exactly.
//
// 8-bit weights are the signed operand as they lie in memory; activations become unsigned by adding 128, which the
// channel's sum of weights takes back. Per 64 bytes of weights (64 weights, 16 channels): 1 load and, for each
// row, 1 dot.
// 4-bit weights are the unsigned operand as codes q + 8; per 64 bytes (128 weights): 1 load, 1 shift, 2 logic
// operations and, for each row, 2 dots.
#include "integer_avx512vnni.h"

namespace turbo::cpu {

const GemmIsa& gemm_avx512vnni(const Gemm& a) {
  if (a.layout.bits == 8) return Kernel<VnniInteger8>::kTable;
  if (a.scale_dtype == DType::bf16) return Kernel<VnniInteger4<DType::bf16>>::kTable;
  return a.scale_dtype == DType::f16 ? Kernel<VnniInteger4<DType::f16>>::kTable
                                     : Kernel<VnniInteger4<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
