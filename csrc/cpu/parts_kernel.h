// SPDX-License-Identifier: Apache-2.0
// Many rows and one long group of weights under integer activations: K in parts, whose int32 sums wait in memory.
//
// The weights of a register tile's channels are read again for every row tile, a line for 6 rows in 3 cycles (Zen 5), which
// a second-level cache can do and a third-level one cannot. 64 channels of 8-bit weights are 256 KiB at K = 4096 and no
// longer fit beside anything else at K = 14336. A part adds a load and a store of each sum, 1 / 1024 of its dots; integers
// have the same sum in any order.
#pragma once

#include "shares.h"

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
      stop = part.end - i > kAheadDwords ? i + kAheadDwords : part.end;
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
    for (int v = 0; v < V; ++v) {
      const typename K::Output y(a, px, tile * kTileN + v * I::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) y.store(row + r, total[v][r]);
    }
  }

  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    alignas(64) Acc sums[kRowChunk * kWidth / I::kLanes];
    const int64_t count = parts_of(a.layout);
    each_row_chunk(x, share.row_tiles, [&](const Range& row_tiles, int64_t top) {
      each_run_of_tiles(share.tiles, kTiles, [&](int64_t tile, int64_t tiles) {
        for (int64_t p = 0; p < count; ++p)
          for (int64_t i = row_tiles.begin; i < row_tiles.end; ++i) {
            const Range rows = part(x.rows, x.row_tiles, i), steps = part(a.layout.dwords(), count, p);
            Acc* const kept = sums + (rows.begin - top) * (kWidth / I::kLanes);
            with_shape<kTiles, I::Many::kRows>(tiles, rows.end - rows.begin, [&]<int T, int R>() {
              run_tile<T, R>(a, x, tile, i, rows.begin, steps, kept);
            });
          }
      });
    });
  }
};

}  // namespace
}  // namespace turbo::cpu
