// SPDX-License-Identifier: Apache-2.0
// The one packer of quantized weights.
#include "pack.h"

#include <cstring>

#include "disk_codes.h"
#include "pages.h"

namespace turbo::cpu {
namespace {

constexpr int64_t kStrip = 16;  // dwords of a row handled together: 64 bytes, one cache line

/// Gathers the even nibbles of d into 16 bits (nibbles 0,2,4,6 -> 0,1,2,3).
inline uint32_t even_nibbles(uint32_t d) {
  d &= 0x0F0F0F0Fu;
  d = (d | d >> 4) & 0x00FF00FFu;
  return (d | d >> 8) & 0x0000FFFFu;
}

/// Eight nibbles of ascending k in the order of a dword.
inline uint32_t kernel_order(uint32_t d) { return even_nibbles(d) | even_nibbles(d >> 4) << 16; }

inline int32_t sum_bytes(uint32_t dword) {
  int32_t sum = 0;
  for (int j = 0; j < 4; ++j) sum += static_cast<int8_t>(dword >> (8 * j));
  return sum;
}

/// Dwords [i0, i0 + count) of row n in the order of the kernels. Codes of just `Bits` bits need no bit by bit reading,
/// which is all of them that are large: a loop without branches, for the compiler to make vectors of.
template <int Bits>
inline void read_strip(const Pack& a, int64_t n, int64_t i0, int64_t count, uint32_t* strip) {
  constexpr int64_t kWeights = 32 / Bits;
  const bool whole = (i0 + count) * kWeights <= a.layout.k;
  if (a.packed && a.code_bits == Bits && whole && count == kStrip) {
    const uint32_t* in = a.packed + n * a.codes_stride + i0;
    for (int64_t i = 0; i < kStrip; ++i)
      strip[i] = Bits == 4 ? kernel_order(in[i] ^ kSignedNibbles) : in[i] ^ kSignedBytes;
  } else if (a.bytes && Bits == 8 && whole) {
    std::memcpy(strip, a.bytes + n * a.codes_stride + i0 * kWeights, count * sizeof(uint32_t));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t dword = read_dword<Bits>(a, n, i0 + i);
      strip[i] = Bits == 4 ? kernel_order(dword) : dword;
    }
  }
}

template <int Bits>
void pack_weights(const Pack& a, int64_t tile) {
  const Layout& l = a.layout;
  const int64_t step = l.block_tiles(tile) * kTileN;
  uint32_t* out = a.weight_out + l.lane_offset(tile, 0, l.dwords());
  const Range disk = disk_rows(a, tile);
  const int64_t rows = disk.end - disk.begin;
  uint32_t strip[kTileN][kStrip];
  int32_t sums[kTileN] = {};
  for (int64_t i0 = 0; i0 < l.dwords(); i0 += kStrip) {
    const int64_t count = l.dwords() - i0 < kStrip ? l.dwords() - i0 : kStrip;
    std::memset(strip, 0, sizeof strip);
    for (int64_t r = 0; r < rows; ++r) {
      read_strip<Bits>(a, disk.begin + r, i0, count, strip[r]);
      if (Bits == 8 && a.sums_out)
        for (int64_t i = 0; i < count; ++i) sums[r] += sum_bytes(strip[r][i]);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < kTileN; ++r) out[(i0 + i) * step + r] = strip[r][i];
  }
  if (a.sums_out) std::memcpy(a.sums_out + tile * kTileN, sums, sizeof sums);
}

void pack_scales(const Pack& a, int64_t tile) {
  const Layout& l = a.layout;
  const int64_t step = l.block_tiles(tile) * kTileN;
  char* out = static_cast<char*>(a.scale_out) + l.lane_offset(tile, 0, l.groups) * a.scale_size;
  const char* in = static_cast<const char*>(a.scale);
  const Range disk = disk_rows(a, tile);
  for (int64_t r = 0; r < kTileN; ++r) {
    const int64_t n = disk.begin + r;
    for (int64_t g = 0; g < l.groups; ++g) {
      char* to = out + (g * step + r) * a.scale_size;
      if (n < disk.end)
        std::memcpy(to, in + (n * a.scale_stride + g) * a.scale_size, a.scale_size);
      else
        std::memset(to, 0, a.scale_size);
    }
  }
}

/// Zero points less the offset of their code, in the order that layout.h names.
void pack_zeros(const Pack& a, int64_t tile) {
  const Layout& l = a.layout;
  const int64_t dwords = l.zero_dwords(), step = l.block_tiles(tile) * dwords;
  uint32_t* out = a.zero_out + l.lane_offset(tile, 0, l.groups) / kTileN * dwords;
  const Range disk = disk_rows(a, tile);
  for (int64_t g = 0; g < l.groups; ++g) {
    uint32_t zeros[4] = {};
    for (int64_t r = 0; r < disk.end - disk.begin; ++r) {
      const int z = read_zero(a, disk.begin + r, g);
      if (l.bits == 4)
        zeros[r % 2] |= (static_cast<uint32_t>(z) & 15u) << (4 * (r / 2));
      else
        zeros[r / 4] |= (static_cast<uint32_t>(z) & 255u) << (8 * (r % 4));
    }
    std::memcpy(out + g * step, zeros, dwords * sizeof(uint32_t));
  }
}

}  // namespace

void pack(const Pack& args, const Parallel& parallel) {
  const Layout& l = args.layout;
  const int64_t tiles = l.tiles();
  advise_huge_pages(args.weight_out, l.padded_n() * l.dwords() * 4);
  // The same cut as the kernel's, so that on several NUMA nodes a thread first touches what it reads.
  const int64_t tasks = tiles < parallel.threads ? tiles : parallel.threads;
  parallel(tasks, [&](int64_t task) {
    const Range range = part(tiles, tasks, task);
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      if (l.bits == 4)
        pack_weights<4>(args, tile);
      else
        pack_weights<8>(args, tile);
      pack_scales(args, tile);
      if (args.zero_point) pack_zeros(args, tile);
    }
  });
}

}  // namespace turbo::cpu
