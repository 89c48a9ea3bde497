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
    uint32_t scale[Tile::kSlabs];  // channel g in the low half
    ZeroPoints zero[Tile::kSlabs];
  };

  /// Where a slab stands in its group.
  class GroupTurn {
   public:
    TM_DEVICE GroupTurn(const Params& p, int slab)
        : slabs_(p.group_slabs), row_(slab / p.group_slabs), at_(slab % p.group_slabs) {}
    TM_DEVICE bool begins() const { return at_ == 0; }
    TM_DEVICE bool ends() const { return at_ == slabs_ - 1; }
    /// The first row of scales of the slab.
    TM_DEVICE int row() const { return row_ * kSlabGroups; }
    TM_DEVICE void advance() {
      const bool end = ends();
      row_ += end;
      at_ = end ? 0 : at_ + 1;
    }

   private:
    int slabs_, row_, at_;
  };

  TM_DEVICE static uint32_t stage(int number) {
    return shared_base() + static_cast<uint32_t>(number * kStageBytes);
  }

  /// A thread's part in bringing slabs to stages.
  class Loader {
   public:
    TM_DEVICE Loader(const Params& p, int tile_n, int first_row, int thread)
        : p_(p), x_(p.x, first_row, thread), first_block_(tile_n * kTileBlocks), thread_(thread) {}

    /// Starts to bring slab `slab`, and the scales and zero points of rows `row` on if asked to, to the stage at `to`.
    TM_DEVICE void load(int slab, bool scales, int row, uint32_t to) const {
      share<kTileBlocks * kBlockChunks, kThreads>(thread_, [&](int i, int) {
        const int block = first_block_ + i / kBlockChunks;
        const bool inside = block < p_.blocks;
        const int64_t at = (static_cast<int64_t>(block) * p_.slabs + slab) * kBlockChunks + i % kBlockChunks;
        cp_async_16_once(to + static_cast<uint32_t>(i * kChunkBytes), inside ? p_.weight + at : p_.weight,
                         inside ? kChunkBytes : 0);
      });
      x_.load(slab, to + kX);
      if (!scales) return;
      load_rows<kBlockScaleBytes>(p_.scale, row, to + kScales);
      if (p_.zero) load_rows<kBlockZeroBytes>(p_.zero, row, to + kZeros);
    }

   private:
    static constexpr int kBlockChunks = kBlockSlabs * kSlabBytes / kChunkBytes;

    /// kSlabGroups rows of scales or zero points, RowBytes each: [block of the tile][group].
    template <int RowBytes>
    TM_DEVICE void load_rows(const Vec4* from, int row, uint32_t to) const {
      constexpr int kRowVectors = RowBytes / kChunkBytes, kVectors = kRowVectors * kSlabGroups;
      share<kTileBlocks * kVectors, kThreads>(thread_, [&](int i, int) {
        const int block = first_block_ + i / kVectors;
        const bool inside = block < p_.blocks;
        const int64_t at = (static_cast<int64_t>(block) * p_.scale_rows + row) * kRowVectors + i % kVectors;
        cp_async_16(to + static_cast<uint32_t>(i * kChunkBytes), inside ? from + at : from, inside ? kChunkBytes : 0);
      });
    }

    const Params& p_;
    ActivationLoader<Tile> x_;
    int first_block_, thread_;
  };

  /// The scales and zero points of group `group` of the slab in a stage.
  TM_DEVICE static Group read_group(const Params& p, uint32_t from, int group, const Place<Tile>& place) {
    const int block = place.first_slab() / kBlockSlabs, slab = place.first_slab() % kBlockSlabs;
    const int row = block * kSlabGroups + group;
    Group out;
    const uint32_t at = from + static_cast<uint32_t>(kScales + row * kBlockScaleBytes + place.g * 16 + slab * 4);
    read_words(at, out.scale);
    const uint32_t zeros =
        p.zero ? load_shared_32(from + static_cast<uint32_t>(kZeros + row * kBlockZeroBytes + place.g * 4))
               : kNoZeroPoints;
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s) {
      const uint32_t pair = zeros >> (8 * (slab + s));
      out.zero[s] = zero_points(Type{}, pair & 15, pair >> 4 & 15);
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
    for (int s = 0; s < Tile::kSlabs; ++s) {
      const float scale[2] = {to_float(Type{}, static_cast<uint16_t>(group.scale[s])),
                              to_float(Type{}, static_cast<uint16_t>(group.scale[s] >> 16))};
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) {
          total[s][c][i] = multiply_add(sums[s][c][i], scale[i / 2], total[s][c][i]);
          sums[s][c][i] = 0;
        }
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
      uint32_t a[Tile::kSlabs][4];
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s) dequantize(Type{}, codes[s].v[step], group.zero[s], a[s]);
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; c += columns.kAtOnce) {
        uint32_t b[columns.kAtOnce][2];
        columns.read(from + kX, step, c, b);
        TM_UNROLL
        for (int s = 0; s < Tile::kSlabs; ++s)
          TM_UNROLL
          for (int i = 0; i < columns.kAtOnce; ++i) mma_m16n8k16(Type{}, sums[s][c + i], a[s], b[i]);
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

    const Loader loader(p, tile_n, first_row, place.thread);
    Turn<Tile::kStages> filled, read;
    GroupTurn ahead(p, first);  // of the slab that is loaded next
    const auto load_next = [&](int slab) {
      if (slab < last) loader.load(slab, ahead.begins() || slab == first, ahead.row(), stage(filled.at));
      cp_async_commit();
      filled.advance();
      ahead.advance();
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next(first + i);

    Group group = {};
    GroupTurn turn(p, first);
    Sums total;
    bool whole = false;
    for (int begin = first; begin < last; begin += p.slices.slabs, ++slice) {
      Sums sums;
      clear(sums);
      clear(total);
      const int end = begin + p.slices.slabs < last ? begin + p.slices.slabs : last;
      for (int slab = begin; slab < end; ++slab) {
        cp_async_wait<Tile::kStages - 2>();
        sync_threads();
        load_next(slab + Tile::kStages - 1);
        const uint32_t from = stage(read.at);
        if (!SmallGroups && (turn.begins() || slab == first)) group = read_group(p, from, 0, place);
        multiply(p, from, place, group, sums, total);
        if (!SmallGroups && turn.ends() && slab + 1 < end) end_group(group, sums, total);
        read.advance();
        turn.advance();
      }
      if (!SmallGroups) end_group(group, sums, total);
      if (end == last) {
        cp_async_wait<0>();
        sync_threads();  // shared memory is free for other uses
      }
      whole = slices.end_slice(slice, total, shared_base());
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
