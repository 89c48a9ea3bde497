// SPDX-License-Identifier: Apache-2.0
// The kernel layout of 4-bit and 8-bit weights on a device: the order in which lanes consume them.
//
// 4 bits: W[n][k] = (u[n][k] - z[n][g]) * scale[n][g], g = k / group_size; u and z are unsigned codes 0 .. 15, z = 8
// where a checkpoint has none. 8 bits: W[n][k] = q[n][k] * scale[n], q a signed byte. Weights are the A operand of the tensor cores (device.h): 16 channels are its 16 rows, so that
// the same bytes serve mma.sync and, with four warps side by side, wgmma.
//
//   dword   the 8 weights of a lane (g, t) in one step of 16 k: the registers a0 .. a3 of its fragment, whose halves
//           are 16 bits apart, so that one lop3 makes a register of them. bits, as (register, half):
//             31..28 27..24 23..20 19..16 | 15..12 11..8 7..4 3..0
//             a3 hi   a2 hi  a1 hi  a0 hi |  a3 lo  a2 lo a1 lo a0 lo
//           a0: channel g,     k = 2t, 2t+1        a2: channel g,     k = 2t+8, 2t+9
//           a1: channel g + 8, k = 2t, 2t+1        a3: channel g + 8, k = 2t+8, 2t+9
//           The low nibbles of the four bytes are channel g, k = 2t, 2t+8, 2t+1, 2t+9, the high ones channel g + 8:
//           the steps 2p and 2p + 1 are a0, a1 and a2, a3 of an mma m16n8k32 for codes of x in that order.
//   slab    16 channels x 64 k: [lane 32][step 4] dwords, one 16-byte load of a lane; 512 bytes
//   block   64 channels x 64 k: 4 slabs side by side; 2 KiB that are read as one run
//
//   8 bits  a lane's dwords a0 .. a3 of an mma m16n8k32, their four bytes in the same order of k; a slab is
//           [32 k of it 2][lane 32][register 4] dwords, two 16-byte loads of a lane; 1 KiB
//
//   codes of x for both: the 16 codes of 16 neighbours in k at the places 4t + i for k = 2t + 8 * (i % 2) + i / 2
//
//   weight  [n / 64][k / 64][slab 4][a slab]             dwords
//   scale   [n / 64][row][g 8][slab 4][h 2]              channel 16 * slab + 8 * h + g, in the checkpoint's dtype
//   zero    [n / 64][row][g 8]                           dwords: z of (slab, h) at bits 4 * (2 * slab + h)
//   sum     [n / 64][g 8][slab 4][h 2]                   8 bits: each channel's sum of q, int32
//
// A row is a group; groups of 32 have two rows for each slab. N and K are padded to 64 with weights that no
// activation meets (8 bits: 0) and scales of 0.
#pragma once

#include <cstdint>
#include <string>

namespace turbo::cuda {

inline constexpr int kSlabK = 64;          // k of a slab
inline constexpr int kStepK = 16;          // k of one dword of 4-bit weights
inline constexpr int kSlabChannels = 16;   // channels of a slab
inline constexpr int kBlockChannels = 64;  // channels of a block
inline constexpr int kBlockSlabs = kBlockChannels / kSlabChannels;
inline constexpr int kSmallGroup = 32;     // the only group size below a slab's k
inline constexpr int kMostA8Group = 2048;  // of several groups that meet codes of x (a8.h)
inline constexpr uint32_t kNoZeroPoints = 0x88888888u;

/// Sizes of one packed matrix [n, k] of `bits`-bit weights whose rows are cut into `groups` groups along k.
struct Layout {
  int64_t n, k, groups;
  int64_t bits = 4;

  int64_t blocks() const { return (n + kBlockChannels - 1) / kBlockChannels; }
  int64_t padded_n() const { return blocks() * kBlockChannels; }
  int64_t slabs() const { return (k + kSlabK - 1) / kSlabK; }
  bool small_groups() const { return groups > 1 && k / groups == kSmallGroup; }
  /// Slabs of a group, where it has whole ones.
  int64_t group_slabs() const { return groups == 1 ? slabs() : k / groups / kSlabK; }
  /// Rows of scales and zero points.
  int64_t scale_rows() const { return small_groups() ? 2 * slabs() : groups; }

  int64_t weight_dwords() const { return padded_n() * slabs() * (kSlabK * bits / 32); }
  int64_t scales() const { return padded_n() * scale_rows(); }
  int64_t zero_dwords() const { return padded_n() * scale_rows() / 8; }

  /// Empty, or why there is no kernel for these sizes.
  std::string refusal() const {
    if (n <= 0 || k <= 0 || groups <= 0) return "n, k and groups must be positive";
    if (bits != 4 && bits != 8) return std::to_string(bits) + " bits: expected 4 or 8";
    if (groups == 1) return {};
    if (bits == 8) return std::to_string(groups) + " groups: weights of 8 bits have one";
    if (k % groups) return "k = " + std::to_string(k) + " is not cut evenly into " + std::to_string(groups) + " groups";
    const int64_t size = k / groups;
    if (size == kSmallGroup || size % kSlabK == 0) return {};
    return "group size " + std::to_string(size) + ": expected 32, a multiple of 64, or all of k";
  }
};

}  // namespace turbo::cuda
