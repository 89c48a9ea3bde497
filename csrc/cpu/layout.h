// SPDX-License-Identifier: Apache-2.0
// The kernel layout of quantized weights: the one that the packer writes and all kernels read.
//
// A weight q is a signed integer of 4 or 8 bits in two's complement, or a small float: e2m1 of 4 bits, e4m3 of 8.
// In all of them zero bits are the weight 0, so that padding is free.
// W[n][k] = (q[n][k] - z[n][g]) * scale[n][g], g = k / group_size; floats have no z.
//
//   dword   the weights of one channel n that a dword holds.
//           4 bits: 8 weights, k = 8*i .. 8*i+7. Even k in the low half, odd k in the high half, so that one
//           16-bit shift by 4*j brings the pair (k=2j, k=2j+1) to the bottom of both halves: the operand
//           order of the bf16 pair dot. bits:
//             31..28 27..24 23..20 19..16 | 15..12 11..8 7..4 3..0
//              k7     k5     k3     k1    |  k6     k4   k2   k0
//           Its low nibbles, as the four bytes of an int8 dot, are k0 k4 k1 k5, the high ones k2 k6 k3 k7:
//           8-bit activations are stored in that order.
//           8 bits: 4 weights, k = 4*i .. 4*i+3, lowest byte first.
//   tile    16 channels: 16 dwords = 64 bytes = one cache line, lane = channel
//   block   up to 4 tiles (64 channels) side by side; per i one run of tiles*64 bytes, so a thread
//           streams memory in one direction whatever the number of channels it works on
//
//   weight  [block][i = 0 .. ceil(K/weights of a dword)-1][tile][16 lanes]  dwords
//   scale   [block][group][tile][16 lanes]
//   zero    [block][group][tile][dwords]  z of the 16 channels, two's complement, as many bits as a weight.
//           4 bits: dword 0 holds the even lanes, dword 1 the odd ones, lane l at bits 4*(l/2).
//           8 bits: 4 dwords, one byte per lane in order.
//
// All blocks have 4 tiles but the last, which has what is left; N is padded to whole tiles with weight
// 0, scale 0, zero 0. Block b therefore starts at b * 64 channels' worth of elements in each array.
#pragma once

#include <cstdint>

// always_inline: these are called from translation units of every instruction set, and no copy made with
// AVX-512 may become the one that the linker keeps for all.

namespace turbo::cpu {

inline constexpr int64_t kTileN = 16;      // channels of a tile: lanes of a 512-bit register
inline constexpr int64_t kBlockTiles = 4;  // tiles of a block

/// Activations and scales; the last two, of one byte, are scales of 4-bit floats only: powers of two 2^(b - 127),
/// and OCP's e4m3.
enum class DType : int { bf16, f16, f32, e8m0, e4m3 };

[[gnu::always_inline]] inline constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype < DType::f32 ? 2 : 1;
}

/// What the bits of a weight mean. e4m3: OCP's float of 8 bits without infinities, its two NaN codes left out; e2m1:
/// OCP's float of 4 bits.
enum class Code : int { integer, e4m3, e2m1 };

[[gnu::always_inline]] inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Sizes of one packed matrix [n, k] of `bits`-bit weights (4 or 8) whose rows are cut into `groups` groups
/// along k.
struct Layout {
  int64_t n, k, groups, bits;
  Code code = Code::integer;

  [[gnu::always_inline]] int64_t dword_k() const { return 32 / bits; }
  [[gnu::always_inline]] int64_t zero_dwords() const { return kTileN * bits / 32; }
  [[gnu::always_inline]] int64_t tiles() const { return ceil_div(n, kTileN); }
  [[gnu::always_inline]] int64_t padded_n() const { return tiles() * kTileN; }
  /// Dwords of a channel.
  [[gnu::always_inline]] int64_t dwords() const { return ceil_div(k, dword_k()); }
  [[gnu::always_inline]] int64_t group_dwords() const { return dwords() / groups; }
  /// Tiles of the block that `tile` lies in.
  [[gnu::always_inline]] int64_t block_tiles(int64_t tile) const {
    const int64_t first = tile / kBlockTiles * kBlockTiles;
    return tiles() - first < kBlockTiles ? tiles() - first : kBlockTiles;
  }
  /// Offset, in lanes, of (tile, step) in an array of `steps` steps: dwords() for weights, groups for scales.
  [[gnu::always_inline]] int64_t lane_offset(int64_t tile, int64_t step, int64_t steps) const {
    const int64_t first = tile / kBlockTiles * kBlockTiles;
    return (first * steps + step * block_tiles(tile) + (tile - first)) * kTileN;
  }
};

}  // namespace turbo::cpu
