// SPDX-License-Identifier: Apache-2.0
// Many rows and one long group of weights under integer activations: K in parts, whose int32 sums wait in memory.
//
// The weights of a register tile's channels are read again for every row tile, a line for 6 rows in 3 cycles (Zen 5), which
// a second-level cache can do and a third-level one cannot. 64 channels of 8-bit weights are 256 KiB at K = 4096 and no
// longer fit beside anything else at K = 14336. A part adds a load and a store of each sum, 1 / 1024 of its dots; integers
// have the same sum in any order.
#pragma once

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

/// The weights that one register tile's channels may have in a part.
inline constexpr int64_t kPartBytes = 256 << 10;

/// The share for many rows of `K`, a Kernel<I> of gemm_kernel.h.
template <class I, class K>
struct PartsKernel {
  using Vec = typename I::Vec;
  using Acc = typename I::Acc;
  using Raw = typename I::Raw;
  static constexpr int kTiles = I::Many::kTiles, kWidth = kTiles * kTileN;

  /// How many parts the K of a matrix is cut into.
  static int64_t parts_of(const Layout& l) {
    return l.groups == 1 ? ceil_div(l.dwords() * kWidth * 4, kPartBytes) : 1;
  }

  /// One part of K for row tile `index`, which begins at `row`.
  template <int T, int R>
  static void run_tile(const Gemm& a, const PreparedX& px, int64_t tile, int64_t index, int64_t row, const Range& part,
                       Acc* kept) {
    constexpr int V = T * K::kTileVecs;
    const bool last = part.end == a.layout.dwords();
    typename K::Stream s = K::stream(a, tile);
    const uint32_t* weight = s.weight + part.begin * s.weight_step;
    typename K::Ahead ahead(index, px.row_tiles, 1, part.end - part.begin, weight,
                            last ? K::stream(a, tile + T).weight : s.weight + part.end * s.weight_step, s.weight_step);
    typename K::template Tiled<R> x(px, row);
    x.units += part.begin * K::kUnits * R;
    Acc acc[V][R];
    if (part.begin == 0) {
      I::start(acc, px, row, 1, s.zero);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[v][r] = kept[v * R + r];
    }
    for (int64_t i = part.begin, stop; i < part.end; i = stop) {
      stop = part.end - i > kEvery ? i + kEvery : part.end;
      ahead.template fetch<T>(s.weight_step);
      for (; i < stop; ++i, x.next(), weight += s.weight_step) {
        Raw raw[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) raw[v] = I::load(weight + v * I::kLanes);
        K::template dots<0>(acc, raw, x);
      }
    }
    if (!last) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) kept[v * R + r] = acc[v][r];
      return;
    }
    Vec total[V][R];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[v][r] = I::zero();
    I::end(total, acc, px, row, 1, s.zero, s.scale);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) K::finish(a, px, row + r, tile * kTileN + v * I::kLanes, total[v][r]);
  }

  template <int T, int R>
  static auto find(int64_t tiles, int64_t rows) {
    if constexpr (T > 1) {
      if (tiles < T) return find<T - 1, R>(tiles, rows);
    }
    if constexpr (R > 1) {
      if (rows < R) return find<T, R - 1>(tiles, rows);
    }
    return &run_tile<T, R>;
  }

  /// Row tiles are taken kRowChunk rows at a time.
  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    for (int64_t first = share.row_tiles.begin, last; first < share.row_tiles.end; first = last) {
      const int64_t top = part(x.rows, x.row_tiles, first).begin;
      for (last = first; last < share.row_tiles.end; ++last)
        if (part(x.rows, x.row_tiles, last).end - top > kRowChunk) break;
      run_chunk(a, x, {share.tiles, {first, last}});
    }
  }

  static void run_chunk(const Gemm& a, const PreparedX& x, const Share& share) {
    alignas(64) Acc sums[kRowChunk * kWidth / I::kLanes];
    const int64_t top = part(x.rows, x.row_tiles, share.row_tiles.begin).begin, count = parts_of(a.layout);
    for (int64_t tile = share.tiles.begin; tile < share.tiles.end;) {
      const int64_t block_end = (tile / kBlockTiles + 1) * kBlockTiles;
      int64_t tiles = (block_end < share.tiles.end ? block_end : share.tiles.end) - tile;
      if (tiles > kTiles) tiles = kTiles;
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = share.row_tiles.begin; i < share.row_tiles.end; ++i) {
          const Range rows = part(x.rows, x.row_tiles, i);
          find<kTiles, I::Many::kRows>(tiles, rows.end - rows.begin)(
              a, x, tile, i, rows.begin, part(a.layout.dwords(), count, p),
              sums + (rows.begin - top) * (kWidth / I::kLanes));
        }
      tile += tiles;
    }
  }
};

}  // namespace
}  // namespace turbo::cpu
