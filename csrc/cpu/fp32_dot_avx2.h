// SPDX-License-Identifier: Apache-2.0
// Products in fp32, 8 channels a register: what the AVX2 kernels share whose weights become fp32.
#pragma once

#include "avx2.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"

namespace turbo::cpu {
namespace {

/// `D` is the dtype of x, `S` that of scales.
template <class I, DType D, DType S = D>
struct Fp32Dot : KeptGroups<I, Avx2> {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsInPlace = D == DType::f32;
  // Few: 2 tiles x 2 vectors x 2 rows = 8 accumulators, 4 weights, 1 activation of 16 registers.
  // Many: 1 tile x 2 vectors x 5 rows = 10, 2 and 1: the decoding is shared by more rows.
  using Few = RegisterTile<2, 2>;
  using Many = RegisterTile<1, 5>;

  static void dot(Vec8& acc, __m256i weights, __m256i unit) {
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(weights), _mm256_castsi256_ps(unit), acc);
  }

  static Vec8 scale_vec(const char* scale, int v) {
    return Avx2::load_full<S>(scale + v * 8 * dtype_size(S));
  }

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    prepare_kept<I>(a, x, out, I::kDots);
  }

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) {
      const int64_t left = k - i, units_left = count - i;
      const Vec8 v = Avx2::load_d<D>(x + i * dtype_size(D), static_cast<int>(left < 8 ? left : 8));
      if (units_left >= 8) {
        _mm256_storeu_ps(reinterpret_cast<float*>(units + i), v);
      } else {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, v);
        __builtin_memcpy(units + i, lanes, units_left * 4);
      }
    }
  }

  static float sum_units(const Unit* units, int64_t count) {
    Vec8 acc = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) {
      const char* from = reinterpret_cast<const char*>(units + i);
      acc = _mm256_add_ps(acc, Avx2::load_d<DType::f32>(from, static_cast<int>(count - i < 8 ? count - i : 8)));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, acc);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
           ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }
};

}  // namespace
}  // namespace turbo::cpu
