// SPDX-License-Identifier: Apache-2.0
// Products of bf16 pairs, 16 channels a register: what the AVX-512 BF16 kernels share.
#pragma once

#include "avx512.h"
#include "bf16_units_avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"

namespace turbo::cpu {
namespace {

/// `D` is the dtype of x, `S` that of scales.
template <class I, DType D, DType S = D>
struct Bf16Dot : KeptGroups<I, Avx512>, Bf16Units<D> {
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
    return Avx512::load_full<S>(scale + v * 16 * dtype_size(S));
  }

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    prepare_kept<I>(a, x, out, I::kDots * I::kPlanes);
  }
};

}  // namespace
}  // namespace turbo::cpu
