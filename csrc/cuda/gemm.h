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
// Slabs of 64 k travel through a ring of stages in shared memory: a stage has the tile's rows of x, its weights, and, where
// a group begins, its scales and zero points. How they travel and are multiplied is a pipeline's: mma_pipeline.h,
// wgmma_pipeline.h.
//
// An Op has  X, Sum, Finish        what x is (activations.h), what is summed, what its finish needs
//            kWeightBits, kRowBytes, kSteps    bits of a weight, bytes of a row of x in a slab, steps of a slab
//            start, group_sum      a group's accumulator before its products; the float that it means after them
//            zero_points, fragment, multiply   ZeroPoints of two codes; weights of a step; one product, of mma.sync or wgmma
//            scale_type, finish, Output   the type of scales of 16 bits; the tile's sums to y, and how through shared memory
//            rows                  the rows of x that the block has, and the expert whose weights they meet: several
//                                  experts' weights, scales and zero points lie one after another
#pragma once

#include <string>
#include <type_traits>

#include "mma_pipeline.h"
#include "wgmma_pipeline.h"

namespace turbo::cuda {

template <class Op, class Tile, Groups kGroups>
struct Gemm {
  using Params = GemmParams<Op>;
  using Parts = GemmParts<Op, Tile, kGroups>;
  static constexpr bool kNeedsSm90a = Tile::kFamily == Family::wgmma;
  using Pipeline = std::conditional_t<kNeedsSm90a, WgmmaPipeline<Op, Tile, kGroups>, MmaPipeline<Op, Tile, kGroups>>;

  static constexpr int kThreads = Tile::kThreads, kMinBlocks = Tile::kMinBlocks;
  static constexpr int kOutput = Op::template Output<Tile>::kSharedBytes;
  static constexpr int kBarriers = Parts::kRingBytes > kOutput ? Parts::kRingBytes : (kOutput + 7) / 8 * 8;
  static constexpr int kSharedBytes = kBarriers + Pipeline::kBarrierBytes;

  static std::string name() {
    const char* groups = Parts::kOne ? ", one group" : Parts::kSmall ? ", groups of 32" : "";
    return Op::name() + ", " + std::to_string(Tile::kChannels) + "x" + std::to_string(Tile::kRows) + groups +
           (kNeedsSm90a ? ", wgmma>" : ">");
  }

  TM_DEVICE static void run(const Params& p) {
    const Place<Tile> place = Place<Tile>::here();
    const int parts = p.slices.apart ? p.slices.count : 1;
    const int tiles_n = (p.blocks + Parts::kTileBlocks - 1) / Parts::kTileBlocks;
    int tile_n = block_index_x() / parts, tile_m = block_index_y();
    if (parts == 1) stay_near(p, tiles_n, tile_n, tile_m);
    const TileRows rows = Op::rows(p, tile_m, Tile::kRows);
    if (rows.first >= rows.end) return;
    int slice = block_index_x() % parts;
    const SliceSums<Tile> slices(p.slices, tile_m * tiles_n + tile_n, place.thread);
    const int first = slice * p.slices.slabs;
    const int last = p.slices.apart && first + p.slices.slabs < p.slabs ? first + p.slices.slabs : p.slabs;

    Pipeline pipeline = start(p, tile_n, rows, place, first, last);
    Group<Tile> group = {};
    if constexpr (Parts::kOne) group = Parts::whole_group(p, tile_n, rows.expert, place);
    typename Parts::Sums sums;
    typename Parts::Totals total;
    bool whole = false;
    for (int begin = first; begin < last; begin += p.slices.slabs, ++slice) {
      Parts::clear(sums, Op::start(kGroups));
      Parts::clear(total, 0.0f);
      const int end = begin + p.slices.slabs < last ? begin + p.slices.slabs : last;
      for (int slab = begin; slab < end;) {
        int stop = end;  // of the group, or the part of it that is in the slice
        int head = -1;   // the slab with the group's scales, if the thread has not read them
        if (kGroups == Groups::large) {
          const int begins = slab / p.group_slabs * p.group_slabs;
          if (slab == begins || slab == first) head = slab;
          if (begins + p.group_slabs < end) stop = begins + p.group_slabs;
        }
        pipeline.begin(sums);
        for (; slab < stop; ++slab) {
          const uint32_t from = pipeline.next(slab);
          if (kGroups == Groups::large && slab == head) group = Parts::read_group(p, from, 0, place);
          pipeline.multiply(from, slab, group, sums, total);
        }
        if (!Parts::kSmall) pipeline.settle(sums);
        if (kGroups == Groups::large) Parts::end_group(p, group, sums, total);
      }
      if (end == last) pipeline.drain();
      if constexpr (Parts::kOne)
        whole = slices.end_slice(slice, sums, shared_base());
      else
        whole = slices.end_slice(slice, total, shared_base());
    }
    if (!whole) return;
    sync_threads();  // shared memory is free for other uses
    if constexpr (Parts::kOne)
      Op::finish(p, rows, tile_n * Tile::kChannels, place, sums);
    else
      Op::finish(p, rows, tile_n * Tile::kChannels, place, total);
  }

 private:
  /// Blocks that run at the same time shall read the same weights, which L2 has then: kNear tiles of rows take turns before
  /// the channels go on.
  TM_DEVICE static void stay_near(const Params& p, int tiles_n, int& tile_n, int& tile_m) {
    constexpr int kNear = 8;
    const int tiles_m = (p.rows + Tile::kRows - 1) / Tile::kRows;
    const int first = tile_m / kNear * kNear, count = tiles_m - first < kNear ? tiles_m - first : kNear;
    const int number = (tile_m - first) * tiles_n + tile_n;
    tile_m = first + number % count;
    tile_n = number / count;
  }

  TM_DEVICE static Pipeline start(const Params& p, int tile_n, const TileRows& rows, const Place<Tile>& place, int first,
                                  int last) {
    if constexpr (kNeedsSm90a)
      return {p, tile_n, rows, place, first, last, shared_base() + static_cast<uint32_t>(kBarriers)};
    else
      return {p, tile_n, rows, place, first, last};
  }
};

}  // namespace turbo::cuda
