// SPDX-License-Identifier: Apache-2.0
// AVX-512 without BF16, and fp32 activations on every AVX-512: 4-bit weights become fp32.
//
// Per 64 bytes of weights (128 weights, 16 channels): 1 load, 7 shifts, 8 table permutes and, for each
// row, 8 multiply-adds: bound by the shuffle unit for one row,
// by the multiply-add unit for more.
#include "avx512_io.h"
#include "gemm_u4g_kernel.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Avx512 : Avx512Io<D> {
  using Base = Avx512Io<D>;
  using Vec = __m512;
  using Raw = __m512i;
  static constexpr int kDots = 8, kPlanes = 1;
  static constexpr bool kReadsInPlace = D == DType::f32;
  using Few = RegisterTile<4, 4>;
  using Many = RegisterTile<2, 8>;

  static Raw load(const uint32_t* p) { return _mm512_loadu_si512(p); }

  /// k = J sits at nibble J/2 of the low (even J) or high (odd J) half of a dword.
  template <int J>
  static Raw decode(Raw raw) {
    constexpr int kShift = 4 * (J % 2 * 4 + J / 2);
    const Raw index = kShift ? _mm512_srli_epi32(raw, kShift) : raw;
    return _mm512_castps_si512(_mm512_permutexvar_ps(index, signed_nibbles_f32()));
  }

  static Raw broadcast(const Unit* unit) { return _mm512_set1_epi32(static_cast<int>(*unit)); }

  /// Not the intrinsic, see gemm_u4g_avx512bf16.cpp.
  static void dot(Vec& acc, Raw weights, Raw unit) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(unit));
  }

  static void convert_row(const char* x, int64_t k, uint32_t* units, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = k - i, units_left = count - i;
      const Vec v =
          Base::load_d(x + i * Base::kSize, static_cast<int>(left < 0 ? 0 : left < 16 ? left : 16));
      _mm512_mask_storeu_ps(units + i, first_lanes(units_left < 16 ? static_cast<int>(units_left) : 16),
                            v);
    }
  }

  static float sum_units(const Unit* units, int64_t count) {
    Vec acc = Base::zero();
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i;
      const __mmask16 m = first_lanes(left < 16 ? static_cast<int>(left) : 16);
      acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(m, units + i));
    }
    return _mm512_reduce_add_ps(acc);
  }
};

}  // namespace

const GemmU4gIsa& gemm_u4g_avx512(DType dtype) {
  if (dtype == DType::bf16) return KernelU4g<Avx512<DType::bf16>>::kTable;
  if (dtype == DType::f16) return KernelU4g<Avx512<DType::f16>>::kTable;
  return KernelU4g<Avx512<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
