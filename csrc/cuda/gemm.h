// SPDX-License-Identifier: Apache-2.0
// The kernel of all products with packed weights: y = x @ dequantized(weight).T + bias on tensor cores. An Op says what
// x and the weights are and what a step of the arithmetic is: w4a16.h, a8.h.
//
// Per output element, whatever the tile, the number of rows and the row's place among them:
//   for each slice of K ascending:
//     for each group, or part of it, within the slice ascending:
//       a = sum of x[k] * (u[n][k] - z[n][g])     a step of k at a time ascending, from 0
//       s = a * scale[n][g] + s                   one rounding
//   y = round(Op's finish of (s0 + s1) + ...)
// With Groups::one nothing is scaled before all is summed. Rows of x are columns of the tensor cores' product, so a row
// never meets another one.
//
// Slabs of 64 k travel through a ring of stages in shared memory by cp.async: a stage has the tile's weights, its rows
// of x, and, where a group begins, its scales and zero points.
//
// An Op has  X, Sum, Finish        what x is (activations.h), what is summed, what its finish needs
//            kWeightBits, kRowBytes, kSteps    bits of a weight, bytes of a row of x in a slab, steps of a slab
//            start, group_sum      a group's accumulator before its products; the float that it means after them
//            zero_points, fragment, multiply   ZeroPoints of two codes; weights of a step; one tensor-core product
//            scale_type, finish, Output   the type of scales of 16 bits; the tile's sums to y, and how through shared memory
//            rows                  the rows of x that the block has, and the expert whose weights they meet: several
//                                  experts' weights, scales and zero points lie one after another
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
struct Gemm {
  using Params = GemmParams<Op>;
  using Sum = typename Op::Sum;
  using Sums = Accumulators<Tile, Sum>;
  using Totals = Accumulators<Tile, float>;

  static constexpr bool kOne = kGroups == Groups::one, kSmall = kGroups == Groups::small;
  static constexpr int kSlabGroups = kSmall ? 2 : 1;  // rows of scales that a stage holds
  static constexpr int kGroupSteps = Op::kSteps / kSlabGroups;
  static constexpr int kTileBlocks = Tile::kChannels / kBlockChannels;

  // A stage in shared memory; sizes in bytes.
  static constexpr int kSlabBytes = kSlabChannels * kSlabK * Op::kWeightBits / 8;
  static constexpr int kBlockScaleBytes = kOne ? 0 : kBlockChannels * 2, kBlockZeroBytes = kOne ? 0 : kBlockChannels / 2;
  static constexpr int kX = kTileBlocks * kBlockSlabs * kSlabBytes;
  static constexpr int kScales = kX + Tile::kRows * Op::kRowBytes;
  static constexpr int kZeros = kScales + kTileBlocks * kSlabGroups * kBlockScaleBytes;
  static constexpr int kStageBytes = (kZeros + kTileBlocks * kSlabGroups * kBlockZeroBytes + 127) / 128 * 128;

  static constexpr int kThreads = Tile::kThreads, kMinBlocks = Tile::kMinBlocks;
  static constexpr int kRing = Tile::kStages * kStageBytes, kOutput = Op::template Output<Tile>::kSharedBytes;
  static constexpr int kSharedBytes = kRing > kOutput ? kRing : kOutput;

  static std::string name() {
    const char* groups = kOne ? ", one group>" : kSmall ? ", groups of 32>" : ">";
    return Op::name() + ", " + std::to_string(Tile::kChannels) + "x" + std::to_string(Tile::kRows) + groups;
  }

  TM_DEVICE static uint32_t stage(int number) {
    return shared_base() + static_cast<uint32_t>(number * kStageBytes);
  }

  /// A thread's part in bringing slabs to stages.
  class Loader {
   public:
    TM_DEVICE Loader(const Params& p, int tile_n, const TileRows& rows, int thread)
        : p_(p), x_(p.x, rows, thread), first_block_(tile_n * kTileBlocks), expert_block_(rows.expert * p.blocks),
          thread_(thread) {}

    /// Starts to bring slab `slab`, and the scales and zero points of rows `row` on if asked to, to the stage at `to`.
    TM_DEVICE void load(int slab, bool scales, int row, uint32_t to) const {
      share<kTileBlocks * kBlockChunks, kThreads>(thread_, [&](int i, int) {
        const int block = first_block_ + i / kBlockChunks;
        const bool inside = block < p_.blocks;
        const int64_t at = (static_cast<int64_t>(expert_block_ + block) * p_.slabs + slab) * kBlockChunks + i % kBlockChunks;
        cp_async_16_once(to + static_cast<uint32_t>(i * kChunkBytes), inside ? p_.weight + at : p_.weight,
                         inside ? kChunkBytes : 0);
      });
      x_.load(slab, to + kX);
      if constexpr (!kOne) {
        if (!scales) return;
        load_rows<kBlockScaleBytes>(p_.scale, row, to + kScales);
        if (p_.zero) load_rows<kBlockZeroBytes>(p_.zero, row, to + kZeros);
      }
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
        const int64_t at = (static_cast<int64_t>(expert_block_ + block) * p_.scale_rows + row) * kRowVectors + i % kVectors;
        cp_async_16(to + static_cast<uint32_t>(i * kChunkBytes), inside ? from + at : from, inside ? kChunkBytes : 0);
      });
    }

    const Params& p_;
    ActivationLoader<Tile, typename Op::X> x_;
    int first_block_, expert_block_, thread_;
  };

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

  /// The products of one slab.
  TM_DEVICE static void multiply(const Params& p, uint32_t from, const Place<Tile>& place, Group<Tile>& group,
                                 Sums& sums, Totals& total) {
    constexpr int kLoads = Op::kWeightBits / 4;
    Vec4 codes[Tile::kSlabs][kLoads];
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int i = 0; i < kLoads; ++i)
        codes[s][i] = load_shared_128(from + static_cast<uint32_t>((place.first_slab() + s) * kSlabBytes +
                                                                   (i * kWarpLanes + place.lane) * kChunkBytes));
    ColumnReader<Tile, Op::kRowBytes> columns(place);
    TM_UNROLL
    for (int step = 0; step < Op::kSteps; ++step) {
      if (kSmall && step % kGroupSteps == 0) group = read_group(p, from, step / kGroupSteps, place);
      uint32_t a[Tile::kSlabs][4];
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s) Op::fragment(codes[s], step, group.zero[s], a[s]);
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; c += columns.kAtOnce) {
        uint32_t b[columns.kAtOnce][2];
        columns.read(from + kX, step, c, b);
        TM_UNROLL
        for (int s = 0; s < Tile::kSlabs; ++s)
          TM_UNROLL
          for (int i = 0; i < columns.kAtOnce; ++i) Op::multiply(sums[s][c + i], a[s], b[i]);
      }
      if (kSmall && step % kGroupSteps == kGroupSteps - 1) end_group(p, group, sums, total);
    }
  }

  TM_DEVICE static void run(const Params& p) {
    const Place<Tile> place = Place<Tile>::here();
    const int parts = p.slices.apart ? p.slices.count : 1;
    const int tile_n = block_index_x() / parts;
    const TileRows rows = Op::rows(p, block_index_y(), Tile::kRows);
    if (rows.first >= rows.end) return;
    int slice = block_index_x() % parts;
    const int tiles_n = (p.blocks + kTileBlocks - 1) / kTileBlocks;
    const SliceSums<Tile> slices(p.slices, block_index_y() * tiles_n + tile_n, place.thread);
    const int first = slice * p.slices.slabs;
    const int last = p.slices.apart && first + p.slices.slabs < p.slabs ? first + p.slices.slabs : p.slabs;

    const Loader loader(p, tile_n, rows, place.thread);
    Turn<Tile::kStages> filled, read;
    GroupTurn ahead(p.group_slabs, kSlabGroups, first);  // of the slab that is loaded next
    const auto load_next = [&](int slab) {
      if (slab < last) loader.load(slab, ahead.begins() || slab == first, ahead.row(), stage(filled.at));
      cp_async_commit();
      filled.advance();
      ahead.advance();
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) load_next(first + i);

    Group<Tile> group = {};
    if constexpr (kOne) group = whole_group(p, tile_n, rows.expert, place);
    GroupTurn turn(p.group_slabs, kSlabGroups, first);
    Sums sums;
    Totals total;
    bool whole = false;
    for (int begin = first; begin < last; begin += p.slices.slabs, ++slice) {
      clear(sums, Op::start(kGroups));
      clear(total, 0.0f);
      const int end = begin + p.slices.slabs < last ? begin + p.slices.slabs : last;
      for (int slab = begin; slab < end; ++slab) {
        cp_async_wait<Tile::kStages - 2>();
        sync_threads();
        load_next(slab + Tile::kStages - 1);
        const uint32_t from = stage(read.at);
        if (kGroups == Groups::large && (turn.begins() || slab == first)) group = read_group(p, from, 0, place);
        multiply(p, from, place, group, sums, total);
        if (kGroups == Groups::large && turn.ends() && slab + 1 < end) end_group(p, group, sums, total);
        read.advance();
        turn.advance();
      }
      if (kGroups == Groups::large) end_group(p, group, sums, total);
      if (end == last) cp_async_wait<0>();
      if constexpr (kOne)
        whole = slices.end_slice(slice, sums, shared_base());
      else
        whole = slices.end_slice(slice, total, shared_base());
    }
    if (!whole) return;
    sync_threads();  // shared memory is free for other uses
    if constexpr (kOne)
      Op::finish(p, rows, tile_n * Tile::kChannels, place, sums);
    else
      Op::finish(p, rows, tile_n * Tile::kChannels, place, total);
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
