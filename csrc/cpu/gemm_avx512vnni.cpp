// SPDX-License-Identifier: Apache-2.0
// AVX-512 VNNI, activations as integers: vpdpbusd adds four u8 x s8 products to each lane, exactly.
//
// 8-bit weights are the signed operand as they lie in memory; activations become unsigned by adding 128, which the
// channel's sum of weights takes back. Per 64 bytes of weights (64 weights, 16 channels): 1 load and, for each
// row, 1 dot.
// 4-bit weights are the unsigned operand as codes q + 8; per 64 bytes (128 weights): 1 load, 1 shift, 2 logic
// operations and, for each row, 2 dots.
#include "avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "quantize.h"

namespace turbo::cpu {
namespace {

/// Not the intrinsic, see bf16_dot_avx512.h.
inline void dot_bytes(__m512i& acc, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
}

template <DType S>
struct Integer4 : IntegerGroups<Integer4<S>, Avx512> {
  using Format = Units4<false>;
  static constexpr int kDots = 2, kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<4, 4>;
  // 12 accumulators and 12 totals, nothing spilled: with dots 4 cycles late, 8 are enough.
  using Many = RegisterTile<2, 6>;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  /// Codes q + 8 of the low or the high nibbles: (nibble & 15) ^ 8.
  template <int J>
  static __m512i decode(__m512i raw) {
    const __m512i low = J ? _mm512_srli_epi16(raw, 4) : raw;
    return _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6A);
  }
  static void dot(__m512i& acc, __m512i weights, __m512i unit) { dot_bytes(acc, weights, unit); }
  static __m512i zero_vec(const uint32_t* zero, int v) {
    return _mm512_ternarylogic_epi32(Avx512::zero_nibbles(zero, v), _mm512_set1_epi32(15),
                                     _mm512_set1_epi32(8), 0x6A);
  }
  static Vec16 scale_vec(const char* scale, int v) {
    return Avx512::load_d<S>(scale + v * 16 * dtype_size(S), 16);
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx512>::prepare<Format>(a, x, out);
  }
};

struct Integer8 : IntegerGroups<Integer8, Avx512> {
  using Format = Units8<false>;
  static constexpr int kDots = 1, kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<4, 4>;
  // 24 accumulators; totals only come into being at the end.
  using Many = RegisterTile<4, 6>;
  static int64_t zero_dwords(const Layout&) { return kTileN; }

  template <int J>
  static __m512i decode(__m512i raw) {
    return raw;
  }
  static void dot(__m512i& acc, __m512i weights, __m512i unit) { dot_bytes(acc, unit, weights); }
  static __m512i zero_vec(const uint32_t* sums, int v) { return _mm512_loadu_si512(sums + v * 16); }
  static Vec16 scale_vec(const char* scale, int v) {
    return Avx512::load_d<DType::f32>(scale + v * 64, 16);
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx512>::prepare<Format>(a, x, out);
  }
};

}  // namespace

const GemmIsa& gemm_avx512vnni(const Gemm& a) {
  if (a.layout.bits == 8) return Kernel<Integer8>::kTable;
  if (a.scale_dtype == DType::bf16) return Kernel<Integer4<DType::bf16>>::kTable;
  return a.scale_dtype == DType::f16 ? Kernel<Integer4<DType::f16>>::kTable
                                     : Kernel<Integer4<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
