// SPDX-License-Identifier: Apache-2.0
// Weights that are floats of 8 bits, AVX-512 with BF16 and VBMI: e4m3 becomes bf16, exactly, through two tables of 128
// bytes: the lower and the upper byte of the bf16 of each size.
//
// Per 64 bytes (64 weights, 16 channels): 1 load, 2 shuffles, 4 table permutes, 2 ternary operations and, for each
// row, 2 dots. One row is bound by memory, or by the 6 operations on the unit that permutes where a line takes less
// than 6 cycles to arrive; many rows by the dots.
#include "bf16_dot_avx512.h"
#include "e4m3_weights_avx512vbmi.h"
#include "quantize_e4m3.h"

namespace turbo::cpu {
namespace {

template <class I, DType D>
struct E4m3 : Bf16Dot<I, D, DType::f32>, E4m3Pairs {
  static constexpr int kDots = kPairs;
  static constexpr bool kZeroPoints = false;
  static constexpr int64_t kManyFrom = 5;  // decoding is the bound for few rows
};

template <DType D>
struct Kept8 : E4m3<Kept8<D>, D> {};

struct Rounded8 : E4m3<Rounded8, DType::bf16> {
  static constexpr bool kRounded = true, kReadsInPlace = false;

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    QuantizeE4m3<Avx512>::prepare<RoundedBf16Units>(a, x, out);
  }
};

}  // namespace

const GemmIsa& gemm_float_avx512vbmi(const Gemm& a) {
  if (a.activations != Activations::kept) return Kernel<Rounded8>::kTable;
  return a.dtype == DType::bf16 ? Kernel<Kept8<DType::bf16>>::kTable : Kernel<Kept8<DType::f16>>::kTable;
}

}  // namespace turbo::cpu
