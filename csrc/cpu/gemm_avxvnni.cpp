// SPDX-License-Identifier: Apache-2.0
// AVX-VNNI, activations as integers: the byte dot of gemm_avx512vnni.cpp on 256-bit registers, for processors
// without AVX-512. Per 64 bytes of 4-bit weights: 2 loads, 2 shifts, 8 logic operations and, for each row, 4 dots.
#include "avx2.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "quantize.h"

namespace turbo::cpu {
namespace {

inline void dot_bytes(__m256i& acc, __m256i unsigned_bytes, __m256i signed_bytes) {
  acc = _mm256_dpbusd_avx_epi32(acc, unsigned_bytes, signed_bytes);
}

template <DType S>
struct Integer4 : IntegerGroups<Integer4<S>, Avx2> {
  using Format = Units4<false>;
  static constexpr int kDots = 2, kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<2, 2>;
  using Many = RegisterTile<1, 4>;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  template <int J>
  static __m256i decode(__m256i raw) {
    const __m256i low = J ? _mm256_srli_epi16(raw, 4) : raw;
    return _mm256_xor_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
  }
  static void dot(__m256i& acc, __m256i weights, __m256i unit) { dot_bytes(acc, weights, unit); }
  static __m256i zero_vec(const uint32_t* zero, int v) {
    return _mm256_xor_si256(_mm256_srli_epi32(Avx2::zero_nibbles(zero, v), 28), _mm256_set1_epi32(8));
  }
  static Vec8 scale_vec(const char* scale, int v) {
    return Avx2::load_full<S>(scale + v * 8 * dtype_size(S));
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx2>::prepare<Format>(a, x, out);
  }
};

struct Integer8 : IntegerGroups<Integer8, Avx2> {
  using Format = Units8<false>;
  static constexpr int kDots = 1, kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<2, 2>;
  using Many = RegisterTile<1, 5>;
  static int64_t zero_dwords(const Layout&) { return kTileN; }

  template <int J>
  static __m256i decode(__m256i raw) {
    return raw;
  }
  static void dot(__m256i& acc, __m256i weights, __m256i unit) { dot_bytes(acc, unit, weights); }
  static __m256i zero_vec(const uint32_t* sums, int v) { return Avx2::load(sums + v * 8); }
  static Vec8 scale_vec(const char* scale, int v) { return Avx2::load_full<DType::f32>(scale + v * 32); }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx2>::prepare<Format>(a, x, out);
  }
};

}  // namespace

const GemmIsa& gemm_avxvnni(const Gemm& a) {
  if (a.layout.bits == 8) return Kernel<Integer8>::kTable;
  if (a.scale_dtype == DType::bf16) return Kernel<Integer4<DType::bf16>>::kTable;
  return a.scale_dtype == DType::f16 ? Kernel<Integer4<DType::f16>>::kTable
                                     : Kernel<Integer4<DType::f32>>::kTable;
}

}  // namespace turbo::cpu
