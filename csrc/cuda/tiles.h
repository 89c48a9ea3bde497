// SPDX-License-Identifier: Apache-2.0
// The registry of tile shapes. A shape may change speed, never bits: all sum over K in the order that gemm.h names.
#pragma once

#include "tile_shape.h"

namespace turbo::cuda {

/// Calls X(family, channels, rows, warps along channels, warps along rows, stages, blocks of a multiprocessor), fewest rows
/// first in each family. Channels of few bits are cheaper to bring than rows of x: with wgmma, where L2 may be the limit,
/// 256 channels meet 64 rows, too. Stages are what keeps memory busy while few rows are multiplied; shared memory of the
/// first family stays below the 99 KiB that a block of sm_86 and sm_89 may have. No device runs both: mma.sync and wgmma are not
/// known to sum in the same order, and a row must have its bits in every tile.
#define TM_TILES(X)                      \
  X(Family::mma, 128, 8, 4, 1, 6, 3)     \
  X(Family::mma, 128, 16, 4, 1, 6, 3)    \
  X(Family::mma, 128, 32, 4, 1, 4, 2)    \
  X(Family::mma, 128, 64, 4, 1, 4, 2)    \
  X(Family::mma, 128, 128, 4, 2, 4, 1)   \
  X(Family::wgmma, 128, 8, 4, 1, 8, 3)   \
  X(Family::wgmma, 128, 16, 4, 1, 8, 3)  \
  X(Family::wgmma, 128, 32, 4, 1, 6, 2)  \
  X(Family::wgmma, 128, 64, 4, 1, 6, 2)  \
  X(Family::wgmma, 256, 64, 8, 1, 6, 1)  \
  X(Family::wgmma, 128, 128, 8, 1, 6, 1)

/// The shape that takes a shape's place for groups of 32 with mma.sync, whose totals and sums are all alive at once: where a warp has
/// eight columns it gets four, or registers would not suffice. Of 128 rows there are then half as many channels, as a
/// block of 16 warps has no more registers for a thread either.
template <class Tile>
struct SmallGroupTile {
  using Shape = Tile;
};
template <int Channels, int Stages, int MinBlocks>
struct SmallGroupTile<TileShape<Family::mma, Channels, 64, 4, 1, Stages, MinBlocks>> {
  using Shape = TileShape<Family::mma, Channels, 64, 4, 2, Stages, 1>;
};
template <int Channels, int Stages, int MinBlocks>
struct SmallGroupTile<TileShape<Family::mma, Channels, 128, 4, 2, Stages, MinBlocks>> {
  using Shape = TileShape<Family::mma, Channels / 2, 128, 2, 4, Stages, 1>;
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
#define TM_COUNT_MMA(Multiplies, ...) +(Multiplies == Family::mma)
inline constexpr int kMmaTiles = 0 TM_TILES(TM_COUNT_MMA);  // the first ones
#undef TM_COUNT_MMA

}  // namespace turbo::cuda
