// SPDX-License-Identifier: Apache-2.0
// The registry of tile shapes. A shape may change speed, never bits: all sum over K in the order that gemm.h names.
#pragma once

#include "tile_shape.h"

namespace turbo::cuda {

/// Calls X(channels, rows, warps along channels, warps along rows, stages, blocks of a multiprocessor), smallest first.
/// Stages are what keeps memory busy while few rows are multiplied; shared memory stays below the 99 KiB that a block
/// of sm_86 and sm_89 may have.
#define TM_TILES(X)         \
  X(128, 8, 4, 1, 6, 3)     \
  X(128, 16, 4, 1, 6, 3)    \
  X(128, 32, 4, 1, 4, 2)    \
  X(128, 64, 4, 1, 4, 2)    \
  X(128, 128, 4, 2, 4, 1)

/// The shape that takes a shape's place for groups of 32, whose totals and sums are all alive at once: where a warp has
/// eight columns it gets four, or registers would not suffice. Of 128 rows there are then half as many channels, as a
/// block of 16 warps has no more registers for a thread either.
template <class Tile>
struct SmallGroupTile {
  using Shape = Tile;
};
template <int Channels, int Stages, int MinBlocks>
struct SmallGroupTile<TileShape<Channels, 64, 4, 1, Stages, MinBlocks>> {
  using Shape = TileShape<Channels, 64, 4, 2, Stages, 1>;
};
template <int Channels, int Stages, int MinBlocks>
struct SmallGroupTile<TileShape<Channels, 128, 4, 2, Stages, MinBlocks>> {
  using Shape = TileShape<Channels / 2, 128, 2, 4, Stages, 1>;
};

/// A shape, or what takes its place.
template <class Tile, bool SmallGroups>
struct TileOf {
  using Shape = Tile;
};
template <class Tile>
struct TileOf<Tile, true> : SmallGroupTile<Tile> {};

#define TM_COUNT_TILE(...) +1
inline constexpr int kTileCount = 0 TM_TILES(TM_COUNT_TILE);
#undef TM_COUNT_TILE

}  // namespace turbo::cuda
