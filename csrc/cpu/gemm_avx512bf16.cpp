// SPDX-License-Identifier: Apache-2.0
// AVX-512 with BF16, activations kept: weights become exact bf16 integers, two per lane, for vdpbf16ps.
//
// Per 64 bytes of 4-bit weights (128 weights, 16 channels): 1 load, 3 shifts, 4 table permutes and, for each
// row, 4 dots; a broadcast of activations serves 4 tiles (2 for many rows). One row is bound by memory (12
// vector operations on a line that takes 7 to 14 cycles to arrive); from 3 to 8 rows on the dot units are
// the limit (one dot a cycle on Zen 4, two on Zen 5).
//
// Per 64 bytes of 8-bit weights (64 weights): 1 load, 9 shifts, 4 conversions, 2 joins and, for each row, 2 dots.
#include "bf16_dot_avx512.h"
#include "bf16_weights_avx512.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Kept4 : Bf16Dot<Kept4<D>, D>, Int4Pairs {
  static constexpr int kDots = kPairs;
};

template <DType D>
struct Kept8 : Bf16Dot<Kept8<D>, D>, Int8Pairs {
  static constexpr int kDots = kPairs;
  static constexpr int64_t kManyFrom = 5;  // decoding is the bound for few rows
};

}  // namespace

const GemmIsa& gemm_avx512bf16(const Gemm& a) {
  if (a.layout.bits == 4)
    return a.dtype == DType::bf16 ? Kernel<Kept4<DType::bf16>>::kTable : Kernel<Kept4<DType::f16>>::kTable;
  return a.dtype == DType::bf16 ? Kernel<Kept8<DType::bf16>>::kTable : Kernel<Kept8<DType::f16>>::kTable;
}

}  // namespace turbo::cpu
