// SPDX-License-Identifier: Apache-2.0
// Rows of activations to int8 codes in layout.h's order, a block for each row.
//
// In fp32, as compressed-tensors defines it; csrc/cpu/quantize.h has the formulas, and what becomes of a row with a value
// that is not finite. The largest and the smallest of a row do not depend on the order in which they are found.
#pragma once

#include <string>

#include "activations.h"
#include "device.h"

namespace turbo::cuda {

/// Neighbours in k that are rounded together.
inline constexpr int kQuantizeRun = 16;

/// x of 16-bit elements, as a caller has it.
struct Values16 {
  Rows16 x;
  Half16 type;

  TM_DEVICE int k() const { return x.k; }

  /// v = the values from `first` on, 0 where the row ends.
  TM_DEVICE void load(int64_t row, int first, float (&v)[kQuantizeRun]) const {
    const uint16_t* from = x.x + row * x.stride + first;
    if (x.vectors && first + kQuantizeRun <= x.k) {
      TM_UNROLL
      for (int i = 0; i < kQuantizeRun / 8; ++i) {
        const Vec4 chunk = load_global(reinterpret_cast<const Vec4*>(from) + i);
        TM_UNROLL
        for (int e = 0; e < 8; ++e)
          v[8 * i + e] = to_float(type, static_cast<uint16_t>(chunk.v[e / 2] >> (16 * (e % 2))));
      }
      return;
    }
    TM_UNROLL
    for (int e = 0; e < kQuantizeRun; ++e) v[e] = first + e < x.k ? to_float(type, load_global(from + e)) : 0.0f;
  }
};

/// fp32 rows of whole slabs: what is between two products.
struct Values32 {
  const float* x;
  int slabs, columns;

  TM_DEVICE int k() const { return columns; }

  TM_DEVICE void load(int64_t row, int first, float (&v)[kQuantizeRun]) const {
    const float* from = x + row * slabs * kSlabK + first;
    if (first + kQuantizeRun <= columns) {
      TM_UNROLL
      for (int i = 0; i < kQuantizeRun / 4; ++i) {
        const Vec4 chunk = load_global(reinterpret_cast<const Vec4*>(from) + i);
        TM_UNROLL
        for (int e = 0; e < 4; ++e) v[4 * i + e] = as_float(chunk.v[e]);
      }
      return;
    }
    TM_UNROLL
    for (int e = 0; e < kQuantizeRun; ++e) v[e] = first + e < columns ? load_global(from + e) : 0.0f;
  }
};

template <class Values>
struct QuantizeParams {
  Values x;
  const int32_t* rows;        // [1]: how many there are, at most as many as blocks; nullptr: as many
  const float* given_scale;   // [1]; nullptr: of each row
  const int32_t* given_zero;  // [1] or nullptr; with a given scale only
  bool symmetric;             // no zero points
  int slabs;                  // of a row of codes
  Vec4* codes;                // [rows, slabs * 4], 0 beyond k
  float* scale;               // [rows]
  int32_t* zero;              // [rows], or nullptr where all are 0
};

template <class Values>
struct Quantize {
  using Params = QuantizeParams<Values>;
  static constexpr int kThreads = 256, kMinBlocks = 4, kWarps = kThreads / kWarpLanes;
  static constexpr int kSharedBytes = 3 * kWarps * 4;
  static constexpr int kRun = kQuantizeRun;
  static constexpr uint32_t kInfinityBits = 0x7F800000u;

  static std::string name() { return "quantize"; }

  /// What is known of a row: the largest bits of |x|, and its range, widened to hold 0.
  struct Range {
    uint32_t most;
    float low, high;

    TM_DEVICE void take(const Range& other) {
      most = other.most > most ? other.most : most;
      low = smaller(low, other.low);
      high = larger(high, other.high);
    }
  };

  struct Rounding {
    float scale, zero;
  };

  TM_DEVICE static Range range_of_row(const Params& p, int64_t row, int thread) {
    Range range = {0, 0.0f, 0.0f};
    for (int k = thread * kRun; k < p.x.k(); k += kThreads * kRun) {
      float v[kRun];
      p.x.load(row, k, v);
      TM_UNROLL
      for (int e = 0; e < kRun; ++e) range.take({as_bits(v[e]) & 0x7FFFFFFFu, v[e], v[e]});
    }
    TM_UNROLL
    for (int mask = kWarpLanes / 2; mask > 0; mask /= 2)
      range.take({shuffle_xor(range.most, mask), as_float(shuffle_xor(as_bits(range.low), mask)),
                  as_float(shuffle_xor(as_bits(range.high), mask))});
    const auto place = [](int warp, int word) { return shared_base() + static_cast<uint32_t>(4 * (3 * warp + word)); };
    if (thread % kWarpLanes == 0) {
      store_shared_32(place(thread / kWarpLanes, 0), range.most);
      store_shared_32(place(thread / kWarpLanes, 1), as_bits(range.low));
      store_shared_32(place(thread / kWarpLanes, 2), as_bits(range.high));
    }
    sync_threads();
    TM_UNROLL
    for (int warp = 0; warp < kWarps; ++warp)
      range.take({load_shared_32(place(warp, 0)), as_float(load_shared_32(place(warp, 1))),
                  as_float(load_shared_32(place(warp, 2)))});
    return range;
  }

  TM_DEVICE static Rounding rounding_of(const Params& p, const Range& range) {
    constexpr float kEpsilon = 0x1p-23f;
    const float nan = as_float(kInfinityBits | 1 << 22);
    if (p.given_scale) {
      const float zero = p.given_zero ? to_float(load_global(p.given_zero)) : 0.0f;
      return {range.most > kInfinityBits ? nan : load_global(p.given_scale), zero};
    }
    const bool finite = range.most < kInfinityBits;
    if (p.symmetric) {
      const float scale = divide(as_float(range.most), 127.5f);
      return {!finite ? nan : scale == 0 ? kEpsilon : scale, 0.0f};
    }
    const float scale = divide(add(range.high, -range.low), 255.0f);
    if (!finite) return {nan, 0.0f};
    if (scale == 0) return {kEpsilon, -128.0f};
    return {scale, to_float(round_to_int(clamp(add(-128.0f, -divide(range.low, scale)))))};
  }

  TM_DEVICE static float clamp(float v) { return smaller(larger(v, -128.0f), 127.0f); }

  TM_DEVICE static uint32_t code(float x, const Rounding& by) {
    return static_cast<uint32_t>(round_to_int(clamp(add(divide(x, by.scale), by.zero)))) & 255u;
  }

  TM_DEVICE static void run(const Params& p) {
    const int thread = thread_index();
    const int64_t row = block_index_x();
    if (p.rows && row >= load_global(p.rows)) return;
    const Rounding by = rounding_of(p, range_of_row(p, row, thread));
    if (thread == 0) {
      store_global(p.scale + row, by.scale);
      if (p.zero) store_global(p.zero + row, round_to_int(by.zero));
    }
    const int runs = p.slabs * (kSlabK / kRun);
    for (int i = thread; i < runs; i += kThreads) {
      float v[kRun];
      p.x.load(row, i * kRun, v);
      Vec4 codes;
      TM_UNROLL
      for (int t = 0; t < 4; ++t) {
        codes.v[t] = 0;
        TM_UNROLL
        for (int b = 0; b < 4; ++b) {
          const int k = 2 * t + 8 * (b % 2) + b / 2;  // layout.h
          const bool inside = i * kRun + k < p.x.k();
          codes.v[t] |= inside ? code(v[k], by) << (8 * b) : 0;
        }
      }
      store_global(p.codes + row * runs + i, codes);
    }
  }
};

}  // namespace turbo::cuda
