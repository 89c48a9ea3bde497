// SPDX-License-Identifier: Apache-2.0
// From a call's arguments to the kernel of its tile and group size; one translation unit for each dtype.
#pragma once

#include "launch.h"
#include "linear.h"
#include "tiles.h"
#include "w4a16.h"

namespace turbo::cuda {

inline bool aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * 2 % 16 == 0;
}

inline W4A16Params w4a16_params(const Linear& a, const LinearPlan& plan) {
  const Layout& l = a.layout;
  const int rows = static_cast<int>(a.rows), n = static_cast<int>(l.n), k = static_cast<int>(l.k);
  W4A16Params p{};
  p.x = {static_cast<const uint16_t*>(a.x), a.x_stride, rows, k, aligned(a.x, a.x_stride)};
  p.y = {static_cast<uint16_t*>(a.y), static_cast<const uint16_t*>(a.bias), a.y_stride, rows, n,
         aligned(a.y, a.y_stride)};
  p.slices = {plan.slices.count, plan.slices.slabs, plan.apart, static_cast<Float4*>(a.sums),
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

template <class Type, class Tile, bool SmallGroups>
Error launch_w4a16_tile(const Linear& args, const LinearPlan& plan, Stream stream) {
  const auto tiles = [](int64_t size, int64_t tile) { return static_cast<unsigned>((size + tile - 1) / tile); };
  const unsigned parts = plan.apart ? static_cast<unsigned>(plan.slices.count) : 1;
  const Grid grid{tiles(args.layout.padded_n(), Tile::kChannels) * parts, tiles(args.rows, Tile::kRows)};
  return launch<W4A16<Type, Tile, SmallGroups>>(grid, w4a16_params(args, plan), stream);
}

template <class Type, class Tile>
Error launch_w4a16_groups(const Linear& args, const LinearPlan& plan, Stream stream) {
  if (!args.layout.small_groups()) return launch_w4a16_tile<Type, Tile, false>(args, plan, stream);
  return launch_w4a16_tile<Type, typename SmallGroupTile<Tile>::Shape, true>(args, plan, stream);
}

template <class Type>
Error launch_w4a16(const Linear& args, const LinearPlan& plan, Stream stream) {
  int tile = 0;
#define TM_LAUNCH(...) \
  if (tile++ == plan.tile) return launch_w4a16_groups<Type, TileShape<__VA_ARGS__>>(args, plan, stream);
  TM_TILES(TM_LAUNCH)
#undef TM_LAUNCH
  return "w4a16_linear: tile " + std::to_string(plan.tile) + ": expected 0 to " + std::to_string(tile - 1);
}

Error launch_w4a16_f16(const Linear& args, const LinearPlan& plan, Stream stream);
Error launch_w4a16_bf16(const Linear& args, const LinearPlan& plan, Stream stream);

}  // namespace turbo::cuda
