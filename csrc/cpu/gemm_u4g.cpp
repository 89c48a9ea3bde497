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

PreparedX prepare(const GemmU4g& args, const GemmU4gIsa& isa, const Parallel& parallel) {
  const LayoutU4g& l = args.layout;
  const bool convert = !isa.reads_in_place || l.k % kDwordK != 0;
  const int64_t row_units = l.k8() * isa.units_per_k8;
  const int64_t units = convert ? args.rows * row_units : 0;
  const int64_t sums = args.zero ? args.rows * l.groups : 0;
  PreparedX x{static_cast<const char*>(args.x), args.x_stride * dtype_size(args.dtype), nullptr};
  if (units + sums == 0) return x;

  auto* memory = static_cast<uint32_t*>(prepared_scratch.ensure((units + sums) * sizeof(uint32_t)));
  if (convert) x = {reinterpret_cast<const char*>(memory), row_units * 4, nullptr};
  if (args.zero) x.sums = reinterpret_cast<const float*>(memory + units);

  const bool serial = args.rows * row_units < kParallelUnits;
  const int64_t tasks = serial ? 1 : std::min(args.rows, parallel.threads);
  const auto body = [&](int64_t task) {
    const Range rows = part(args.rows, tasks, task);
    if (convert) isa.prepare(args, rows.begin, rows.end, x);
    if (args.zero) isa.sum(args, rows.begin, rows.end, x);
  };
  if (serial)
    body(0);
  else
    parallel(tasks, body);
  return x;
}

/// Items of work for each thread: the last one to finish is then at most an eighth behind.
constexpr int64_t kItemsPerThread = 8;

void gemm_chunk(const GemmU4g& args, const GemmU4gIsa& isa, const Parallel& parallel) {
  const PreparedX x = prepare(args, isa, parallel);
  const int64_t tiles = args.layout.tiles();
  if (args.rows <= isa.tile_rows) {
    // Bound by memory: near-equal bytes for each thread.
    const int64_t tasks = std::min(tiles, parallel.threads);
    parallel(tasks, [&](int64_t task) {
      const Range tile = part(tiles, tasks, task);
      isa.run(args, x, {tile.begin, tile.end, 0, args.rows});
    });
    return;
  }
  // Bound by the dot unit: whole blocks, the widest register tile, and as many cuts of the rows as make
  // the threads' shares equal. Consecutive items of a thread share their block, or their rows.
  const int64_t blocks = ceil_div(tiles, kBlockTiles);
  const int64_t row_tiles = ceil_div(args.rows, isa.tile_rows);
  const int64_t cuts =
      std::clamp<int64_t>(ceil_div(kItemsPerThread * parallel.threads, blocks), 1, row_tiles);
  const int64_t items = blocks * cuts;
  const int64_t tasks = std::min(items, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    const Range mine = part(items, tasks, task);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t tile = item / cuts * kBlockTiles;
      const Range row = part(row_tiles, cuts, item % cuts);
      isa.run(args, x,
              {tile, std::min(tile + kBlockTiles, tiles), row.begin * isa.tile_rows,
               std::min(row.end * isa.tile_rows, args.rows)});
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
