// SPDX-License-Identifier: Apache-2.0
// Products of bytes on AVX-512 VNNI, for Kernel of gemm_kernel.h. gemm_avx512vnni.cpp says what they cost.
#pragma once

#include "avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "int4_bytes_avx512.h"
#include "quantize.h"

namespace turbo::cpu {
namespace {

/// Not the intrinsic, see bf16_dot_avx512.h.
inline void dot_bytes(__m512i& acc, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
}

template <DType S>
struct VnniInteger4 : IntegerGroups<VnniInteger4<S>, Avx512>, Int4Bytes {
  using Format = Units4<false>;
  static constexpr int kDots = 2, kPlanes = 1;
  static constexpr bool kReadsInPlace = false;
  using Few = RegisterTile<4, 4>;
  // 12 accumulators and 12 totals, nothing spilled: with dots 4 cycles late, 8 are enough.
  using Many = RegisterTile<2, 6>;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  static void dot(__m512i& acc, __m512i weights, __m512i unit) { dot_bytes(acc, weights, unit); }
  static Vec16 scale_vec(const char* scale, int v) { return Avx512::load_d<S>(scale + v * 16 * dtype_size(S), 16); }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx512>::prepare<Format>(a, x, out);
  }
};

struct VnniInteger8 : IntegerGroups<VnniInteger8, Avx512> {
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
  static Vec16 scale_vec(const char* scale, int v) { return Avx512::load_d<DType::f32>(scale + v * 64, 16); }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<Avx512>::prepare<Format>(a, x, out);
  }
};

}  // namespace
}  // namespace turbo::cpu
