// SPDX-License-Identifier: Apache-2.0
// Driver: cuts the work into row chunks and thread shares and keeps the scratch memory.
#include "gemm.h"

#include <algorithm>

#include "prepare.h"

namespace turbo::cpu {

namespace {

/// For weights that are floats. With integers these share no instruction of their own, so VNNI has no part in them.
const GemmIsa& float_kernels(const Gemm& args, Isa isa) {
  if (isa == Isa::avx2 || isa == Isa::avxvnni) return gemm_float_avx2(args);
  if (isa == Isa::amx) return gemm_float_amx(args);
  const bool kept = args.activations == Activations::kept;
  if (isa != Isa::avx512bf16 || (kept && args.dtype == DType::f32)) return gemm_float_avx512(args);
  if (args.layout.code == Code::e2m1) return gemm_float_avx512bf16(args);
  // Cooper Lake has BF16 without VBMI.
  return has_vbmi() ? gemm_float_avx512vbmi(args) : gemm_float_avx512(args);
}

}  // namespace

const GemmIsa& kernels(const Gemm& args, Isa isa) {
  const bool kept = args.activations == Activations::kept;
  if (kept && args.dtype == DType::f32) isa = vector_isa(isa);  // tiles have no products of fp32
  if (args.layout.code != Code::integer) return float_kernels(args, isa);
  switch (isa) {
    case Isa::amx: return gemm_amx(args);
    case Isa::avx512bf16:
      if (kept && args.dtype != DType::f32) return gemm_avx512bf16(args);
      [[fallthrough]];
    case Isa::avx512vnni:
      if (!kept) return gemm_avx512vnni(args);
      [[fallthrough]];
    case Isa::avx512: return gemm_avx512(args);
    case Isa::avxvnni:
      if (!kept) return gemm_avxvnni(args);
      [[fallthrough]];
    default: return gemm_avx2(args);
  }
}

namespace {

thread_local Scratch prepared_scratch, workspace_scratch;

}  // namespace

void run_share(const GemmIsa& isa, const Gemm& args, const PreparedX& x, Share share) {
  if (share.tiles.begin >= share.tiles.end || share.row_tiles.begin >= share.row_tiles.end) return;
  const int64_t bytes = isa.workspace(args, x, share);
  if (bytes) share.workspace = workspace_scratch.ensure(static_cast<size_t>(bytes));
  isa.run(args, x, share);
}

namespace {

/// x as the kernels read it. Scratch memory: rows of units where x needs converting, tiles of units for many
/// rows, and what PreparedX names per row and group.
PreparedX prepare(const Gemm& args, const GemmIsa& isa, const Parallel& parallel) {
  PreparedRows rows(args, isa);
  const bool tiled = args.rows >= isa.many_from;
  const int64_t row_tiles = ceil_div(args.rows, tiled ? isa.many_rows : isa.few_rows);
  Pieces pieces(prepared_scratch);
  uint32_t* tiles = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    rows.take(pieces, args.rows);
    const int64_t room = rows.room(row_tiles, ceil_div(args.rows, row_tiles));
    tiles = pieces.take<uint32_t>(tiled, row_tiles * room * rows.tile_units);
    if (pass == 0) pieces.begin();
  }

  const auto prepare_tile = [&](int64_t tile) {
    const Range range = row_tile(args.rows, row_tiles, tiled && isa.full_tiles, tile);
    const Unit* units[kMostTileRows];
    for (int64_t row = range.begin; row < range.end; ++row) {
      if (rows.needed()) rows.prepare(row);
      units[row - range.begin] = rows.units_of(row);
    }
    if (tiled)
      isa.interleave(args, units, range.end - range.begin, rows.room(row_tiles, range.end - range.begin),
                     tiles + range.begin * rows.tile_units);
  };
  if (tiled || rows.needed()) {
    if (args.rows * rows.row_units < kParallelUnits)
      for (int64_t tile = 0; tile < row_tiles; ++tile) prepare_tile(tile);
    else
      parallel(row_tiles, prepare_tile);
  }

  const auto* from = tiled ? reinterpret_cast<const char*>(tiles) : reinterpret_cast<const char*>(rows.units_of(0));
  return {from,
          tiled ? rows.tile_units * 4 : rows.row_bytes(),
          tiled,
          args.rows,
          row_tiles,
          tiled && isa.full_tiles,
          nullptr,
          rows.beside.sums,
          rows.beside.offsets,
          rows.beside.group_scales,
          rows.beside.scales};
}

/// Items of work for each thread: the last one to finish is then at most an eighth behind.
constexpr int64_t kItemsPerThread = 8;

void gemm_chunk(const Gemm& args, const GemmIsa& isa, const Parallel& parallel) {
  const PreparedX x = prepare(args, isa, parallel);
  const int64_t tiles = args.layout.tiles();
  if (x.row_tiles == 1) {
    // Bound by memory: near-equal bytes for each thread.
    const int64_t tasks = std::min(tiles, parallel.threads);
    parallel(tasks, [&](int64_t task) {
      run_share(isa, args, x, {part(tiles, tasks, task), {0, 1}});
    });
    return;
  }
  // Bound by the dot units: whole blocks, the widest register tile, and as many cuts of the rows as make
  // the threads' shares equal. Consecutive items of a thread share their block, or their rows.
  const int64_t blocks = ceil_div(tiles, kBlockTiles);
  const int64_t cuts =
      std::clamp<int64_t>(ceil_div(kItemsPerThread * parallel.threads, blocks), 1, x.row_tiles);
  const int64_t items = blocks * cuts;
  const int64_t tasks = std::min(items, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    const Range mine = part(items, tasks, task);
    const auto run = [&](int64_t begin, int64_t end, const Range& row_tiles) {
      run_share(isa, args, x, {{begin * kBlockTiles, std::min(end * kBlockTiles, tiles)}, row_tiles});
    };
    if (cuts == 1) return run(mine.begin, mine.end, {0, x.row_tiles});
    for (int64_t item = mine.begin; item < mine.end; ++item)
      run(item / cuts, item / cuts + 1, part(x.row_tiles, cuts, item % cuts));
  });
}

}  // namespace

void gemm(const Gemm& args, Isa isa, const Parallel& parallel) {
  const GemmIsa& table = kernels(args, isa);
  const int64_t size = dtype_size(args.dtype);
  for (int64_t row = 0; row < args.rows; row += kRowChunk) {
    Gemm chunk = args;
    chunk.rows = std::min(kRowChunk, args.rows - row);
    chunk.x = static_cast<const char*>(args.x) + row * args.x_stride * size;
    chunk.y = static_cast<char*>(args.y) + row * args.y_stride * dtype_size(args.y_dtype);
    gemm_chunk(chunk, table, parallel);
  }
}

}  // namespace turbo::cpu
