// SPDX-License-Identifier: Apache-2.0
// Slabs on their way through a block with wgmma (sm_90a). Weights, scales and zero points are whole runs of the layout,
// which one thread has copied in bulk; rows of x, which experts pick one by one, come by cp.async. Each stage has two barriers: `full`
// ends a phase when all that was started for it has come, `empty` when every warp is done with it. So four warps
// are up to two slabs ahead of others, and bring, dequantize or scale while those multiply.
//
// x lies as activations.h says, which is wgmma's own swizzle of 128 or 64 bytes. Weights go from registers: the four warps' slabs
// are the 64 rows of A, whichever they are, since each warp gets its own rows of D back. While a product reads a
// step's registers, the next step's are written. No product is under way when a wait returns: ptxas before CUDA 13.3 may
// let registers of A be overwritten behind a wait that leaves one (its release notes have it).
#pragma once

#include "gemm_parts.h"

namespace turbo::cuda {

/// The descriptor of B [., 32 bytes of k] for wgmma, whose rows are those of SharedRows<RowBytes> from `at` on; 32 bytes of k
/// further on are 32 bytes.
template <int RowBytes>
TM_DEVICE uint64_t shared_matrix(uint32_t at) {
  static_assert(RowBytes == 128 || RowBytes == 64);
  constexpr uint64_t kSwizzle = RowBytes == 128 ? 1 : 2, kEightRows = 8 * RowBytes / 16;
  return (at & 0x3FFFF) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle << 62;
}

template <class Op, class Tile, Groups kGroups>
class WgmmaPipeline : GemmParts<Op, Tile, kGroups> {
  using Parts = GemmParts<Op, Tile, kGroups>;
  using typename Parts::Params;
  using typename Parts::Sums;
  using typename Parts::Totals;
  // A stage is filled again two slabs after it was read.
  static constexpr int kStages = Tile::kStages, kAhead = kStages - 2;

 public:
  static constexpr int kBarrierBytes = 2 * 8 * kStages;

  /// Starts with the slabs from `first` on, of which the block goes up to `last`. `barriers`: kBarrierBytes of shared memory.
  TM_DEVICE WgmmaPipeline(const Params& p, int tile_n, const TileRows& rows, const Place<Tile>& place, int first, int last,
                          uint32_t barriers)
      : p_(p), place_(place), x_(p.x, rows, place.thread), first_block_(tile_n * Parts::kTileBlocks),
        expert_block_(rows.expert * p.blocks), first_(first), last_(last), barriers_(barriers),
        ahead_(p.group_slabs, Parts::kSlabGroups, first) {
    if (place.thread == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full(i), Tile::kThreads + Parts::kTileBlocks);
        barrier_init(empty(i), Tile::kThreads / kWarpLanes);
      }
      async_proxy_fence();
    }
    sync_threads();
    for (int i = 0; i < kAhead; ++i) load_next(first + i);
  }

  TM_DEVICE uint32_t next(int) {
    barrier_wait(full(read_.at), read_.round);
    async_proxy_fence();  // what came by cp.async is for wgmma to read
    sync_warp();          // the lanes multiply together
    return Parts::stage(read_.at);
  }

  TM_DEVICE void multiply(uint32_t from, int slab, Group<Tile>& group, Sums& sums, Totals& total) {
    typename Parts::Codes codes;
    Parts::read_codes(from, place_, codes);
    const uint32_t x = from + static_cast<uint32_t>(place_.first_row() * Op::kRowBytes);
    if (Parts::kSmall) group = Parts::read_group(p_, from, 0, place_);
    dequantize(codes, 0, group);
    TM_UNROLL
    for (int step = 0; step < Op::kSteps; ++step) {
      wgmma_fence();
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s)
        Op::multiply(sums[s], a_[step % 2][s], shared_matrix<Op::kRowBytes>(x + static_cast<uint32_t>(32 * step)));
      wgmma_commit();
      if (step == 0) load_next(slab + kAhead);
      const bool ends = Parts::kSmall && step % Parts::kGroupSteps == Parts::kGroupSteps - 1;
      Group<Tile> next = group;
      if (ends && step + 1 < Op::kSteps) next = Parts::read_group(p_, from, step / Parts::kGroupSteps + 1, place_);
      if (step + 1 < Op::kSteps) dequantize(codes, step + 1, next);
      wgmma_wait<0>();
      if (ends) {
        begin(sums);
        Parts::end_group(p_, group, sums, total);
        begin(sums);
        group = next;
      }
    }
    release();
  }

  TM_DEVICE void begin(Sums& sums) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) pin(sums[s][c][i]);
  }
  TM_DEVICE void settle(Sums& sums) { begin(sums); }
  TM_DEVICE void drain() {}

 private:
  /// The registers of A for step `step`.
  TM_DEVICE void dequantize(const typename Parts::Codes& codes, int step, const Group<Tile>& group) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s) {
      Op::fragment(codes[s], step, group.zero[s], a_[step % 2][s]);
      TM_UNROLL
      for (int i = 0; i < 4; ++i) pin(a_[step % 2][s][i]);
    }
  }

  /// A stage's turn, and the parity of its round.
  struct Ring {
    int at = 0;
    uint32_t round = 0;
    TM_DEVICE void advance() {
      const bool end = at == kStages - 1;
      at = end ? 0 : at + 1;
      round ^= end;
    }
  };

  TM_DEVICE uint32_t full(int stage) const { return barriers_ + static_cast<uint32_t>(16 * stage); }
  TM_DEVICE uint32_t empty(int stage) const { return full(stage) + 8; }

  /// The warp is done with its stage.
  TM_DEVICE void release() {
    sync_warp();
    if (place_.lane == 0) barrier_arrive(empty(read_.at));
    read_.advance();
  }

  TM_DEVICE void load_next(int slab) {
    if (slab < last_) {
      // In the first round the wait is for the phase before the first: there is none to wait for.
      barrier_wait(empty(filled_.at), filled_.round ^ 1);
      load(slab, ahead_.begins() || slab == first_, ahead_.row(), Parts::stage(filled_.at), full(filled_.at));
      sync_warp();
    }
    filled_.advance();
    ahead_.advance();
  }

  TM_DEVICE void load(int slab, bool scales, int row, uint32_t to, uint32_t barrier) const {
    // Each block of weights is another warp's to bring.
    const int warp = place_.thread / kWarpLanes;
    if (place_.lane == 0 && warp < Parts::kTileBlocks) load_block(warp, slab, scales, row, to, barrier);
    x_.load(slab, to);
    x_.arrive(barrier);
  }

  /// Block `b` of the tile; in one thread.
  TM_DEVICE void load_block(int b, int slab, bool scales, int row, uint32_t to, uint32_t barrier) const {
    const int scale_bytes = scales ? Parts::kSlabGroups * Parts::kBlockScaleBytes : 0;
    const int zero_bytes = scales && p_.zero ? Parts::kSlabGroups * Parts::kBlockZeroBytes : 0;
    barrier_arrive_expect(barrier, Parts::kBlockBytes + scale_bytes + zero_bytes);
    // Where the tile ends after the weights do, its last channels are the last block's; no one writes their products.
    const int inside = first_block_ + b < p_.blocks ? first_block_ + b : p_.blocks - 1;
    const int64_t block = expert_block_ + inside;
    const Vec4* weight = p_.weight + (block * p_.slabs + slab) * (Parts::kBlockBytes / kChunkBytes);
    const uint32_t at = to + static_cast<uint32_t>(Parts::kWeights + b * Parts::kBlockBytes);
    if (Parts::read_once(p_))
      bulk_copy_once(at, weight, Parts::kBlockBytes, barrier);
    else
      bulk_copy(at, weight, Parts::kBlockBytes, barrier);
    if constexpr (!Parts::kOne) {
      const int64_t rows = block * p_.scale_rows + row;
      if (scale_bytes)
        bulk_copy(to + static_cast<uint32_t>(Parts::kScales + b * Parts::kSlabGroups * Parts::kBlockScaleBytes),
                  p_.scale + rows * (Parts::kBlockScaleBytes / kChunkBytes), scale_bytes, barrier);
      if (zero_bytes)
        bulk_copy(to + static_cast<uint32_t>(Parts::kZeros + b * Parts::kSlabGroups * Parts::kBlockZeroBytes),
                  p_.zero + rows * (Parts::kBlockZeroBytes / kChunkBytes), zero_bytes, barrier);
    }
  }

  const Params& p_;
  const Place<Tile>& place_;
  ActivationLoader<Tile, typename Op::X> x_;
  int first_block_, expert_block_, first_, last_;
  uint32_t barriers_;
  GroupTurn ahead_;
  Ring filled_, read_;
  uint32_t a_[2][Tile::kSlabs][4];
  static_assert(Tile::kThreads / kWarpLanes >= Parts::kTileBlocks);
};

}  // namespace turbo::cuda
