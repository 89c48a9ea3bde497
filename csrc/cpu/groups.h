// SPDX-License-Identifier: Apache-2.0
// What happens to accumulators at both ends of a group of weights. gemm.h states the arithmetic.
#pragma once

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

/// What a kernel needs the processor's state to be while it runs: nothing.
struct AnyEnvironment {};

/// Activations kept, or rounded to small floats: fp32 accumulators. `I` adds zero_vec (fp32) and scale_vec.
template <class I, class B>
struct KeptGroups : B {
  using Vec = typename B::Vec;
  using Acc = Vec;
  static constexpr int64_t kManyFrom = 32;
  static constexpr bool kRounded = false, kZeroPoints = true, kPanels = false, kParts = false;
  static constexpr int64_t kFoldDwords = 0;
  using Environment = AnyEnvironment;
  static int64_t zero_dwords(const Layout& l) { return l.zero_dwords(); }

  /// `index` is that of (first row, group) in the arrays of PreparedX, `stride` the way to the next row.
  template <int V, int R>
  static inline __attribute__((always_inline)) void start(Acc (&acc)[V][R], const PreparedX&, int64_t,
                                                          int64_t, const uint32_t*) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[v][r] = B::zero();
  }

  template <int V, int R>
  static inline __attribute__((always_inline)) void end(Vec (&total)[V][R], Acc (&acc)[V][R],
                                                        const PreparedX& x, int64_t index,
                                                        int64_t stride, const uint32_t* zero,
                                                        const char* scales) {
    if constexpr (I::kZeroPoints)
      if (zero) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec z = I::zero_vec(zero, v);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            acc[v][r] = B::fnma(z, B::set1(x.sums[index + r * stride]), acc[v][r]);
        }
      }
    if constexpr (I::kRounded)
      if (x.group_scales) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec x_scale = B::set1(x.group_scales[index + r * stride]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[v][r] = B::mul(acc[v][r], x_scale);
        }
      }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec scale = I::scale_vec(scales, v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[v][r] = B::fma(acc[v][r], scale, total[v][r]);
    }
  }
};

/// Activations as integers: int32 accumulators, which start with what the dots count too much. `I` adds zero_vec
/// (int32: what a row's offset is multiplied by) and scale_vec.
template <class I, class B>
struct IntegerGroups : B {
  using Vec = typename B::Vec;
  using Acc = typename B::Raw;
  static constexpr int64_t kManyFrom = 8;  // x is converted anyway
  static constexpr bool kPanels = false, kParts = true;
  static constexpr int64_t kFoldDwords = 0;
  using Environment = AnyEnvironment;

  template <int V, int R>
  static inline __attribute__((always_inline)) void start(Acc (&acc)[V][R], const PreparedX& x,
                                                          int64_t index, int64_t stride,
                                                          const uint32_t* zero) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Acc offset = B::int_set1(x.offsets[index + r * stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[v][r] = zero ? B::int_mul(I::zero_vec(zero, v), offset) : offset;
    }
  }

  template <int V, int R>
  static inline __attribute__((always_inline)) void end(Vec (&total)[V][R], Acc (&acc)[V][R],
                                                        const PreparedX& x, int64_t index,
                                                        int64_t stride, const uint32_t*,
                                                        const char* scales) {
    if (x.group_scales) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec x_scale = B::set1(x.group_scales[index + r * stride]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          total[v][r] = B::fma(B::mul(B::to_float(acc[v][r]), x_scale), I::scale_vec(scales, v), total[v][r]);
      }
      return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec scale = I::scale_vec(scales, v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[v][r] = B::fma(B::to_float(acc[v][r]), scale, total[v][r]);
    }
  }
};

}  // namespace
}  // namespace turbo::cpu
