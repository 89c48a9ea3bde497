// SPDX-License-Identifier: Apache-2.0
// The W4A16 kernel: y = x @ dequantized(weight).T + bias on tensor cores, weights as in layout.h.
//
// Per output element, whatever the tile, the number of rows and the row's place among them:
//   for each slice of K ascending:
//     for each group, or part of it, within the slice ascending:
//       a = sum of x[k] * (u[n][k] - z[n][g])     fp32, 16 k at a time ascending, from 0; operands are exact
//       s = a * scale[n][g] + s                   one rounding
//   y = round((s0 + s1) + ... + bias)
// Rows of x are columns of the tensor cores' product, so a row never meets another one.
//
// Slabs of 64 k travel through a ring of stages in shared memory by cp.async: a stage has the tile's weights, its rows
// of x, and, where a group begins, its scales and zero points.
#pragma once

#include <string>

#include "activations.h"
#include "dequantize.h"
#include "device.h"
#include "output.h"
#include "split_k.h"
#include "tile_shape.h"

namespace turbo::cuda {

struct W4A16Params {
  Rows16 x;
  Output16 y;
  Slices slices;
  const Vec4* weight;
  const Vec4* scale;
  const Vec4* zero;  // nullptr: every zero point is 8
  int blocks;        // of 64 channels
  int slabs;         // of K
  int group_slabs;   // of a group; 1 with groups of 32
  int scale_rows;
};

/// SmallGroups: groups of 32, two in a slab. Else a group has whole slabs.
template <class Type, class Tile, bool SmallGroups>
struct W4A16 {
  using Params = W4A16Params;
  using Sums = Accumulators<Tile, float>;

  static constexpr int kSlabGroups = SmallGroups ? 2 : 1;  // rows of scales that a stage holds
  static constexpr int kSteps = kSlabK / kStepK;
  static constexpr int kGroupSteps = kSteps / kSlabGroups;
  static constexpr int kTileBlocks = Tile::kChannels / kBlockChannels;

  // A stage in shared memory; sizes in bytes.
  static constexpr int kSlabBytes = kSlabChannels * kSlabK / 2;
  static constexpr int kBlockScaleBytes = kBlockChannels * 2, kBlockZeroBytes = kBlockChannels / 2;
  static constexpr int kX = kTileBlocks * kBlockSlabs * kSlabBytes;
  static constexpr int kScales = kX + Tile::kRows * kRowBytes;
  static constexpr int kZeros = kScales + kTileBlocks * kSlabGroups * kBlockScaleBytes;
  static constexpr int kStageBytes = (kZeros + kTileBlocks * kSlabGroups * kBlockZeroBytes + 127) / 128 * 128;

  static constexpr int kThreads = Tile::kThreads, kMinBlocks = Tile::kMinBlocks;
  static constexpr int kRing = Tile::kStages * kStageBytes, kOutput = OutputTile<Tile>::kSharedBytes;
  static constexpr int kSharedBytes = kRing > kOutput ? kRing : kOutput;

  static std::string name() {
    return std::string("w4a16<") + type_name(Type{}) + ", " + std::to_string(Tile::kChannels) + "x" +
           std::to_string(Tile::kRows) + (SmallGroups ? ", groups of 32>" : ">");
  }

  /// What a thread keeps of a group: scales and zero points of its channels g and g + 8 of each slab.
  struct Group {
    float scale[Tile::kSlabs][2];
    ZeroPoints zero[Tile::kSlabs];
  };

  TM_DEVICE static uint32_t stage(int number) {
    return shared_base() + static_cast<uint32_t>(number * kStageBytes);
  }

  /// Starts to bring one slab to a stage.
  TM_DEVICE static void load(const Params& p, int tile_n, int first_row, int slab, bool scales, uint32_t to,
                             int thread) {
    constexpr int kBlockChunks = kBlockSlabs * kSlabBytes / kChunkBytes;
    const int first_block = tile_n * kTileBlocks;
    TM_UNROLL
    for (int i = thread; i < kTileBlocks * kBlockChunks; i += kThreads) {
      const int block = first_block + i / kBlockChunks;
      const bool inside = block < p.blocks;
      const Vec4* from = p.weight + (static_cast<int64_t>(block) * p.slabs + slab) * kBlockChunks + i % kBlockChunks;
      cp_async_16_once(to + static_cast<uint32_t>(i * kChunkBytes), inside ? from : p.weight,
                       inside ? kChunkBytes : 0);
    }
    load_activations<Tile>(p.x, first_row, slab, to + kX, thread);
    if (!scales) return;
    const int row = SmallGroups ? 2 * slab : slab / p.group_slabs;
    load_rows<kBlockScaleBytes>(p, p.scale, first_block, row, to + kScales, thread);
    if (p.zero) load_rows<kBlockZeroBytes>(p, p.zero, first_block, row, to + kZeros, thread);
  }

  /// Rows of scales or zero points, kSlabGroups of them: [block of the tile][group], RowBytes each.
  template <int RowBytes>
  TM_DEVICE static void load_rows(const Params& p, const Vec4* from, int first_block, int row, uint32_t to,
                                  int thread) {
    constexpr int kRowVectors = RowBytes / kChunkBytes, kVectors = kRowVectors * kSlabGroups;
    for (int i = thread; i < kTileBlocks * kVectors; i += kThreads) {
      const int block = first_block + i / kVectors;
      const bool inside = block < p.blocks;
      const int64_t at = (static_cast<int64_t>(block) * p.scale_rows + row) * kRowVectors + i % kVectors;
      cp_async_16(to + static_cast<uint32_t>(i * kChunkBytes), inside ? from + at : from, inside ? kChunkBytes : 0);
    }
  }

  /// The scales and zero points of group `group` of the slab in a stage.
  TM_DEVICE static Group read_group(const Params& p, uint32_t from, int group, const Place<Tile>& place) {
    const int block = place.first_slab() / kBlockSlabs, slab = place.first_slab() % kBlockSlabs;
    const int row = block * kSlabGroups + group;
    uint32_t scales[Tile::kSlabs];
    const uint32_t at = from + static_cast<uint32_t>(kScales + row * kBlockScaleBytes + place.g * 16 + slab * 4);
    read_words(at, scales);
    const uint32_t zeros =
        p.zero ? load_shared_32(from + static_cast<uint32_t>(kZeros + row * kBlockZeroBytes + place.g * 4))
               : kNoZeroPoints;
    Group out;
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s) {
      const uint32_t pair = zeros >> (8 * (slab + s));
      out.zero[s] = zero_points(Type{}, pair & 15, pair >> 4 & 15);
      out.scale[s][0] = to_float(Type{}, static_cast<uint16_t>(scales[s]));
      out.scale[s][1] = to_float(Type{}, static_cast<uint16_t>(scales[s] >> 16));
    }
    return out;
  }

  TM_DEVICE static void read_words(uint32_t at, uint32_t (&out)[1]) { out[0] = load_shared_32(at); }
  TM_DEVICE static void read_words(uint32_t at, uint32_t (&out)[2]) {
    const Vec2 two = load_shared_64(at);
    out[0] = two.v[0];
    out[1] = two.v[1];
  }
  TM_DEVICE static void read_words(uint32_t at, uint32_t (&out)[4]) {
    const Vec4 four = load_shared_128(at);
    TM_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = four.v[i];
  }

  /// Adds a group's sums, scaled, to the slice's, and begins the next group.
  TM_DEVICE static void end_group(const Group& group, Sums& sums, Sums& total) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) {
          total[s][c][i] = multiply_add(sums[s][c][i], group.scale[s][i / 2], total[s][c][i]);
          sums[s][c][i] = 0;
        }
  }

  /// The products of one slab.
  TM_DEVICE static void multiply(const Params& p, uint32_t from, const Place<Tile>& place, Group& group, Sums& sums,
                                 Sums& total) {
    Vec4 codes[Tile::kSlabs];
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      codes[s] = load_shared_128(
          from + static_cast<uint32_t>((place.first_slab() + s) * kSlabBytes + place.lane * kChunkBytes));
    ColumnReader<Tile> columns(place);
    TM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if (SmallGroups && step % kGroupSteps == 0) group = read_group(p, from, step / kGroupSteps, place);
      Columns<Tile> b;
      columns.read(from + kX, step, b);
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s) {
        uint32_t a[4];
        dequantize(Type{}, codes[s].v[step], group.zero[s], a);
        TM_UNROLL
        for (int c = 0; c < Tile::kColumns; ++c) mma_m16n8k16(Type{}, sums[s][c], a, b[c]);
      }
      if (SmallGroups && step % kGroupSteps == kGroupSteps - 1) end_group(group, sums, total);
    }
  }

  TM_DEVICE static void run(const Params& p) {
    const Place<Tile> place = Place<Tile>::here();
    const int parts = p.slices.apart ? p.slices.count : 1;
    const int tile_n = block_index_x() / parts, first_row = block_index_y() * Tile::kRows;
    int slice = block_index_x() % parts;
    const int tiles_n = (p.blocks + kTileBlocks - 1) / kTileBlocks;
    const SliceSums<Tile> slices(p.slices, block_index_y() * tiles_n + tile_n, place.thread);
    const int first = slice * p.slices.slabs;
    const int last = p.slices.apart && first + p.slices.slabs < p.slabs ? first + p.slices.slabs : p.slabs;

    const auto load_slab = [&](int slab) {
      const bool scales = SmallGroups || slab == first || slab % p.group_slabs == 0;
      if (slab < last) load(p, tile_n, first_row, slab, scales, stage((slab - first) % Tile::kStages), place.thread);
      cp_async_commit();
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) load_slab(first + i);

    Sums sums = {}, total = {};
    Group group = {};
    bool whole = false;
    int slice_end = first + p.slices.slabs;
    for (int slab = first; slab < last; ++slab) {
      cp_async_wait<Tile::kStages - 2>();
      sync_threads();
      load_slab(slab + Tile::kStages - 1);
      const uint32_t from = stage((slab - first) % Tile::kStages);
      if (!SmallGroups && (slab == first || slab % p.group_slabs == 0)) group = read_group(p, from, 0, place);
      multiply(p, from, place, group, sums, total);
      const bool slice_ends = slab + 1 == slice_end || slab + 1 == last;
      if (!SmallGroups && (slice_ends || (slab + 1) % p.group_slabs == 0)) end_group(group, sums, total);
      if (!slice_ends) continue;
      if (slab + 1 == last) {
        cp_async_wait<0>();
        sync_threads();  // shared memory is free for other uses
      }
      whole = slices.end_slice(slice, total, shared_base());
      ++slice;
      slice_end += p.slices.slabs;
      if (slab + 1 < last) clear(total);
    }
    if (!whole) return;
    sync_threads();
    write_output(Type{}, p.y, first_row, tile_n * Tile::kChannels, total, place);
  }

  TM_DEVICE static void clear(Sums& total) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) total[s][c][i] = 0;
  }
};

}  // namespace turbo::cuda
