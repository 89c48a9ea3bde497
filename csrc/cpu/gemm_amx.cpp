// SPDX-License-Identifier: Apache-2.0
// Weights that are integers, on AMX tiles; few rows on AVX-512, with the same bits.
//
// Activations kept: weights become bf16, exactly, and tdpbf16ps multiplies them; fp16 activations are two bf16. A B
// tile is 4 lines of 4-bit weights or 8 of 8-bit ones. Per B tile of 4-bit weights: 4 loads, 12 shifts, 16 table
// permutes, 16 stores; of 8-bit weights: 8 loads, 72 shifts, 32 conversions, 16 joins, 16 stores. Activations as
// integers: 8-bit weights are B tiles as they lie in memory, and activations unsigned, as for VNNI. A B tile of 4-bit
// weights is 8 lines: 8 loads, 8 shifts, 16 logic operations, 16 subtractions, 16 stores.
#include "tile_formats.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Kept4 : Bf16Tiles<Kept4<D>, Int4Pairs, D, D> {};

template <DType D>
struct Kept8 : Bf16Tiles<Kept8<D>, Int8Pairs, D, D> {};

template <class I, DType S>
struct ByteTiles : IntegerGroups<I, TileVectors> {
  static constexpr int kPlanes = 1;
  static constexpr bool kReadsInPlace = false, kIntegers = true;

  static auto scale_vec(const char* scale, int v) {
    return TileVectors::load_full<S>(scale + v * TileVectors::kLanes * dtype_size(S));
  }
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    Quantize<TileVectors>::prepare<typename I::Format>(a, x, out);
  }
};

template <DType S>
struct Integer4 : ByteTiles<Integer4<S>, S>, Int4SignedBytes {
  using Format = Units4<false>;
  static constexpr int kLineRows = 2;
  static constexpr bool kDirect = false, kOffsets = false;
  using Groups = IntegerGroups<Integer4<S>, TileVectors>;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  /// Signed weights: symmetric ones leave nothing to take back.
  template <int V, int R, class Acc>
  static inline __attribute__((always_inline)) void start(Acc (&acc)[V][R], const PreparedX& x, int64_t index,
                                                          int64_t stride, const uint32_t* zero) {
    if (zero) return Groups::start(acc, x, index, stride, zero);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[v][r] = TileVectors::int_zero();
  }
  static void decode_line(const uint32_t* line, char* to) { decode_rows<Int4SignedBytes, 2>(load_line(line), to); }
  template <int C, int A, int B>
  static void tile_dot() {
    tile_dot_s8s8<C, A, B>();
  }
};

struct Integer8 : ByteTiles<Integer8, DType::f32> {
  using Format = Units8<false>;
  static constexpr int kLineRows = 1;
  static constexpr bool kDirect = true, kOffsets = true;
  static int64_t zero_dwords(const Layout&) { return kTileN; }

  static void decode_line(const uint32_t* line, char* to) { store_line(to, load_line(line)); }
  template <int C, int A, int B>
  static void tile_dot() {
    tile_dot_u8s8<C, A, B>();
  }
  static Raw zero_vec(const uint32_t* sums, int v) { return load(sums + v * kLanes); }
};

#ifdef TM_TILES_WITH_AVX512
struct Few4 : TileOrder<Few4, Int4Pairs, DType::bf16, DType::bf16> {};
struct Few8 : TileOrder<Few8, Int8Pairs, DType::bf16, DType::bf16> {};

using Bf16Kept4 = FewOnVectors<Kernel<Few4>, TileKernel<Kept4<DType::bf16>>, kTilesFromBf16>;
using Bf16Kept8 = FewOnVectors<Kernel<Few8>, TileKernel<Kept8<DType::bf16>>, kTilesFromBf16>;
template <DType S>
using Bytes4 = FewOnVectors<Kernel<VnniInteger4<S>>, TileKernel<Integer4<S>>, kTilesFromBytes>;
using Bytes8 = FewOnVectors<Kernel<VnniInteger8>, TileKernel<Integer8>, kTilesFromBytes>;
#else
using Bf16Kept4 = TileKernel<Kept4<DType::bf16>>;
using Bf16Kept8 = TileKernel<Kept8<DType::bf16>>;
template <DType S>
using Bytes4 = TileKernel<Integer4<S>>;
using Bytes8 = TileKernel<Integer8>;
#endif

/// Dwords of a group from which on tiles multiply a single row faster than vectors, too: of 128 weights. Every group
/// costs a store of its C tiles.
constexpr int64_t kTilesFromGroup = 16;

}  // namespace

const GemmIsa& gemm_amx(const Gemm& a) {
  if (a.activations == Activations::kept) {
    if (a.layout.bits == 4) {
      if (a.dtype == DType::f16) return TileKernel<Kept4<DType::f16>>::kTable;
      return a.layout.group_dwords() < kTilesFromGroup ? Bf16Kept4::kTable : TileKernel<Kept4<DType::bf16>>::kTable;
    }
    return a.dtype == DType::bf16 ? Bf16Kept8::kTable : TileKernel<Kept8<DType::f16>>::kTable;
  }
  if (a.layout.bits == 8) return Bytes8::kTable;
  if (a.scale_dtype == DType::bf16) return Bytes4<DType::bf16>::kTable;
  return a.scale_dtype == DType::f16 ? Bytes4<DType::f16>::kTable : Bytes4<DType::f32>::kTable;
}

}  // namespace turbo::cpu
