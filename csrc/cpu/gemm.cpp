// SPDX-License-Identifier: Apache-2.0
// Driver: cuts the work into row chunks and thread shares and keeps the scratch memory.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "gemm_isa.h"

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

const GemmIsa& kernels(const Gemm& args, Isa isa) {
  const bool kept = args.activations == Activations::kept;
  switch (isa) {
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

/// Below this many units the preparation of x costs less than waking the other threads.
constexpr int64_t kParallelUnits = 1 << 15;

/// Hands out pieces of one block of scratch memory.
class Pieces {
 public:
  /// First call: sizes are added up; second call, after `begin`: pointers. nullptr where not wanted.
  template <class T>
  T* take(bool wanted, int64_t count) {
    if (!wanted) return nullptr;
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += static_cast<size_t>(count) * sizeof(T);
    return at;
  }
  void begin() {
    memory_ = static_cast<char*>(prepared_scratch.ensure(used_));
    used_ = 0;
  }
  bool empty() const { return used_ == 0; }

 private:
  char* memory_ = nullptr;
  size_t used_ = 0;
};

/// x as the kernels read it. Scratch memory: rows of units where x needs converting, tiles of units for many
/// rows, and what PreparedX names per row and group.
PreparedX prepare(const Gemm& args, const GemmIsa& isa, const Parallel& parallel) {
  const Layout& l = args.layout;
  const bool kept = args.activations == Activations::kept;
  const bool convert = !isa.reads_in_place || l.k % l.dword_k() != 0;
  const bool tiled = args.rows >= isa.many_from;
  const int64_t row_units = l.dwords() * isa.units_per_dword, units = args.rows * row_units;
  const int64_t row_tiles = ceil_div(args.rows, tiled ? isa.many_rows : isa.few_rows);
  const int64_t groups = args.rows * l.groups;
  const auto* x = static_cast<const char*>(args.x);
  const int64_t x_bytes = args.x_stride * dtype_size(args.dtype);

  uint32_t *row_memory, *tile_memory;
  float *sums, *group_scales, *scales;
  int32_t* offsets;
  Pieces pieces;
  for (int pass = 0; pass < 2; ++pass) {
    row_memory = pieces.take<uint32_t>(convert, units);
    tile_memory = pieces.take<uint32_t>(tiled, units);
    sums = pieces.take<float>(kept && args.zero, groups);
    offsets = pieces.take<int32_t>(!kept, groups);
    group_scales = pieces.take<float>(args.activations == Activations::grouped, groups);
    scales = pieces.take<float>(!kept && args.activations != Activations::grouped, args.rows);
    if (pieces.empty()) return {x, x_bytes, false, row_tiles, nullptr, nullptr, nullptr, nullptr};
    if (pass == 0) pieces.begin();
  }

  const auto prepare_tile = [&](int64_t tile) {
    const Range rows = part(args.rows, row_tiles, tile);
    const Unit* row_units_of[8];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t group = row * l.groups;
      const Unit* source = reinterpret_cast<const Unit*>(x + row * x_bytes);
      uint32_t* out = convert ? row_memory + row * row_units : nullptr;
      if (convert || sums)
        isa.prepare(args, row, {out, source, sums ? sums + group : nullptr, offsets ? offsets + group : nullptr,
                                group_scales ? group_scales + group : nullptr,
                                scales ? scales + row : nullptr});
      row_units_of[row - rows.begin] = convert ? out : source;
    }
    if (tiled)
      isa.interleave(row_units_of, rows.end - rows.begin, row_units, tile_memory + rows.begin * row_units);
  };
  if (units < kParallelUnits)
    for (int64_t tile = 0; tile < row_tiles; ++tile) prepare_tile(tile);
  else
    parallel(row_tiles, prepare_tile);

  const auto* from = tiled ? reinterpret_cast<const char*>(tile_memory)
                           : convert ? reinterpret_cast<const char*>(row_memory) : x;
  return {from,  tiled || convert ? row_units * 4 : x_bytes, tiled, row_tiles, sums, offsets, group_scales, scales};
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

void gemm(const Gemm& args, Isa isa, const Parallel& parallel) {
  const GemmIsa& table = kernels(args, isa);
  const int64_t size = dtype_size(args.dtype);
  for (int64_t row = 0; row < args.rows; row += kRowChunk) {
    Gemm chunk = args;
    chunk.rows = std::min(kRowChunk, args.rows - row);
    chunk.x = static_cast<const char*>(args.x) + row * args.x_stride * size;
    chunk.y = static_cast<char*>(args.y) + row * args.layout.n * size;
    gemm_chunk(chunk, table, parallel);
  }
}

}  // namespace turbo::cpu
