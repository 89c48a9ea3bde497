// SPDX-License-Identifier: Apache-2.0
// What each instruction set's translation unit offers to the driver.
#pragma once

#include "gemm.h"

namespace turbo::cpu {

/// A register tile: at most this many channel tiles and rows.
template <int Tiles, int Rows>
struct RegisterTile {
  static constexpr int kTiles = Tiles, kRows = Rows;
};

/// Most rows of any register tile.
inline constexpr int64_t kMostTileRows = 16;

/// Dwords of K between two times that one of many row tiles fetches ahead: the fewer lines at a time, the less the dots
/// wait for room in the queue of misses.
inline constexpr int64_t kAheadDwords = 4;

/// What one dot multiplies: a bf16 pair, an fp32, four bytes or two 16-bit integers. Any address, as x
/// may be read in place.
using Unit [[gnu::may_alias, gnu::aligned(2)]] = uint32_t;

/// Activations in the form that a kernel reads: units, and what their rows need beside them.
///
///   rows   [row][unit]: x itself, or its conversion
///   tiles  one stream for all rows of a tile, as rows that lie a power of two apart would fight for the same cache
///          sets. A tile begins at its first row * row_bytes. In it, for vectors, [unit][row]; for AMX see
///          tile_kernel.h.
struct PreparedX {
  const char* units;
  int64_t row_bytes;  // from row to row; any value where x is read in place
  bool tiled;
  int64_t rows;
  int64_t row_tiles;  // the rows are cut into this many tiles, see row_tile
  bool full_tiles;
  const int32_t* source_rows;  // by rows: row r of the product reads this row of units; nullptr: row r
  // [rows, groups], nullptr where a kernel has no use for them.
  const float* sums;          // activations kept, asymmetric weights: sums of x over each group
  const int32_t* offsets;     // integer activations: what an accumulator starts with, see RowOut
  const float* group_scales;  // activations grouped: scales of x, one for each group of weights
  const float* scales;        // [rows]: dynamic and fixed: scale of x
};

/// The rows of a tile: near-equal shares of all, or kMostTileRows where there are as many left.
[[gnu::always_inline]] inline Range row_tile(int64_t rows, int64_t row_tiles, bool full_tiles, int64_t index) {
  if (!full_tiles) return part(rows, row_tiles, index);
  const int64_t begin = index * kMostTileRows;
  return {begin, rows - begin < kMostTileRows ? rows : begin + kMostTileRows};
}

/// Where `prepare` puts one row: its units, and its part of the arrays of PreparedX.
struct RowOut {
  uint32_t* units;  // nullptr: x stays where it is, `source` are its units
  const Unit* source;
  float* sums;
  /// Minus what the integer dots count too much: 4-bit weights are multiplied as codes q + 8, so -8 (symmetric;
  /// else -1, times z + 8 of the channel) times the sum of x's codes over the group; 8-bit weights see
  /// codes of x off by 128 (VNNI) and zx, so minus both, times the sum of the channel's weights.
  int32_t* offsets;
  float* group_scales;
  float* scale;
};

/// The part of the output that one thread computes: channel tiles of row tiles.
struct Share {
  Range tiles, row_tiles;
  void* workspace = nullptr;  // of the thread, 64-byte aligned
};

struct GemmIsa {
  int64_t units_per_dword;  // units that hold the activations of one dword of weights
  int64_t few_rows;         // most rows of a register tile that reads x by rows
  int64_t many_rows;        // most rows of a register tile that reads x by tiles
  int64_t many_from;        // from this many rows on x is laid out by tiles
  bool full_tiles;          // those have all rows that they can; with others, each has memory for them
  bool reads_in_place;      // x needs no conversion where k fills whole dwords
  /// Prepares one row: units zero padded to whole dwords of weights.
  void (*prepare)(const Gemm& args, int64_t row, const RowOut& out);
  /// Units of a row in a tile of rows, what pads them included.
  int64_t (*tile_units)(const Layout& layout);
  /// Lays the units of `rows` rows out as a tile that has memory for `room`.
  void (*interleave)(const Gemm& args, const Unit* const* row_units, int64_t rows, int64_t room, uint32_t* out);
  /// Bytes of workspace that `run` needs for a share.
  int64_t (*workspace)(const Gemm& args, const PreparedX& x, const Share& share);
  /// Computes one share of y.
  void (*run)(const Gemm& args, const PreparedX& x, const Share& share);
};

/// Kernels of one translation unit for bits and activations of `args`; only the combinations that gemm.cpp
/// asks for exist.
const GemmIsa& gemm_avx2(const Gemm& args);
const GemmIsa& gemm_avx512(const Gemm& args);
/// Activations kept, bf16 and fp16 only: for fp32 the multiply-add kernels are exact and not slower.
const GemmIsa& gemm_avx512bf16(const Gemm& args);
/// Integer activations only.
const GemmIsa& gemm_avxvnni(const Gemm& args);
const GemmIsa& gemm_avx512vnni(const Gemm& args);
/// Weights that are floats.
const GemmIsa& gemm_float_avx2(const Gemm& args);
const GemmIsa& gemm_float_avx512(const Gemm& args);
/// e2m1, bf16 and fp16.
const GemmIsa& gemm_float_avx512bf16(const Gemm& args);
/// e4m3, all but fp32 activations that are kept.
const GemmIsa& gemm_float_avx512vbmi(const Gemm& args);
/// All but fp32 activations that are kept.
const GemmIsa& gemm_amx(const Gemm& args);
const GemmIsa& gemm_float_amx(const Gemm& args);

}  // namespace turbo::cpu
