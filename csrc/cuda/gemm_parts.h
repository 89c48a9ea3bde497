// SPDX-License-Identifier: Apache-2.0
// What the kernels of gemm.h have in common, whichever way slabs travel and are multiplied: their arguments, a stage of
// shared memory, and groups.
#pragma once

#include <string>

#include "activations.h"
#include "device.h"
#include "groups.h"
#include "output.h"
#include "split_k.h"
#include "tile_shape.h"

namespace turbo::cuda {

template <class Op>
struct GemmParams {
  int rows;  // that the grid covers: of x, or of all tiles of experts
  typename Op::X x;
  Output16 y;
  Slices slices;
  const Vec4* weight;
  const Vec4* scale;  // of 2 bytes unless all of K is one group
  const Vec4* zero;   // nullptr: every zero point is 8
  int blocks;         // of 64 channels
  int slabs;          // of K
  int group_slabs;    // of a group; 1 with groups of 32
  int scale_rows;
  typename Op::Finish finish;
};

/// Rows of a product without experts: so many tiles.
TM_DEVICE TileRows plain_rows(int rows, int tile, int tile_rows) { return {tile * tile_rows, rows, 0, 0}; }

template <class Op, class Tile, Groups kGroups>
struct GemmParts {
  using Params = GemmParams<Op>;
  using Sum = typename Op::Sum;
  using Sums = Accumulators<Tile, Sum>;
  using Totals = Accumulators<Tile, float>;

  static constexpr bool kOne = kGroups == Groups::one, kSmall = kGroups == Groups::small;
  static constexpr int kSlabGroups = kSmall ? 2 : 1;  // rows of scales that a stage holds
  static constexpr int kGroupSteps = Op::kSteps / kSlabGroups;
  static constexpr int kTileBlocks = Tile::kChannels / kBlockChannels;

  // A stage in shared memory; sizes in bytes. x comes first, because its swizzle goes by addresses.
  static constexpr int kAlignment = Tile::kFamily == Family::wgmma ? 1024 : 128;
  static constexpr int kSlabBytes = kSlabChannels * kSlabK * Op::kWeightBits / 8, kBlockBytes = kBlockSlabs * kSlabBytes;
  static constexpr int kBlockScaleBytes = kOne ? 0 : kBlockChannels * 2, kBlockZeroBytes = kOne ? 0 : kBlockChannels / 2;
  static constexpr int kWeights = Tile::kRows * Op::kRowBytes;
  static constexpr int kScales = kWeights + kTileBlocks * kBlockBytes;
  static constexpr int kZeros = kScales + kTileBlocks * kSlabGroups * kBlockScaleBytes;
  static constexpr int kStageBytes =
      (kZeros + kTileBlocks * kSlabGroups * kBlockZeroBytes + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kRingBytes = Tile::kStages * kStageBytes;

  /// True where no other block has the same weights, and L2 may drop them first.
  TM_DEVICE static bool read_once(const Params& p) { return p.rows <= Tile::kRows; }

  TM_DEVICE static uint32_t stage(int number) {
    return shared_base() + static_cast<uint32_t>(number * kStageBytes);
  }

  using Codes = Vec4[Tile::kSlabs][Op::kWeightBits / 4];

  /// A thread's weights of the slab in a stage.
  TM_DEVICE static void read_codes(uint32_t from, const Place<Tile>& place, Codes& codes) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int i = 0; i < Op::kWeightBits / 4; ++i)
        codes[s][i] =
            load_shared_128(from + static_cast<uint32_t>(kWeights + (place.first_slab() + s) * kSlabBytes +
                                                         (i * kWarpLanes + place.lane) * kChunkBytes));
  }

  TM_DEVICE static void spread_zeros(uint32_t zeros, const Place<Tile>& place, Group<Tile>& out) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s) {
      const uint32_t pair = zeros >> (8 * (place.first_slab() % kBlockSlabs + s));
      out.zero[s] = Op::zero_points(pair & 15, pair >> 4 & 15);
    }
  }

  /// The scales and zero points of group `group` of the slab in a stage.
  TM_DEVICE static Group<Tile> read_group(const Params& p, uint32_t from, int group, const Place<Tile>& place) {
    const int row = place.first_slab() / kBlockSlabs * kSlabGroups + group, slab = place.first_slab() % kBlockSlabs;
    Group<Tile> out;
    read_words(from + static_cast<uint32_t>(kScales + row * kBlockScaleBytes + place.g * 16 + slab * 4), out.scale);
    spread_zeros(p.zero ? load_shared_32(from + static_cast<uint32_t>(kZeros + row * kBlockZeroBytes + place.g * 4))
                        : kNoZeroPoints,
                 place, out);
    return out;
  }

  /// The zero points of the one group.
  TM_DEVICE static Group<Tile> whole_group(const Params& p, int tile_n, int expert, const Place<Tile>& place) {
    Group<Tile> out = {};
    if constexpr (Op::kWeightBits == 4) {
      const int block = tile_n * kTileBlocks + place.first_slab() / kBlockSlabs;
      const auto* zeros = reinterpret_cast<const uint32_t*>(p.zero) + (expert * p.blocks + block) * int64_t{8};
      spread_zeros(p.zero && block < p.blocks ? load_global(zeros + place.g) : kNoZeroPoints, place, out);
    }
    return out;
  }

  /// Adds a group's sums, scaled, to the slice's, and begins the next group.
  TM_DEVICE static void end_group(const Params& p, const Group<Tile>& group, Sums& sums, Totals& total) {
    const auto type = Op::scale_type(p.finish);
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s) {
      const float scale[2] = {to_float(type, static_cast<uint16_t>(group.scale[s])),
                              to_float(type, static_cast<uint16_t>(group.scale[s] >> 16))};
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) {
          total[s][c][i] = multiply_add(Op::group_sum(sums[s][c][i]), scale[i / 2], total[s][c][i]);
          sums[s][c][i] = Op::start(kGroups);
        }
    }
  }

  template <class T>
  TM_DEVICE static void clear(Accumulators<Tile, T>& total, T value) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) total[s][c][i] = value;
  }
};

}  // namespace turbo::cuda
