// SPDX-License-Identifier: Apache-2.0
// Weights that are floats of 4 or 8 bits, on AMX tiles: they become bf16, exactly; few rows as in gemm_amx.cpp. A B
// tile is 4 lines of e2m1 or 8 of e4m3.
#include <type_traits>

#include "tile_formats.h"

namespace turbo::cpu {
namespace {

template <DType D>
struct Kept8 : Bf16Tiles<Kept8<D>, E4m3Pairs, D, DType::f32> {
  static constexpr bool kZeroPoints = false;
};

struct Rounded8 : Bf16Tiles<Rounded8, E4m3Pairs, DType::bf16, DType::f32> {
  static constexpr bool kZeroPoints = false, kRounded = true, kReadsInPlace = false;

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    QuantizeE4m3<TileVectors>::prepare<RoundedBf16Units>(a, x, out);
  }
};

template <DType D, DType S>
struct Kept4 : Bf16Tiles<Kept4<D, S>, E2m1Pairs, D, S> {
  static constexpr bool kZeroPoints = false;
};

#ifdef TM_TILES_WITH_AVX512
template <class I, DType S>
struct FewFloats : TileOrder<I, std::conditional_t<S == DType::f32, E4m3Pairs, E2m1Pairs>, DType::bf16, S> {
  static constexpr bool kZeroPoints = false;
};
template <DType S>
struct FewKept : FewFloats<FewKept<S>, S> {};
struct FewRounded : FewFloats<FewRounded, DType::f32> {
  static constexpr bool kRounded = true, kReadsInPlace = false;

  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) { Rounded8::prepare_row(a, x, out); }
};

template <DType S>
using Bf16Kept =
    FewOnVectors<Kernel<FewKept<S>>,
                 TileKernel<std::conditional_t<S == DType::f32, Kept8<DType::bf16>, Kept4<DType::bf16, S>>>,
                 kTilesFromBf16>;
using Rounded = FewOnVectors<Kernel<FewRounded>, TileKernel<Rounded8>, kTilesFromBf16>;
#else
template <DType S>
using Bf16Kept = TileKernel<std::conditional_t<S == DType::f32, Kept8<DType::bf16>, Kept4<DType::bf16, S>>>;
using Rounded = TileKernel<Rounded8>;
#endif

template <DType S>
const GemmIsa& kept(const Gemm& a) {
  using Half = TileKernel<std::conditional_t<S == DType::f32, Kept8<DType::f16>, Kept4<DType::f16, S>>>;
  return a.dtype == DType::bf16 ? Bf16Kept<S>::kTable : Half::kTable;
}

}  // namespace

const GemmIsa& gemm_float_amx(const Gemm& a) {
  if (a.activations != Activations::kept) return Rounded::kTable;
  if (a.layout.code == Code::e4m3) return kept<DType::f32>(a);
  return a.scale_dtype == DType::e8m0 ? kept<DType::e8m0>(a) : kept<DType::e4m3>(a);
}

}  // namespace turbo::cpu
