// SPDX-License-Identifier: Apache-2.0
// The one packer of 4-bit weights for devices.
#include "pack.h"

#include <cstring>

#include "../cpu/disk_codes.h"

namespace turbo::cuda {
namespace {

using cpu::Pack;
using cpu::Range;

static_assert(kSlabChannels == cpu::kTileN, "disk_rows cuts rows into tiles of a slab's channels");

constexpr int kRowDwords = kSlabK / 8;  // dwords of a channel in a slab
constexpr uint32_t kUnsignedNibbles = 0x88888888u;

/// The codes of 16 channels and 64 k, eight ascending k in a dword; where the checkpoint ends, the middle code.
using SlabCodes = uint32_t[kSlabChannels][kRowDwords];

/// The rows on disk of a slab's channels; none where only padding is left of a block.
Range slab_rows(const Pack& a, int64_t tile) {
  return tile < a.layout.tiles() ? cpu::disk_rows(a, tile) : Range{0, 0};
}

void read_slab(const Pack& a, const Range& rows, int64_t slab, SlabCodes& codes) {
  const int64_t dwords = a.layout.dwords();
  for (int64_t r = 0; r < kSlabChannels; ++r)
    for (int64_t i = 0; i < kRowDwords; ++i) {
      const int64_t dword = slab * kRowDwords + i;
      const bool inside = rows.begin + r < rows.end && dword < dwords;
      codes[r][i] = (inside ? cpu::read_dword<4>(a, rows.begin + r, dword) : 0) ^ kUnsignedNibbles;
    }
}

/// The dword of lane (g, t) in one step, see layout.h.
uint32_t lane_dword(const SlabCodes& codes, int g, int t, int step) {
  uint32_t out = 0;
  for (int reg = 0; reg < 4; ++reg)
    for (int half = 0; half < 2; ++half) {
      const int channel = g + 8 * (reg & 1), k = kStepK * step + 2 * t + 8 * (reg >> 1) + half;
      out |= (codes[channel][k / 8] >> (4 * (k % 8)) & 15u) << (4 * reg + 16 * half);
    }
  return out;
}

void pack_weights(const Pack& a, const Layout& l, int64_t tile) {
  const Range rows = slab_rows(a, tile);
  SlabCodes codes;
  for (int64_t slab = 0; slab < l.slabs(); ++slab) {
    read_slab(a, rows, slab, codes);
    uint32_t* out = a.weight_out + ((tile / kBlockSlabs * l.slabs() + slab) * kBlockSlabs + tile % kBlockSlabs) * 128;
    for (int lane = 0; lane < 32; ++lane)
      for (int step = 0; step < 4; ++step) *out++ = lane_dword(codes, lane / 4, lane % 4, step);
  }
}

void pack_scales(const Pack& a, const Layout& l, int64_t tile) {
  const Range rows = slab_rows(a, tile);
  const int64_t slab = tile % kBlockSlabs;
  for (int64_t row = 0; row < l.scale_rows(); ++row) {
    const int64_t first = tile / kBlockSlabs * l.scale_rows() + row;
    auto* scales = static_cast<uint16_t*>(a.scale_out) + first * kBlockChannels;
    for (int64_t r = 0; r < kSlabChannels; ++r) {
      const int64_t g = r % 8, h = r / 8, n = rows.begin + r;
      const bool inside = n < rows.end && row < l.groups;
      uint16_t* to = scales + g * 8 + slab * 2 + h;
      if (inside)
        std::memcpy(to, static_cast<const uint16_t*>(a.scale) + n * a.scale_stride + row, sizeof *to);
      else
        *to = 0;
      if (!a.zero_point) continue;
      const uint32_t z = inside ? static_cast<uint32_t>(cpu::read_zero(a, n, row)) + 8u : 0;
      const int64_t shift = 4 * (2 * slab + h);
      uint32_t& dword = a.zero_out[first * 8 + g];
      dword = (dword & ~(15u << shift)) | z << shift;
    }
  }
}

}  // namespace

void pack(const Pack& args, const cpu::Parallel& parallel) {
  const Layout l = device_layout(args.layout);
  // A task has whole blocks: the four slabs of a block share dwords of zero points.
  parallel(l.blocks(), [&](int64_t block) {
    for (int64_t tile = block * kBlockSlabs; tile < (block + 1) * kBlockSlabs; ++tile) {
      pack_weights(args, l, tile);
      pack_scales(args, l, tile);
    }
  });
}

}  // namespace turbo::cuda
