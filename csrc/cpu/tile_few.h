// SPDX-License-Identifier: Apache-2.0
// The product of tile_kernel.h for up to 16 rows: memory bounds it, and every weight is used once.
//
// C tiles of the channel tiles of a run are tmm0 and on, A is tmm4 and, of the second plane, tmm5, B tmm6 and tmm7.
// While the tile unit multiplies one step, the vector units decode the next one, and after the first step of a group
// they add the sums of the group before.
#pragma once

#include "tile_sums.h"

namespace turbo::cpu {
namespace {

template <class I>
struct TileFew : TileSums<I> {
  using Base = TileSums<I>;
  using Base::add_tile, Base::finish_tile, Base::group_steps, Base::kLines, Base::kTileFloats;
  using Stream = typename Base::Stream;

  // Of a workspace: B tiles of two steps, sums of a group, totals.
  static constexpr int64_t kStepBytes = kBlockTiles * kTileBytes, kSumBytes = kBlockTiles * kTileBytes;
  static constexpr int64_t kWorkspace = 2 * kStepBytes + 2 * kSumBytes;

  /// The B tiles of one step: where they are, the way from row to row, and from tile to tile.
  struct Weights {
    const char* at;
    int64_t row, tile;
  };

  /// Walks the steps of some channel tiles.
  struct Decoder {
    const uint32_t* weight;
    int64_t line_step;
    int64_t group_lines, left;  // of the group
    char* memory;
    int64_t turn = 0;

    Decoder(const Stream& s, int64_t lines, char* to)
        : weight(s.weight), line_step(s.weight_step), group_lines(lines), left(lines), memory(to) {}

    template <int T>
    [[gnu::always_inline]] inline Weights next() {
      char* const to = memory + turn * kStepBytes;
      turn ^= 1;
      const uint32_t* line = weight;
      if (left >= kLines) {
        weight += kLines * line_step;
        left = left == kLines ? group_lines : left - kLines;
#pragma GCC unroll 16
        for (int64_t l = 0; l < kLines; ++l) {
          const uint32_t* const at = line + l * line_step;
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            __builtin_prefetch(at + kTilePrefetch + t * kTileN, 0, 2);
            if constexpr (!I::kDirect)
              I::decode_line(at + t * kTileN, to + t * kTileBytes + l * I::kLineRows * kTileRowBytes);
          }
        }
        if constexpr (I::kDirect) return {reinterpret_cast<const char*>(line), line_step * 4, kTileRowBytes};
      } else {
        decode_rest<T>(line, to);
        weight += left * line_step;
        left = group_lines;
      }
      return {to, kTileRowBytes, kTileBytes};
    }

    /// The last lines of a group, which fill no tile.
    template <int T>
    [[gnu::noinline]] void decode_rest(const uint32_t* line, char* to) const {
      for (int t = 0; t < T; ++t, line += kTileN, to += kTileBytes) {
        __builtin_memset(to, 0, kTileBytes);
        for (int64_t l = 0; l < left; ++l) I::decode_line(line + l * line_step, to + l * I::kLineRows * kTileRowBytes);
      }
    }
  };

  /// C tiles C to T - 1: with `First` their sums begin, and what they held goes to `before`, if that is anywhere.
  template <int T, bool First, int C = 0>
  [[gnu::always_inline]] static inline void multiply(const Weights& w, char* before) {
    if constexpr (First) {
      if (before) tile_store<C>(before + C * kTileBytes, kTileRowBytes);
      tile_zero<C>();
    }
    tile_load<6 + C % 2>(w.at + C * w.tile, w.row);
    I::template tile_dot<C, 4, 6 + C % 2>();
    if constexpr (I::kPlanes == 2) I::template tile_dot<C, 5, 6 + C % 2>();
    if constexpr (C + 1 < T) multiply<T, First, C + 1>(w, before);
  }

  template <int N>
  [[gnu::always_inline]] static inline void add_plain_rows(const char* sums, const float* factor, const float* from,
                                                           float* totals, int64_t row) {
    Base::template add_plain<N>(sums + row * kTileRowBytes, 0, 1, factor, 0, from + row * kTileN,
                                totals + row * kTileN);
  }

  /// The sums of group `group`, in `sums`.
  template <int T>
  static void add_group(const Gemm& a, const PreparedX& x, const Stream& s, int64_t group, const char* sums,
                        float* totals) {
    constexpr int64_t kRows = 8;
    alignas(64) float scales[T * kTileN];
    const bool plain = Base::plain(a, x);
    if (plain) Base::load_scales(s, group, 1, T, scales);
    for (int64_t t = 0; t < T; ++t, sums += kTileBytes, totals += kTileFloats) {
      const float* from = group ? totals : kZeroTile;
      if (plain) {
        const float* const factor = scales + t * kTileN;
        int64_t r = 0;
        for (; r + kRows <= x.rows; r += kRows) add_plain_rows<kRows>(sums, factor, from, totals, r);
        for (; r < x.rows; ++r) add_plain_rows<1>(sums, factor, from, totals, r);
      } else {
        const char* scale = s.scale + group * s.scale_step + t * kTileN * dtype_size(a.scale_dtype);
        const uint32_t* zero = s.zero ? s.zero + group * s.zero_step + t * I::zero_dwords(a.layout) : nullptr;
        add_tile(a, x, {group, 1, scale, zero, 0, 0}, 0, x.rows, sums, 0, from, totals);
      }
    }
  }

  /// T channel tiles from `tile` on.
  template <int T>
  [[gnu::noinline]] static void run_tiles(const Gemm& a, const PreparedX& x, int64_t tile, char* memory) {
    char* const sums = memory + 2 * kStepBytes;
    float* const totals = reinterpret_cast<float*>(sums + kSumBytes);
    const int64_t groups = a.layout.groups, steps = group_steps(a.layout), plane = x.rows * kTileRowBytes;
    const Stream s = Base::stream(a, tile);
    Decoder decoder(s, a.layout.group_dwords(), memory);
    const char* units = x.units;
    Weights now = decoder.template next<T>();
    char* before = nullptr;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t step = 0; step < steps; ++step, units += I::kPlanes * plane) {
        tile_load<4>(units, kTileRowBytes);
        if constexpr (I::kPlanes == 2) tile_load<5>(units + plane, kTileRowBytes);
        if (step == 0)
          multiply<T, true>(now, before);
        else
          multiply<T, false>(now, nullptr);
        if (step + 1 < steps || group + 1 < groups) now = decoder.template next<T>();
        tile_fence();
        if (step == 0 && before) add_group<T>(a, x, s, group - 1, sums, totals);
      }
      before = sums;
    }
    Base::template store_tiles<T>(sums);
    tile_fence();
    add_group<T>(a, x, s, groups - 1, sums, totals);
    for (int64_t t = 0; t < T; ++t) finish_tile(a, x, 0, x.rows, tile + t, totals + t * kTileFloats);
  }

  static void run(const Gemm& a, const PreparedX& x, const Range& tiles, char* memory) {
    each_run_of_tiles(tiles, kBlockTiles, [&](int64_t tile, int64_t count) {
      if (count == kBlockTiles) return run_tiles<kBlockTiles>(a, x, tile, memory);
      for (int64_t t = 0; t < count; ++t) run_tiles<1>(a, x, tile + t, memory);
    });
  }
};

}  // namespace
}  // namespace turbo::cpu
