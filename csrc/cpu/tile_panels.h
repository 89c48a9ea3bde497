// SPDX-License-Identifier: Apache-2.0
// How K, channels and rows are cut for AMX tiles, where the activations of a row tile lie, and how weights become B
// tiles: tile_kernel.h says what for, and names what `I` provides.
#pragma once

#include "amx.h"
#include "channels.h"

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
  static constexpr int64_t kPanelBytes = 2 * kSteps * kTileBytes;
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

  /// Some steps of some channel tiles: `pieces` whole groups from `group` on, or a part of one.
  struct alignas(64) Panel {
    int64_t line, lines;                       // its first line; lines of a piece
    int64_t group, pieces, steps, first_step;  // steps of a piece; the first one's place in a row of x
    bool begins, ends, last;                   // its groups; all of K

    bool direct() const { return I::kDirect && lines == steps * kLines; }
    /// Nothing but whole groups or, of the only group, steps, and all steps that fit.
    bool full() const { return pieces * steps == kSteps && lines == steps * kLines; }
  };

  static int64_t most_panels(const Layout& l) { return l.groups + ceil_div(l.dwords(), kSteps * kLines) + l.groups; }

  /// Cuts a part of K, in lines of weights, into panels: returns their number. `depth` is whole groups, or a part of
  /// the only one.
  static int64_t cut(const Layout& l, const Range& depth, Panel* out) {
    const int64_t lines = l.group_dwords(), steps = group_steps(l), most = kSteps / steps;
    int64_t count = 0;
    for (int64_t line = depth.begin; line < depth.end; ++count) {
      const int64_t group = line / lines, in_group = line % lines, left = (depth.end - line) / lines;
      Panel& p = out[count];
      p.line = line;
      p.group = group;
      p.first_step = group * steps + in_group / kLines;
      p.begins = in_group == 0;
      if (most) {
        p.pieces = most < left ? most : left;
        p.steps = steps;
        p.lines = lines;
        p.ends = true;
      } else {
        const int64_t group_end = line - in_group + lines, end = group_end < depth.end ? group_end : depth.end;
        p.pieces = 1;
        p.lines = end - line < kSteps * kLines ? end - line : kSteps * kLines;
        // A line is a row of B where it lies, but for those that fill no tile: they have a panel of their own.
        if (I::kDirect && p.lines > kLines) p.lines -= p.lines % kLines;
        p.steps = ceil_div(p.lines, kLines);
        p.ends = line + p.lines == group_end;
      }
      p.last = p.ends && group + p.pieces == l.groups;
      line += p.pieces * p.lines;
    }
    return count;
  }

  /// Decodes a panel's lines, some at a time, and fetches what comes after them. Panel memory: [tile][piece][step].
  struct Decoder {
    const uint32_t* weight = nullptr;
    char* to = nullptr;
    int64_t step = 0, left = 0;
    int64_t lines = 0, line = 0;  // of a piece: all, and those that are done
    int64_t pad = 0;              // bytes of B tiles that a piece leaves empty
    bool direct = false;

    Decoder() = default;
    Decoder(const Stream& s, const Panel& p, int64_t tiles, char* memory)
        : weight(s.weight + p.line * s.weight_step),
          to(memory),
          step(s.weight_step),
          left(p.pieces * p.lines),
          lines(p.lines),
          pad(p.steps * kTileBytes - p.lines * I::kLineRows * kTileRowBytes),
          direct(p.direct()) {
      if (pad) clear(p, tiles);
    }

    /// `count` lines of T channel tiles. With `Whole` lines fill tiles.
    template <int T, bool Whole>
    [[gnu::always_inline]] inline void run(int64_t count) {
      if (count > left) count = left;
      left -= count;
      for (; count > 0; --count, weight += step) {
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) __builtin_prefetch(weight + kTilePrefetch + t * kTileN, 0, 2);
        if (I::kDirect && direct) continue;
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) I::decode_line(weight + t * kTileN, to + t * kSteps * kTileBytes);
        to += I::kLineRows * kTileRowBytes;
        if (!Whole && pad && ++line == lines) {
          line = 0;
          to += pad;
        }
      }
    }

   private:
    [[gnu::noinline]] void clear(const Panel& p, int64_t tiles) const {
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t piece = 1; piece <= p.pieces; ++piece)
          __builtin_memset(to + (t * kSteps + piece * p.steps) * kTileBytes - pad, 0, pad);
    }
  };

  /// Where the B tiles of a panel are: bytes to the next step and row, and to the next tile.
  struct Weights {
    const char* at;
    int64_t step, row, tile;

    Weights(const Stream& s, const Panel& p, const char* decoded)
        : at(p.direct() ? reinterpret_cast<const char*>(s.weight + p.line * s.weight_step) : decoded),
          step(p.direct() ? kLines * s.weight_step * 4 : kTileBytes),
          row(p.direct() ? s.weight_step * 4 : kTileRowBytes),
          tile(p.direct() ? kTileRowBytes : kSteps * kTileBytes) {}
  };
};

}  // namespace
}  // namespace turbo::cpu
