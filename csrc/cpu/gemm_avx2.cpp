// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C, 8 channels a register.
//
// Activations kept: weights become fp32 by sign extension. Per 64 bytes of 4-bit weights (128 weights, 16
// channels): 2 loads, 14 + 16 shifts, 16 conversions and, for each row, 16 multiply-adds: bound by the decoding
// for one row (46 operations on two or three units). Of 8-bit weights (64): 14 shifts, 8 conversions.
// Activations as integers: 16-bit integers, two per lane, for vpmaddwd and vpaddd (vpmaddubsw saturates).
#include "avx2.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"
#include "quantize.h"

namespace turbo::cpu {
namespace {

template <class I, DType D>
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
    return Avx2::load_full<D>(scale + v * 8 * dtype_size(D));
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

template <DType D>
struct Kept4 : Fp32Dot<Kept4<D>, D> {
  static constexpr int kDots = 8;

  /// Nibble J/2 of the low (even J) or high (odd J) half, moved to the top and back with its sign.
  template <int J>
  static __m256i decode(__m256i raw) {
    constexpr int kLeft = 28 - 4 * (J % 2 * 4 + J / 2);
    const __m256i top = kLeft ? _mm256_slli_epi32(raw, kLeft) : raw;
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28)));
  }
  static Vec8 zero_vec(const uint32_t* zero, int v) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(Avx2::zero_nibbles(zero, v), 28));
  }
};

template <DType D>
struct Kept8 : Fp32Dot<Kept8<D>, D> {
  static constexpr int kDots = 4;

  template <int J>
  static __m256i decode(__m256i raw) {
    const __m256i top = J < 3 ? _mm256_slli_epi32(raw, 24 - 8 * J) : raw;
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24)));
  }
  static Vec8 zero_vec(const uint32_t* zero, int v) {
    return _mm256_cvtepi32_ps(Avx2::zero_bytes(zero, v));
  }
};

template <class I, DType S>
struct WordDot : IntegerGroups<I, Avx2> {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<2, 2>;
  using Many = RegisterTile<1, 4>;

  static void dot(__m256i& acc, __m256i weights, __m256i unit) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(weights, unit));
  }
  static Vec8 scale_vec(const char* scale, int v) {
    return Avx2::load_full<S>(scale + v * 8 * dtype_size(S));
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx2>::template prepare<typename I::Format>(a, x, out);
  }
};

template <DType S>
struct Integer4 : WordDot<Integer4<S>, S> {
  using Format = Units4<true>;
  static constexpr int kDots = 4;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  /// Codes q + 8 of the pair (2J, 2J + 1).
  template <int J>
  static __m256i decode(__m256i raw) {
    const __m256i low = J ? _mm256_srli_epi16(raw, 4 * J) : raw;
    return _mm256_xor_si256(_mm256_and_si256(low, _mm256_set1_epi16(15)), _mm256_set1_epi16(8));
  }
  static __m256i zero_vec(const uint32_t* zero, int v) {
    return _mm256_xor_si256(_mm256_srli_epi32(Avx2::zero_nibbles(zero, v), 28), _mm256_set1_epi32(8));
  }
};

struct Integer8 : WordDot<Integer8, DType::f32> {
  using Format = Units8<true>;
  static constexpr int kDots = 2;
  static int64_t zero_dwords(const Layout&) { return kTileN; }

  /// The even or the odd bytes.
  template <int J>
  static __m256i decode(__m256i raw) {
    return _mm256_srai_epi16(J ? raw : _mm256_slli_epi16(raw, 8), 8);
  }
  static __m256i zero_vec(const uint32_t* sums, int v) { return Avx2::load(sums + v * 8); }
};

}  // namespace

const GemmIsa& gemm_avx2(const Gemm& a) {
  if (a.activations == Activations::kept) {
    if (a.layout.bits == 4) {
      if (a.dtype == DType::bf16) return Kernel<Kept4<DType::bf16>>::kTable;
      return a.dtype == DType::f16 ? Kernel<Kept4<DType::f16>>::kTable : Kernel<Kept4<DType::f32>>::kTable;
    }
    if (a.dtype == DType::bf16) return Kernel<Kept8<DType::bf16>>::kTable;
    return a.dtype == DType::f16 ? Kernel<Kept8<DType::f16>>::kTable : Kernel<Kept8<DType::f32>>::kTable;
  }
  if (a.layout.bits == 8) return Kernel<Integer8>::kTable;
  if (a.scale_dtype == DType::bf16) return Kernel<Integer4<DType::bf16>>::kTable;
  return a.scale_dtype == DType::f16 ? Kernel<Integer4<DType::f16>>::kTable
                                     : Kernel<Integer4<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
