// SPDX-License-Identifier: Apache-2.0
// Sums of bf16 products on AVX-512 as tdpbf16ps has them (amx.h), for few rows where AMX multiplies many: the products
// of 32 neighbours in K, even ones and odd ones apart, by fused multiply-adds from 0 on; then both sums, and then the
// group's.
//
// Per 64 bytes of 4-bit weights (128 weights, 16 channels): 1 load, 3 shifts, 4 table permutes, 8 operations that part
// even and odd weights, half an addition and, for each row, 8 multiply-adds; 8 operations on activations for each row
// serve 4 channel tiles.
#pragma once

#include "bf16_units_avx512.h"
#include "gemm_kernel.h"
#include "groups.h"
#include "prepare_kept.h"

namespace turbo::cpu {
namespace {

struct TileSum {
  Vec16 even, odd, sum;
  unsigned environment;  // MXCSR as it was, in the first of several
};

/// `W` decodes pairs (bf16_weights_avx512.h); `D` is the dtype of units, bf16, and `S` that of scales.
template <class I, class W, DType D, DType S>
struct TileOrder : KeptGroups<I, Avx512>, W, Bf16Units<D> {
  using Groups = KeptGroups<I, Avx512>;
  using Acc = TileSum;
  static constexpr int kDots = W::kPairs;
  static constexpr int64_t kFoldDwords = 16 / kDots;
  using Few = RegisterTile<4, 1>;
  using Many = RegisterTile<4, 1>;

  /// Not the intrinsics: these name the order of operands, by which one NaN of several is chosen.
  static void multiply_add(Vec16& sum, __m512i unit, __m512i weights) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(unit), "v"(weights));
  }
  static Vec16 add_to(Vec16 first, Vec16 second) {
    asm("vaddps %1, %0, %0" : "+v"(first) : "v"(second));
    return first;
  }

  static void dot(TileSum& acc, __m512i weights, __m512i unit) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    multiply_add(acc.even, _mm512_slli_epi32(unit, 16), _mm512_slli_epi32(weights, 16));
    multiply_add(acc.odd, _mm512_and_si512(unit, upper), _mm512_and_si512(weights, upper));
  }

  template <int V, int R>
  static inline __attribute__((always_inline)) void start(TileSum (&acc)[V][R], const PreparedX&, int64_t, int64_t,
                                                          const uint32_t*) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[v][r] = {Avx512::zero(), Avx512::zero(), Avx512::zero(), 0};
    acc[0][0].environment = _mm_getcsr();
    _mm_setcsr(acc[0][0].environment | kFlushSubnormals);
    hold(acc);
  }

  /// What comes before stays before the next change of the environment, what comes after stays after the last.
  template <int V, int R>
  static inline __attribute__((always_inline)) void hold(TileSum (&acc)[V][R]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) asm volatile("" : "+v"(acc[v][r].even), "+v"(acc[v][r].odd), "+v"(acc[v][r].sum));
  }

  /// A tile that is not `whole` has products of zeros, too: they make +0 of -0.
  template <int V, int R>
  static inline __attribute__((always_inline)) void fold(TileSum (&acc)[V][R], bool whole) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        TileSum& one = acc[v][r];
        if (!whole) {
          one.even = add_to(one.even, Avx512::zero());
          one.odd = add_to(one.odd, Avx512::zero());
        }
        one.sum = add_to(one.sum, add_to(one.even, one.odd));
        one.even = one.odd = Avx512::zero();
      }
  }

  template <int V, int R>
  static inline __attribute__((always_inline)) void end(Vec16 (&total)[V][R], TileSum (&acc)[V][R], const PreparedX& x,
                                                        int64_t index, int64_t stride, const uint32_t* zero,
                                                        const char* scales) {
    hold(acc);
    _mm_setcsr(acc[0][0].environment);
    Vec16 sums[V][R];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[v][r] = acc[v][r].sum;
        asm volatile("" : "+v"(sums[v][r]));
      }
    Groups::end(total, sums, x, index, stride, zero, scales);
  }

  static Vec16 scale_vec(const char* scale, int v) { return Avx512::load_full<S>(scale + v * 16 * dtype_size(S)); }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    prepare_kept<I>(a, x, out, kDots * Bf16Units<D>::kPlanes);
  }
};

}  // namespace
}  // namespace turbo::cpu
