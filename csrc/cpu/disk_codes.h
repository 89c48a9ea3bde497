// SPDX-License-Identifier: Apache-2.0
// Reading the codes of a checkpoint's row-major tensors, as pack.h describes them: for every packer, whatever its
// kernel layout.
#pragma once

#include <cstring>

#include "pack.h"

namespace turbo::cpu {
namespace {

constexpr uint32_t kSignedNibbles = 0x88888888u;  // code ^ 8 is code - 8 in two's complement
constexpr uint32_t kSignedBytes = 0x80808080u;

/// `bits` bits from bit `bit` on of a stream of dwords `stride` apart.
inline uint32_t bits_at(const uint32_t* stream, int64_t stride, int64_t bit, int64_t bits) {
  const uint32_t* at = stream + bit / 32 * stride;
  const int64_t shift = bit % 32;
  uint64_t two = *at;
  if (shift + bits > 32) two |= static_cast<uint64_t>(at[stride]) << 32;
  return static_cast<uint32_t>(two >> shift) & ((1u << bits) - 1);
}

/// The rows on disk of a tile's channels; fewer than 16 at the end.
inline Range disk_rows(const Pack& a, int64_t tile) {
  const int64_t all = a.gate_up ? a.gate_up : a.layout.n, before = a.gate_up ? tile % 2 * a.gate_up : 0;
  const int64_t first = (a.gate_up ? tile / 2 : tile) * kTileN;
  return {before + first, before + (all - first < kTileN ? all : first + kTileN)};
}

/// Dword i of row n: its weights q in two's complement, ascending k from the lowest bits; those beyond k 0.
template <int Bits>
uint32_t read_dword(const Pack& a, int64_t n, int64_t i) {
  constexpr int64_t kWeights = 32 / Bits;
  const int64_t left = a.layout.k - i * kWeights;
  const uint32_t mask = left >= kWeights ? ~0u : (1u << (Bits * left)) - 1;
  if (a.packed && a.code_bits == Bits)
    return (a.packed[n * a.codes_stride + i] ^ (Bits == 4 ? kSignedNibbles : kSignedBytes)) & mask;
  const int64_t count = left < kWeights ? left : kWeights;
  if (a.bytes && Bits == 8) {
    uint32_t dword = 0;
    std::memcpy(&dword, a.bytes + n * a.codes_stride + i * kWeights, count);
    return dword;
  }
  uint32_t dword = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t k = i * kWeights + j;
    const int q = a.bytes ? a.bytes[n * a.codes_stride + k]
                          : static_cast<int>(bits_at(a.packed + n * a.codes_stride, 1, k * a.code_bits, a.code_bits)) -
                                (1 << (a.code_bits - 1));
    dword |= (static_cast<uint32_t>(q) & ((1u << (Bits - 1)) * 2 - 1)) << (Bits * j);
  }
  return dword;
}

/// The zero point of row n and group g less the offset of its code.
inline int read_zero(const Pack& a, int64_t n, int64_t g) {
  return static_cast<int>(bits_at(a.zero_point + g, a.zero_point_stride, n * a.code_bits, a.code_bits)) -
         (1 << (a.code_bits - 1));
}

}  // namespace
}  // namespace turbo::cpu
