// SPDX-License-Identifier: Apache-2.0
// The shape of what one block of threads computes, and how its warps share it.
#pragma once

#include "device.h"
#include "layout.h"

namespace turbo::cuda {

/// What multiplies: mma.sync, each warp for itself, or wgmma, four warps that stand side by side together.
enum class Family { mma, wgmma };

/// A block's tile has Channels output channels and Rows rows of x. Warps stand in a grid: WarpsN side by side along
/// the channels, the others along the rows. Stages slabs are on their way or in use at a time.
template <Family Multiplies, int Channels, int Rows, int WarpsN, int WarpsM, int Stages, int MinBlocks>
struct TileShape {
  static constexpr Family kFamily = Multiplies;
  static constexpr int kChannels = Channels, kRows = Rows, kWarpsN = WarpsN, kStages = Stages, kMinBlocks = MinBlocks;
  static constexpr int kThreads = 32 * WarpsN * WarpsM;
  static constexpr int kSlabs = Channels / kSlabChannels / WarpsN;  // slabs of weights of a warp, side by side
  static constexpr int kColumns = Rows / 8 / WarpsM;                // eights of rows of a warp

  static_assert(Channels % kBlockChannels == 0 && kSlabs >= 1 && kSlabs * kSlabChannels * WarpsN == Channels);
  static_assert(kBlockSlabs % kSlabs == 0, "a warp's slabs lie in one block of the layout");
  static_assert(kColumns * 8 * WarpsM == Rows && (kColumns == 1 || kColumns % 2 == 0));
  static_assert(Stages >= (kFamily == Family::wgmma ? 3 : 2));
  static_assert(kFamily == Family::mma || (WarpsN % 4 == 0 && kColumns <= 16));
};

/// The rows of x that a block has, first .. end - 1 and at most its tile's, and whose weights they meet. None where first
/// is not below end.
struct alignas(16) TileRows {
  int first, end, expert, unused;
};

/// Where a thread stands in its block.
template <class Tile>
struct Place {
  int thread, lane, g, t, warp_n, warp_m;

  TM_DEVICE static Place here() {
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    return {thread, lane, lane / 4, lane % 4, warp % Tile::kWarpsN, warp / Tile::kWarpsN};
  }
  /// The warp's first slab of weights and its first row of x, in the block's tile.
  TM_DEVICE int first_slab() const { return warp_n * Tile::kSlabs; }
  TM_DEVICE int first_row() const { return warp_m * Tile::kColumns * 8; }
};

/// Calls each(i, j) for a thread's share of the numbers 0 .. Count - 1: i = thread + j * Threads, j known while
/// compiling.
template <int Count, int Threads, class Each>
TM_DEVICE void share(int thread, const Each& each) {
  TM_UNROLL
  for (int j = 0; j < (Count + Threads - 1) / Threads; ++j) {
    const int i = thread + j * Threads;
    if (Count % Threads == 0 || i < Count) each(i, j);
  }
}

/// A number that counts from 0 to Count - 1 and begins again.
template <int Count>
struct Turn {
  int at = 0;
  TM_DEVICE void advance() { at = at == Count - 1 ? 0 : at + 1; }
};

/// A thread's accumulators: [slab][column][register of D].
template <class Tile, class T>
using Accumulators = T[Tile::kSlabs][Tile::kColumns][4];

}  // namespace turbo::cuda
