// SPDX-License-Identifier: Apache-2.0
// What each instruction set's translation unit offers to the driver of gemm_u4g.
#pragma once

#include "gemm_u4g.h"

namespace turbo::cpu {

/// A register tile: at most this many channel tiles and rows.
template <int Tiles, int Rows>
struct RegisterTile {
  static constexpr int kTiles = Tiles, kRows = Rows;
};

/// A bf16 pair or an fp32: what one dot multiplies. Any address, as x may be read in place.
using Unit [[gnu::may_alias, gnu::aligned(2)]] = uint32_t;

/// Activations in the form that a kernel reads: units, and their sums over each group.
///
///   rows   [row][unit]: x itself, or its conversion
///   tiles  [row tile][unit][row of the tile]: one stream for all rows of a tile, as a tile of 8 rows that
///          lie a power of two apart would fight for the same cache sets. Tile t of n begins at
///          part(rows, n, t).begin * units_per_row.
struct PreparedX {
  const char* units;
  int64_t row_bytes;  // from row to row; any value where x is read in place
  const float* sums;  // [rows, groups] sums of x over each group, nullptr when symmetric
  bool tiled;
  int64_t row_tiles;  // the rows are cut into this many near-equal tiles
};

/// The part of the output that one thread computes: channel tiles of row tiles.
struct Share {
  Range tiles, row_tiles;
};

struct GemmU4gIsa {
  int64_t units_per_k8;  // units that hold 8 activations
  int64_t few_rows;      // most rows of a register tile that reads x by rows
  int64_t many_rows;     // most rows of a register tile that reads x by tiles
  bool reads_in_place;   // x needs no conversion where k is a multiple of 8
  /// Converts one row of x to units, zero padded to whole dwords of weights.
  void (*convert)(const GemmU4g& args, int64_t row, uint32_t* units);
  /// Interleaves `rows` rows of `count` units: out[unit][row].
  void (*interleave)(const Unit* const* row_units, int64_t rows, int64_t count, uint32_t* out);
  /// Sums one row of units over each group.
  void (*sum)(const GemmU4g& args, const Unit* units, float* sums);
  /// Computes one share of y.
  void (*run)(const GemmU4g& args, const PreparedX& x, const Share& share);
};

const GemmU4gIsa& gemm_u4g_avx2(DType dtype);
const GemmU4gIsa& gemm_u4g_avx512(DType dtype);
/// bf16 and fp16 only: for fp32 the multiply-add kernels are exact and not slower.
const GemmU4gIsa& gemm_u4g_avx512bf16(DType dtype);

}  // namespace turbo::cpu
