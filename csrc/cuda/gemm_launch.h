// SPDX-License-Identifier: Apache-2.0
// From a call's arguments to the kernel of its tile; one translation unit for each Op.
#pragma once

#include "gemm.h"
#include "launch.h"
#include "linear.h"
#include "tiles.h"

namespace turbo::cuda {

inline bool aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * 2 % 16 == 0;
}

inline Rows16 rows16(const void* x, int64_t stride, int64_t k) {
  return {static_cast<const uint16_t*>(x), stride, static_cast<int>(k), aligned(x, stride)};
}

/// All but x and the finish.
template <class Op>
GemmParams<Op> gemm_params(const Linear& a, const LinearPlan& plan) {
  const Layout& l = a.layout;
  GemmParams<Op> p{};
  p.rows = static_cast<int>(a.rows);
  p.y = {static_cast<uint16_t*>(a.y), static_cast<const uint16_t*>(a.bias), a.y_stride, static_cast<int>(l.n),
         aligned(a.y, a.y_stride)};
  p.slices = {plan.slices.count, plan.slices.slabs, plan.apart, static_cast<Vec4*>(a.sums),
              static_cast<uint32_t*>(a.arrived)};
  p.weight = static_cast<const Vec4*>(a.weight);
  p.scale = static_cast<const Vec4*>(a.scale);
  p.zero = static_cast<const Vec4*>(a.zero);
  p.blocks = static_cast<int>(l.blocks());
  p.slabs = static_cast<int>(l.slabs());
  p.group_slabs = l.small_groups() ? 1 : static_cast<int>(l.group_slabs());
  p.scale_rows = static_cast<int>(l.scale_rows());
  return p;
}

template <class Op, class Tile, Groups kGroups>
Error launch_tile(const GemmParams<Op>& p, Stream stream) {
  const auto tiles = [](int size, int tile) { return static_cast<unsigned>((size + tile - 1) / tile); };
  const unsigned parts = p.slices.apart ? static_cast<unsigned>(p.slices.count) : 1;
  const Grid grid{tiles(p.blocks * kBlockChannels, Tile::kChannels) * parts, tiles(p.rows, Tile::kRows)};
  return launch<Gemm<Op, Tile, kGroups>>(grid, p, stream);
}

/// The tile that `plan` names.
template <class Op, Groups kGroups>
Error launch_gemm(const GemmParams<Op>& params, const LinearPlan& plan, Stream stream) {
  int tile = 0;
#define TM_LAUNCH(...)                                                                       \
  if (tile++ == plan.tile) {                                                                 \
    using Large = TileShape<__VA_ARGS__>;                                                    \
    using Tile = typename TileOf<Large, kGroups == Groups::small>::Shape;                    \
    return launch_tile<Op, Tile, kGroups>(params, stream);                                   \
  }
  TM_TILES(TM_LAUNCH)
#undef TM_LAUNCH
  return Op::name() + ">: tile " + std::to_string(plan.tile) + ": expected 0 to " + std::to_string(tile - 1);
}

Error launch_w4a16_f16(const Linear& args, const LinearPlan& plan, Stream stream);
Error launch_w4a16_bf16(const Linear& args, const LinearPlan& plan, Stream stream);
Error launch_w4a8(const LinearA8& args, const LinearPlan& plan, Stream stream);
Error launch_w8a8(const LinearA8& args, const LinearPlan& plan, Stream stream);

}  // namespace turbo::cuda
