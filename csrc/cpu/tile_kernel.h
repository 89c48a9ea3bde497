// SPDX-License-Identifier: Apache-2.0
// The product on AMX tiles, once for every format: `I` names the instructions (gemm.h states the arithmetic). Up to 16
// rows go to tile_few.h, more to tile_many.h. A row has the same bits in both and in every batch, since a tile sums
// each of its rows alone, and vectors sum as tiles do (tile_order_avx512.h).
//
// Activations in tiles: [group][step][plane][row][16 units], a group padded with zeros to whole steps.
//
// `I` provides  Vec, Acc, ...      as in gemm_kernel.h, start and end of groups.h included
//               kLineRows          rows of B that a line of weights becomes
//               kPlanes            units of x for each of them
//               kDirect            whether a line is a row of B as it lies in memory
//               kIntegers          whether sums are int32
//               kOffsets           whether `start` adds to the sums of symmetric weights, too
//               decode_line        writes those rows, 64 bytes apart
//               tile_dot<C, A, B>  the instruction
#pragma once

#include "tile_few.h"
#include "tile_many.h"

namespace turbo::cpu {
namespace {

template <class I>
struct TileKernel {
  using Few = TileFew<I>;
  using Many = TileMany<I>;

  static int64_t workspace(const Gemm& a, const PreparedX& x, const Share& share) {
    return x.row_tiles == 1 ? Few::kWorkspace : Many::workspace(a, share);
  }

  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    TileConfig config;
    const int64_t rows = x.row_tiles == 1 ? x.rows : kTileRows;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kTileRowBytes;
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileRows);
    }
    tile_configure(config);
    if (x.row_tiles == 1)
      Few::run(a, x, share.tiles, static_cast<char*>(share.workspace));
    else
      Many::run(a, x, share);
    tile_release();
  }

  static void prepare(const Gemm& a, int64_t row, const RowOut& out) {
    I::prepare_row(a, static_cast<const char*>(a.x) + row * a.x_stride * dtype_size(a.dtype), out);
  }

  static constexpr GemmIsa kTable{Few::kUnits, kTileRows,       kTileRows,      1,         true, I::kReadsInPlace,
                                  prepare,     Few::tile_units, Few::pack_rows, workspace, run};
};

/// `Vectors`, a Kernel of gemm_kernel.h, for less than `From` rows, where decoding a line for a tile costs more than
/// multiplying it on vectors; else `Tiles`. Both take the same units and give the same bits.
template <class Vectors, class Tiles, int64_t From>
struct FewOnVectors {
  static int64_t workspace(const Gemm& a, const PreparedX& x, const Share& share) {
    return x.tiled ? Tiles::workspace(a, x, share) : 0;
  }
  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    x.tiled ? Tiles::run(a, x, share) : Vectors::run(a, x, share);
  }

  static_assert(Vectors::kTable.units_per_dword == Tiles::kTable.units_per_dword);
  static constexpr GemmIsa kTable{Vectors::kTable.units_per_dword,
                                  Vectors::kTable.few_rows,
                                  kTileRows,
                                  From,
                                  true,
                                  Vectors::kTable.reads_in_place,
                                  Vectors::prepare,
                                  Tiles::kTable.tile_units,
                                  Tiles::kTable.interleave,
                                  workspace,
                                  run};
};

}  // namespace
}  // namespace turbo::cpu
