// SPDX-License-Identifier: Apache-2.0
// The one packer of weights for devices.
#include "pack.h"

#include <cstring>

#include "../cpu/disk_codes.h"

namespace turbo::cuda {
namespace {

using cpu::Pack;
using cpu::Range;

static_assert(kSlabChannels == cpu::kTileN, "disk_rows cuts rows into tiles of a slab's channels");

constexpr uint32_t kUnsignedNibbles = 0x88888888u;

/// The codes of 16 channels and 64 k, ascending k in a dword: of 4 bits unsigned, of 8 bits signed. Where the checkpoint
/// ends they are the middle code.
template <int Bits>
using SlabCodes = uint32_t[kSlabChannels][kSlabK * Bits / 32];

/// The rows on disk of a slab's channels; none where only padding is left of a block.
Range slab_rows(const Pack& a, int64_t tile) {
  return tile < a.layout.tiles() ? cpu::disk_rows(a, tile) : Range{0, 0};
}

template <int Bits>
void read_slab(const Pack& a, const Range& rows, int64_t slab, SlabCodes<Bits>& codes) {
  constexpr int64_t kRowDwords = kSlabK * Bits / 32;
  const int64_t dwords = a.layout.dwords();
  for (int64_t r = 0; r < kSlabChannels; ++r)
    for (int64_t i = 0; i < kRowDwords; ++i) {
      const int64_t dword = slab * kRowDwords + i;
      const bool inside = rows.begin + r < rows.end && dword < dwords;
      codes[r][i] = (inside ? cpu::read_dword<Bits>(a, rows.begin + r, dword) : 0) ^ (Bits == 4 ? kUnsignedNibbles : 0);
    }
}

/// Dword `part` of lane (g, t), see layout.h: of 4 bits a step's, of 8 bits register part % 4 of half a slab's.
uint32_t lane_dword(const SlabCodes<4>& codes, int g, int t, int step) {
  uint32_t out = 0;
  for (int reg = 0; reg < 4; ++reg)
    for (int half = 0; half < 2; ++half) {
      const int channel = g + 8 * (reg & 1), k = kStepK * step + 2 * t + 8 * (reg >> 1) + half;
      out |= (codes[channel][k / 8] >> (4 * (k % 8)) & 15u) << (4 * reg + 16 * half);
    }
  return out;
}

uint32_t lane_dword(const SlabCodes<8>& codes, int g, int t, int part) {
  const int reg = part % 4, channel = g + 8 * (reg & 1), first = 32 * (part / 4) + 16 * (reg >> 1) + 2 * t;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const int k = first + 8 * (i % 2) + i / 2;
    out |= (codes[channel][k / 4] >> (8 * (k % 4)) & 255u) << (8 * i);
  }
  return out;
}

template <int Bits>
void pack_weights(const Pack& a, const Layout& l, int64_t tile) {
  constexpr int kLoads = Bits / 4;  // of 16 bytes, of a lane
  const Range rows = slab_rows(a, tile);
  SlabCodes<Bits> codes;
  for (int64_t slab = 0; slab < l.slabs(); ++slab) {
    read_slab<Bits>(a, rows, slab, codes);
    const int64_t at = (tile / kBlockSlabs * l.slabs() + slab) * kBlockSlabs + tile % kBlockSlabs;
    uint32_t* out = a.weight_out + at * kLoads * 128;
    for (int load = 0; load < kLoads; ++load)
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) *out++ = lane_dword(codes, lane / 4, lane % 4, 4 * load + i);
  }
}

int32_t sum_of_row(const Pack& a, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = 0; k < a.layout.k; ++k) sum += a.bytes[n * a.codes_stride + k];
  return sum;
}

void pack_scales(const Pack& a, const Layout& l, int64_t tile) {
  const Range rows = slab_rows(a, tile);
  const int64_t slab = tile % kBlockSlabs;
  for (int64_t row = 0; row < l.scale_rows(); ++row) {
    const int64_t first = tile / kBlockSlabs * l.scale_rows() + row;
    const int64_t block = first * kBlockChannels;
    for (int64_t r = 0; r < kSlabChannels; ++r) {
      const int64_t g = r % 8, h = r / 8, n = rows.begin + r;
      const bool inside = n < rows.end && row < l.groups;
      const int64_t at = block + g * 8 + slab * 2 + h;
      char* to = static_cast<char*>(a.scale_out) + at * a.scale_size;
      if (inside)
        std::memcpy(to, static_cast<const char*>(a.scale) + (n * a.scale_stride + row) * a.scale_size, a.scale_size);
      else
        std::memset(to, 0, a.scale_size);
      if (a.sums_out) a.sums_out[at] = inside ? sum_of_row(a, n) : 0;
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
      if (l.bits == 4)
        pack_weights<4>(args, l, tile);
      else
        pack_weights<8>(args, l, tile);
      pack_scales(args, l, tile);
    }
  });
}

}  // namespace turbo::cuda
