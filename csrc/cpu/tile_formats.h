// SPDX-License-Identifier: Apache-2.0
// What the formats on AMX tiles share: the vectors, decoding of lines, preparation of activations. The
// vectors are AVX-512, which every processor with AMX has; with TM_AMX_SIMULATOR on a lesser one, AVX2 and plain loops.
#pragma once

#include "groups.h"
#include "prepare_kept.h"
#include "quantize_e4m3.h"
#include "tile_kernel.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include "bf16_units_avx512.h"
#include "bf16_weights_avx512.h"
#include "e4m3_weights_avx512vbmi.h"
#include "integer_avx512vnni.h"
#include "tile_order_avx512.h"
#else
#include "tile_formats_avx2.h"
#endif

namespace turbo::cpu {
namespace {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define TM_TILES_WITH_AVX512
using TileVectors = Avx512;
using Line = __m512i;
inline Line load_line(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store_line(char* p, Line line) { _mm512_store_si512(p, line); }
#endif

/// Rows from which on tiles are faster than vectors, by measurement (docs/benchmarks_amx.md has the processor).
constexpr int64_t kTilesFromBf16 = 2, kTilesFromBytes = 6;

/// The rows of B that `W` makes of a line, 64 bytes apart.
template <class W, int Rows, int J = 0>
[[gnu::always_inline]] inline void decode_rows(Line line, char* to) {
  store_line(to + J * kTileRowBytes, W::template decode<J>(line));
  if constexpr (J + 1 < Rows) decode_rows<W, Rows, J + 1>(line, to);
}

/// Activations kept, or rounded to e4m3, and weights `W` as bf16. `D` is the dtype of the units, `S` that of scales.
template <class I, class W, DType D, DType S>
struct Bf16Tiles : KeptGroups<I, TileVectors>, W, Bf16Units<D> {
  static constexpr int kLineRows = W::kPairs;
  static constexpr bool kDirect = false, kIntegers = false, kOffsets = false;

  static void decode_line(const uint32_t* line, char* to) { decode_rows<W, kLineRows>(load_line(line), to); }
  template <int C, int A, int B>
  static void tile_dot() {
    tile_dot_bf16<C, A, B>();
  }
  static auto scale_vec(const char* scale, int v) {
    return TileVectors::template load_full<S>(scale + v * TileVectors::kLanes * dtype_size(S));
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    prepare_kept<I>(a, x, out, kLineRows * Bf16Units<D>::kPlanes);
  }
};

}  // namespace
}  // namespace turbo::cpu
