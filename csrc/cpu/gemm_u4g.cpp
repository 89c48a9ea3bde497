// SPDX-License-Identifier: Apache-2.0
// Driver of gemm_u4g: cuts the work into row chunks and thread shares and keeps the scratch memory.
#include "gemm_u4g.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "gemm_u4g_isa.h"

namespace turbo::cpu {
namespace {

/// Grow-only memory of the calling thread. 64-byte aligned, freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* ensure(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      bytes = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch prepared_scratch;

const GemmU4gIsa& kernels(Isa isa, DType dtype) {
  if (isa == Isa::avx2) return gemm_u4g_avx2(dtype);
  if (isa == Isa::avx512 || dtype == DType::f32) return gemm_u4g_avx512(dtype);
  return gemm_u4g_avx512bf16(dtype);
}

/// Below this many units the preparation of x costs less than waking the other threads.
constexpr int64_t kParallelUnits = 1 << 15;

/// From this many rows on x is laid out by row tiles: below, that costs what it gains.
constexpr int64_t kManyRows = 32;

/// x as the kernels read it. Scratch memory: rows of units where x needs converting, tiles of units
/// for many rows, sums over groups for asymmetric weights.
PreparedX prepare(const GemmU4g& args, const GemmU4gIsa& isa, const Parallel& parallel) {
  const LayoutU4g& l = args.layout;
  const bool convert = !isa.reads_in_place || l.k % kDwordK != 0;
  const bool tiled = args.rows >= kManyRows;
  const int64_t row_units = l.k8() * isa.units_per_k8, units = args.rows * row_units;
  const int64_t row_tiles = ceil_div(args.rows, tiled ? isa.many_rows : isa.few_rows);
  const int64_t sums = args.zero ? args.rows * l.groups : 0;
  const auto* x = static_cast<const char*>(args.x);
  const int64_t x_bytes = args.x_stride * dtype_size(args.dtype);
  if (!convert && !tiled && !sums) return {x, x_bytes, nullptr, false, row_tiles};

  auto* memory = static_cast<uint32_t*>(
      prepared_scratch.ensure((units * (convert + tiled) + sums) * sizeof(uint32_t)));
  uint32_t* const row_memory = memory;
  uint32_t* const tile_memory = memory + (convert ? units : 0);
  auto* const sum_memory = reinterpret_cast<float*>(tile_memory + (tiled ? units : 0));

  const auto prepare_tile = [&](int64_t tile) {
    const Range rows = part(args.rows, row_tiles, tile);
    const Unit* row_units_of[8];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Unit* source = reinterpret_cast<const Unit*>(x + row * x_bytes);
      if (convert) {
        isa.convert(args, row, row_memory + row * row_units);
        source = row_memory + row * row_units;
      }
      if (sums) isa.sum(args, source, sum_memory + row * l.groups);
      row_units_of[row - rows.begin] = source;
    }
    if (tiled)
      isa.interleave(row_units_of, rows.end - rows.begin, row_units, tile_memory + rows.begin * row_units);
  };
  if (units < kParallelUnits)
    for (int64_t tile = 0; tile < row_tiles; ++tile) prepare_tile(tile);
  else
    parallel(row_tiles, prepare_tile);

  const float* const all_sums = sums ? sum_memory : nullptr;
  if (tiled)
    return {reinterpret_cast<const char*>(tile_memory), row_units * 4, all_sums, true, row_tiles};
  if (convert)
    return {reinterpret_cast<const char*>(row_memory), row_units * 4, all_sums, false, row_tiles};
  return {x, x_bytes, all_sums, false, row_tiles};
}

/// Items of work for each thread: the last one to finish is then at most an eighth behind.
constexpr int64_t kItemsPerThread = 8;

void gemm_chunk(const GemmU4g& args, const GemmU4gIsa& isa, const Parallel& parallel) {
  const PreparedX x = prepare(args, isa, parallel);
  const int64_t tiles = args.layout.tiles();
  if (x.row_tiles == 1) {
    // Bound by memory: near-equal bytes for each thread.
    const int64_t tasks = std::min(tiles, parallel.threads);
    parallel(tasks, [&](int64_t task) {
      isa.run(args, x, {part(tiles, tasks, task), {0, 1}});
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
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t tile = item / cuts * kBlockTiles;
      isa.run(args, x,
              {{tile, std::min(tile + kBlockTiles, tiles)}, part(x.row_tiles, cuts, item % cuts)});
    }
  });
}

}  // namespace

void gemm_u4g(const GemmU4g& args, Isa isa, const Parallel& parallel) {
  const GemmU4gIsa& table = kernels(isa, args.dtype);
  const int64_t size = dtype_size(args.dtype);
  for (int64_t row = 0; row < args.rows; row += kRowChunk) {
    GemmU4g chunk = args;
    chunk.rows = std::min(kRowChunk, args.rows - row);
    chunk.x = static_cast<const char*>(args.x) + row * args.x_stride * size;
    chunk.y = static_cast<char*>(args.y) + row * args.layout.n * size;
    gemm_chunk(chunk, table, parallel);
  }
}

}  // namespace turbo::cpu
