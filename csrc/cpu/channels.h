// SPDX-License-Identifier: Apache-2.0
// Where a channel tile's weights, scales and zero points lie, and what turns its totals into y: the same for every
// kernel. Internal linkage, see gemm_kernel.h.
#pragma once

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

/// For `I` of gemm_kernel.h.
template <class I>
struct Channels {
  using Vec = typename I::Vec;

  /// One run of weights: where a group of tiles starts in each array, and the way to the next step.
  struct Stream {
    const uint32_t* weight;
    const char* scale;
    const uint32_t* zero;
    int64_t weight_step, scale_step, zero_step;  // elements (scale: bytes) per dword, per group
  };

  static Stream stream(const Gemm& a, int64_t tile) {
    const Layout& l = a.layout;
    const int64_t tiles = l.block_tiles(tile), size = dtype_size(a.scale_dtype);
    const int64_t group_lanes = l.lane_offset(tile, 0, l.groups);
    const int64_t zero_dwords = I::zero_dwords(l);
    return {a.weight + l.lane_offset(tile, 0, l.dwords()),
            static_cast<const char*>(a.scale) + group_lanes * size,
            a.zero ? a.zero + group_lanes / kTileN * zero_dwords : nullptr,
            tiles * kTileN,
            tiles * kTileN * size,
            tiles * zero_dwords};
  }

  /// A vector of channels of y: what its rows share.
  struct Output {
    const Gemm& a;
    const PreparedX& x;
    const int64_t channel;
    int count;  // channels that there are
    Vec scale = I::zero(), bias = I::zero();

    Output(const Gemm& gemm, const PreparedX& prepared, int64_t first) : a(gemm), x(prepared), channel(first) {
      const int64_t left = a.layout.n - channel;
      count = static_cast<int>(left < 0 ? 0 : left < I::kLanes ? left : I::kLanes);
      if (!count) return;
      if (a.channel_scale) scale = I::load_floats(a.channel_scale + channel);
      if (a.bias)
        bias = I::bias_vec(a.y_dtype, static_cast<const char*>(a.bias) + channel * dtype_size(a.y_dtype), count);
    }

    void store(int64_t row, Vec total) const {
      if (!count) return;
      if (x.scales) total = I::mul(total, I::set1(x.scales[row]));
      if (a.channel_scale) total = I::mul(total, scale);
      if (a.bias) total = I::add(total, bias);
      const int64_t at = (row - a.y_row) * a.y_stride + (channel - a.y_channel);
      I::store_y(a.y_dtype, static_cast<char*>(a.y) + at * dtype_size(a.y_dtype), total, count);
    }
  };
};

}  // namespace
}  // namespace turbo::cpu
