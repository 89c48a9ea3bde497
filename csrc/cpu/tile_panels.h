// SPDX-License-Identifier: Apache-2.0
// How K, channels and rows are cut for AMX tiles, where the activations of a row tile lie, and how weights become B
// tiles: tile_kernel.h says what for, and names what `I` provides.
#pragma once

#include "amx.h"
#include "channels.h"
#include "shares.h"

namespace turbo::cpu {
namespace {

/// How far ahead of their use weights are fetched, in dwords, see gemm_kernel.h.
constexpr int64_t kTilePrefetch = 8192 / 4;

/// For `I` of tile_kernel.h.
template <class I>
struct TilePanels : Channels<I> {
  using Stream = typename Channels<I>::Stream;
  using Channels<I>::stream;

  static constexpr int64_t kLines = kTileRows / I::kLineRows;   // lines of weights in a B tile
  static constexpr int64_t kUnits = I::kLineRows * I::kPlanes;  // units of x per dword of weights
  static constexpr int64_t kSteps = I::kDirect ? 8 : 4;         // of a panel
  static constexpr int64_t kTileFloats = kTileBytes / 4;
  static constexpr int64_t kSetBytes = 4 * kTileBytes;  // C tiles of a set
  static constexpr int64_t kPanelBytes = kSteps * kBlockTiles * kTileBytes;
  static constexpr int64_t kStageBytes = kSteps * kSetBytes;
  static constexpr int64_t kPassSets = 4;         // sets that share a panel: their totals fill 16 KiB
  static constexpr int64_t kPartBytes = 1 << 20;  // of activations: half of a second-level cache

  static int64_t group_steps(const Layout& l) { return ceil_div(l.group_dwords(), kLines); }
  static int64_t steps(const Layout& l) { return l.groups * group_steps(l); }
  static int64_t tile_units(const Layout& l) { return steps(l) * I::kPlanes * kTileRowBytes / 4; }

  /// See GemmIsa::interleave.
  static void pack_rows(const Gemm& a, const Unit* const* rows, int64_t count, int64_t stride, uint32_t* out) {
    constexpr int64_t kRow = kTileRowBytes / 4;
    const int64_t units = a.layout.group_dwords() * kUnits, steps = group_steps(a.layout);
    for (int64_t g = 0; g < a.layout.groups; ++g)
      for (int64_t s = 0; s < steps; ++s, out += I::kPlanes * stride * kRow) {
        const int64_t at = s * kRow * I::kPlanes, left = units - at;
        for (int64_t r = 0; r < count; ++r) {
          const Unit* const from = rows[r] + g * units + at;
          for (int p = 0; p < I::kPlanes; ++p) {
            uint32_t* const to = out + (p * stride + r) * kRow;
            if (I::kPlanes == 1 && left >= kRow) {
              __builtin_memcpy(to, from, kTileRowBytes);
              continue;
            }
            for (int64_t u = 0; u < kRow; ++u) {
              const int64_t unit = u * I::kPlanes + p;
              to[u] = unit < left ? static_cast<uint32_t>(from[unit]) : 0;
            }
          }
        }
      }
  }

  /// Some steps of some channels: `pieces` whole groups from `group` on, or a part of one.
  struct Panel {
    int64_t tile, tiles;
    int64_t group, pieces, steps, first_step;  // steps of a piece; the first one's place in a row of x
    int64_t lines;                             // of a piece
    bool begins, ends, last;                   // its groups; all of K
    const uint32_t* weight;
    int64_t weight_step;
    const char* scale;  // of its first group and tile
    const uint32_t* zero;
    int64_t scale_step, zero_step;
    int64_t pass;  // of rows that it is for

    bool direct() const { return I::kDirect && lines == steps * kLines; }
  };

  /// A part of K in lines of weights: whole groups, or a part of the only one.
  struct Depth {
    int64_t begin, end;
  };

  /// The panels of some channels and a part of K, `width` channel tiles and `most_steps` each: all of K for a pass of
  /// rows, then for the next pass, whose weights are in the second-level cache; then the next channels.
  class Panels {
   public:
    Panels(const Gemm& a, const Range& tiles, int64_t width, int64_t most_steps, int64_t passes, const Depth& depth)
        : a_(a),
          depth_(depth),
          end_(tiles.end),
          width_(width),
          most_steps_(most_steps),
          passes_(passes),
          tile_(tiles.begin),
          line_(depth.begin) {}

    bool next(Panel& p) {
      if (tile_ >= end_) return false;
      const Layout& l = a_.layout;
      const int64_t lines = l.group_dwords(), steps = group_steps(l), group = line_ / lines, in_group = line_ % lines;
      const Stream s = stream(a_, tile_);
      p.tile = tile_;
      p.tiles = width_;
      p.pass = pass_;
      p.group = group;
      p.weight = s.weight + line_ * s.weight_step;
      p.weight_step = s.weight_step;
      p.scale = s.scale + group * s.scale_step;
      p.scale_step = s.scale_step;
      p.zero = s.zero ? s.zero + group * s.zero_step : nullptr;
      p.zero_step = s.zero_step;
      p.first_step = group * steps + in_group / kLines;
      p.begins = in_group == 0;
      if (steps <= most_steps_) {
        const int64_t left = (depth_.end - line_) / lines;
        p.pieces = most_steps_ / steps < left ? most_steps_ / steps : left;
        p.steps = steps;
        p.lines = lines;
        p.ends = true;
      } else {
        const int64_t group_end = line_ - in_group + lines, end = group_end < depth_.end ? group_end : depth_.end;
        p.pieces = 1;
        p.lines = end - line_ < most_steps_ * kLines ? end - line_ : most_steps_ * kLines;
        // A line is a row of B where it lies, but for those that fill no tile: they have a panel of their own.
        if (I::kDirect && p.lines > kLines) p.lines -= p.lines % kLines;
        p.steps = ceil_div(p.lines, kLines);
        p.ends = line_ + p.lines == group_end;
      }
      p.last = p.ends && group + p.pieces == l.groups;
      line_ += p.pieces * p.lines;
      if (line_ == depth_.end) {
        line_ = depth_.begin;
        if (++pass_ == passes_) {
          pass_ = 0;
          tile_ += p.tiles;
        }
      }
      return true;
    }

   private:
    const Gemm& a_;
    const Depth depth_;
    const int64_t end_, width_, most_steps_, passes_;
    int64_t tile_, line_, pass_ = 0;
  };

  /// Decodes a panel's lines, some at a time, and fetches what comes after them. Panel memory: [piece][step][tile].
  struct Decoder {
    const uint32_t* weight = nullptr;
    char* to = nullptr;
    int64_t step = 0, left = 0, lines = 0, line = 0, row = 0;
    bool direct = false;

    Decoder() = default;
    Decoder(const Panel& p, char* memory)
        : weight(p.weight),
          to(memory),
          step(p.weight_step),
          left(p.pieces * p.lines),
          lines(p.lines),
          direct(p.direct()) {}

    template <int T>
    [[gnu::always_inline]] inline void run(int64_t count) {
      if (count > left) count = left;
      left -= count;
      for (; count > 0; --count, weight += step) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) __builtin_prefetch(weight + kTilePrefetch + t * kTileN, 0, 2);
        if (I::kDirect && direct) continue;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) I::decode_line(weight + t * kTileN, to + t * kTileBytes);
        to += I::kLineRows * kTileRowBytes;
        row += I::kLineRows;
        if (++line == lines) {
          line = 0;
          if (row < kTileRows) {
            for (int t = 0; t < T; ++t) __builtin_memset(to + t * kTileBytes, 0, (kTileRows - row) * kTileRowBytes);
            to += (kTileRows - row) * kTileRowBytes;
            row = kTileRows;
          }
        }
        if (row == kTileRows) {
          row = 0;
          to += (T - 1) * kTileBytes;
        }
      }
    }
  };

  /// Where the B tiles of a panel are: bytes to the next step and row, and to the next tile.
  struct Weights {
    const char* at;
    int64_t step, row, tile;

    Weights(const Panel& p, const char* decoded)
        : at(p.direct() ? reinterpret_cast<const char*>(p.weight) : decoded),
          step(p.direct() ? kLines * p.weight_step * 4 : p.tiles * kTileBytes),
          row(p.direct() ? p.weight_step * 4 : kTileRowBytes),
          tile(p.direct() ? kTileRowBytes : kTileBytes) {}
  };
};

}  // namespace
}  // namespace turbo::cpu
