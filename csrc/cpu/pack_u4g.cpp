// SPDX-License-Identifier: Apache-2.0
// The one packer of grouped 4-bit weights.
#include "pack_u4g.h"

#include <sys/mman.h>

#include <cstring>

namespace turbo::cpu {
namespace {

constexpr uint32_t kSignedNibbles = 0x88888888u;  // code ^ 8 is code - 8 in two's complement
constexpr int64_t kStripK8 = 16;  // dwords of a row handled together: 64 bytes, one cache line

/// Gathers the even nibbles of d into 16 bits (nibbles 0,2,4,6 -> 0,1,2,3).
inline uint32_t even_nibbles(uint32_t d) {
  d &= 0x0F0F0F0Fu;
  d = (d | d >> 4) & 0x00FF00FFu;
  return (d | d >> 8) & 0x0000FFFFu;
}

inline uint32_t kernel_order(uint32_t d) {
  d ^= kSignedNibbles;
  return even_nibbles(d) | even_nibbles(d >> 4) << 16;
}

void pack_weights(const PackU4g& a, int64_t tile) {
  const LayoutU4g& l = a.layout;
  const int64_t step = l.block_tiles(tile) * kTileN;
  uint32_t* out = a.weight_out + l.lane_offset(tile, 0, l.k8());
  const int64_t n0 = tile * kTileN;
  const int64_t rows = l.n - n0 < kTileN ? l.n - n0 : kTileN;
  // Weights beyond k in the last dword of a row are whatever the disk holds; they must be 0 here.
  const int64_t tail = l.k % kDwordK;
  const uint32_t tail_mask = tail ? (1u << (4 * tail)) - 1 : ~0u;
  uint32_t strip[kTileN][kStripK8];
  for (int64_t i0 = 0; i0 < l.k8(); i0 += kStripK8) {
    const int64_t count = l.k8() - i0 < kStripK8 ? l.k8() - i0 : kStripK8;
    std::memset(strip, 0, sizeof strip);
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t* in = a.codes + (n0 + r) * a.codes_stride + i0;
      for (int64_t i = 0; i < count; ++i) strip[r][i] = kernel_order(in[i]);
      if (i0 + count == l.k8() && tail) {
        const uint32_t code8 = kSignedNibbles & ~tail_mask;
        strip[r][count - 1] = kernel_order((in[count - 1] & tail_mask) | code8);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < kTileN; ++r) out[(i0 + i) * step + r] = strip[r][i];
  }
}

void pack_scales(const PackU4g& a, int64_t tile) {
  const LayoutU4g& l = a.layout;
  const int64_t step = l.block_tiles(tile) * kTileN;
  char* out = static_cast<char*>(a.scale_out) + l.lane_offset(tile, 0, l.groups) * a.scale_size;
  const char* in = static_cast<const char*>(a.scale);
  for (int64_t r = 0; r < kTileN; ++r) {
    const int64_t n = tile * kTileN + r;
    for (int64_t g = 0; g < l.groups; ++g) {
      char* to = out + (g * step + r) * a.scale_size;
      if (n < l.n)
        std::memcpy(to, in + (n * a.scale_stride + g) * a.scale_size, a.scale_size);
      else
        std::memset(to, 0, a.scale_size);
    }
  }
}

void pack_zeros(const PackU4g& a, int64_t tile) {
  const LayoutU4g& l = a.layout;
  const int64_t step = l.block_tiles(tile) * kZeroDwords;
  uint32_t* out = a.zero_out + l.lane_offset(tile, 0, l.groups) / (kTileN / kZeroDwords);
  for (int64_t g = 0; g < l.groups; ++g) {
    uint32_t dwords[kZeroDwords] = {0, 0};
    for (int64_t r = 0; r < kTileN; ++r) {
      const int64_t n = tile * kTileN + r;
      if (n >= l.n) break;
      const uint32_t word = a.zero_point[n / 8 * a.zero_point_stride + g];
      const uint32_t nibble = (word >> (4 * (n % 8)) & 15u) ^ 8u;
      dwords[r % 2] |= nibble << (4 * (r / 2));
    }
    out[g * step] = dwords[0];
    out[g * step + 1] = dwords[1];
  }
}

/// Asks for huge pages before the first write: a weight stream then misses the TLB once per 2 MiB. Only
/// a hint: where the system refuses, nothing changes.
void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace

void pack_u4g(const PackU4g& args, const Parallel& parallel) {
  const int64_t tiles = args.layout.tiles();
  advise_huge_pages(args.weight_out, args.layout.padded_n() * args.layout.k8() * 4);
  // The same cut as the kernel's, so that on several NUMA nodes a thread first touches what it reads.
  const int64_t tasks = tiles < parallel.threads ? tiles : parallel.threads;
  parallel(tasks, [&](int64_t task) {
    const Range range = part(tiles, tasks, task);
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      pack_weights(args, tile);
      pack_scales(args, tile);
      if (args.zero_point) pack_zeros(args, tile);
    }
  });
}

}  // namespace turbo::cpu
