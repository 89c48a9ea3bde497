// SPDX-License-Identifier: Apache-2.0
// Products in fp32, 16 channels a register: what the AVX-512 kernels share whose weights become fp32.
#pragma once

#include "avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"

namespace turbo::cpu {
namespace {

/// `D` is the dtype of x, `S` that of scales.
template <class I, DType D, DType S = D>
struct Fp32Dot : KeptGroups<I, Avx512> {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsInPlace = D == DType::f32;
  using Few = RegisterTile<4, 4>;
  using Many = RegisterTile<2, 8>;

  /// Not the intrinsic, see bf16_dot_avx512.h.
  static void dot(Vec16& acc, __m512i weights, __m512i unit) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(unit));
  }

  static Vec16 scale_vec(const char* scale, int v) {
    return Avx512::load_full<S>(scale + v * 16 * dtype_size(S));
  }

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    prepare_kept<I>(a, x, out, I::kDots);
  }

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = k - i, units_left = count - i;
      const Vec16 v = Avx512::load_d<D>(x + i * dtype_size(D),
                                        static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16));
      _mm512_mask_storeu_ps(units + i, first_lanes(units_left < 16 ? static_cast<int>(units_left) : 16),
                            v);
    }
  }

  static float sum_units(const Unit* units, int64_t count) {
    Vec16 acc = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i;
      const __mmask16 m = first_lanes(left < 16 ? static_cast<int>(left) : 16);
      acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(m, units + i));
    }
    return _mm512_reduce_add_ps(acc);
  }
};

}  // namespace
}  // namespace turbo::cpu
