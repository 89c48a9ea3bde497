// SPDX-License-Identifier: Apache-2.0
// Slabs on their way through a block with mma.sync: threads bring them by cp.async, a barrier of the whole block hands
// them over, and each warp reads its fragments of x by ldmatrix.
#pragma once

#include "gemm_parts.h"

namespace turbo::cuda {

template <class Op, class Tile, Groups kGroups>
class MmaPipeline : GemmParts<Op, Tile, kGroups> {
  using Parts = GemmParts<Op, Tile, kGroups>;
  using typename Parts::Params;
  using typename Parts::Sums;
  using typename Parts::Totals;
  static constexpr int kThreads = Tile::kThreads;

 public:
  static constexpr int kBarrierBytes = 0;

  /// Starts with the slabs from `first` on, of which the block goes up to `last`.
  TM_DEVICE MmaPipeline(const Params& p, int tile_n, const TileRows& rows, const Place<Tile>& place, int first, int last)
      : p_(p), place_(place), x_(p.x, rows, place.thread), first_block_(tile_n * Parts::kTileBlocks),
        expert_block_(rows.expert * p.blocks), first_(first), last_(last),
        ahead_(p.group_slabs, Parts::kSlabGroups, first) {
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next(first + i);
  }

  /// The stage that has slab `slab`; slabs come in ascending order.
  TM_DEVICE uint32_t next(int slab) {
    cp_async_wait<Tile::kStages - 2>();
    sync_threads();
    load_next(slab + Tile::kStages - 1);
    const uint32_t from = Parts::stage(read_.at);
    read_.advance();
    return from;
  }

  /// The products of the slab in a stage; with small groups their ends, too.
  TM_DEVICE void multiply(uint32_t from, int, Group<Tile>& group, Sums& sums, Totals& total) {
    typename Parts::Codes codes;
    Parts::read_codes(from, place_, codes);
    ColumnReader<Tile, Op::kRowBytes> columns(place_);
    TM_UNROLL
    for (int step = 0; step < Op::kSteps; ++step) {
      if (Parts::kSmall && step % Parts::kGroupSteps == 0) group = Parts::read_group(p_, from, step / Parts::kGroupSteps, place_);
      uint32_t a[Tile::kSlabs][4];
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s) Op::fragment(codes[s], step, group.zero[s], a[s]);
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; c += columns.kAtOnce) {
        uint32_t b[columns.kAtOnce][2];
        columns.read(from, step, c, b);
        TM_UNROLL
        for (int s = 0; s < Tile::kSlabs; ++s)
          TM_UNROLL
          for (int i = 0; i < columns.kAtOnce; ++i) Op::multiply(sums[s][c + i], a[s], b[i]);
      }
      if (Parts::kSmall && step % Parts::kGroupSteps == Parts::kGroupSteps - 1) Parts::end_group(p_, group, sums, total);
    }
  }

  /// Products follow that add to the sums.
  TM_DEVICE void begin(Sums&) {}
  /// From here on the sums have their values.
  TM_DEVICE void settle(Sums&) {}
  /// After the last slab.
  TM_DEVICE void drain() { cp_async_wait<0>(); }

 private:
  TM_DEVICE void load_next(int slab) {
    if (slab < last_) load(slab, ahead_.begins() || slab == first_, ahead_.row(), Parts::stage(filled_.at));
    cp_async_commit();
    filled_.advance();
    ahead_.advance();
  }

  /// Starts to bring slab `slab`, and the scales and zero points of rows `row` on if asked to, to the stage at `to`.
  TM_DEVICE void load(int slab, bool scales, int row, uint32_t to) const {
    constexpr int kBlockChunks = Parts::kBlockBytes / kChunkBytes;
    const bool once = Parts::read_once(p_);
    share<Parts::kTileBlocks * kBlockChunks, kThreads>(place_.thread, [&](int i, int) {
      const int block = first_block_ + i / kBlockChunks;
      const bool inside = block < p_.blocks;
      const int64_t at = (static_cast<int64_t>(expert_block_ + block) * p_.slabs + slab) * kBlockChunks + i % kBlockChunks;
      const uint32_t place = to + static_cast<uint32_t>(Parts::kWeights + i * kChunkBytes);
      const Vec4* from = inside ? p_.weight + at : p_.weight;
      if (once)
        cp_async_16_once(place, from, inside ? kChunkBytes : 0);
      else
        cp_async_16(place, from, inside ? kChunkBytes : 0);
    });
    x_.load(slab, to);
    if constexpr (!Parts::kOne) {
      if (!scales) return;
      load_rows<Parts::kBlockScaleBytes>(p_.scale, row, to + Parts::kScales);
      if (p_.zero) load_rows<Parts::kBlockZeroBytes>(p_.zero, row, to + Parts::kZeros);
    }
  }

  /// kSlabGroups rows of scales or zero points, RowBytes each: [block of the tile][group].
  template <int RowBytes>
  TM_DEVICE void load_rows(const Vec4* from, int row, uint32_t to) const {
    constexpr int kRowVectors = RowBytes / kChunkBytes, kVectors = kRowVectors * Parts::kSlabGroups;
    share<Parts::kTileBlocks * kVectors, kThreads>(place_.thread, [&](int i, int) {
      const int block = first_block_ + i / kVectors;
      const bool inside = block < p_.blocks;
      const int64_t at = (static_cast<int64_t>(expert_block_ + block) * p_.scale_rows + row) * kRowVectors + i % kVectors;
      cp_async_16(to + static_cast<uint32_t>(i * kChunkBytes), inside ? from + at : from, inside ? kChunkBytes : 0);
    });
  }

  const Params& p_;
  const Place<Tile>& place_;
  ActivationLoader<Tile, typename Op::X> x_;
  int first_block_, expert_block_, first_, last_;
  GroupTurn ahead_;  // of the slab that is loaded next
  Turn<Tile::kStages> filled_, read_;
};

}  // namespace turbo::cuda
