// SPDX-License-Identifier: Apache-2.0
// Rounding activations to e4m3, as vLLM's QuantFP8 defines it, in fp32: scale = max|x| / 448, but at least
// 1 / (448 * 512); x * (1 / scale), or x / scale where each group has its own scale, within +-448, to the nearest e4m3,
// halves to even. A row (or group) with a value that is not finite (at a given scale: not a number) gets the scale
// NaN, so its results say so.
#pragma once

#include "quantize.h"

namespace turbo::cpu {
namespace {

template <class B>
struct QuantizeE4m3 {
  using Vec = typename B::Vec;
  using Whole = Quantize<B>;
  static constexpr float kMost = 448.0f, kLeastScale = 1.0f / (448.0f * 512.0f);

  template <DType D>
  static float scale_of(const char* x, int64_t count) {
    const uint32_t bits = Whole::template largest_bits<D>(x, count);
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    const float scale = largest / kMost;
    return (scale < kLeastScale ? kLeastScale : scale) + Whole::not_finite(bits);
  }

  /// Rounds `count` values and stores them as units, padded with zeros to a whole dword of weights.
  template <class Units, DType D>
  static void round_to(char* out, const char* x, int64_t count, float scale, bool divide) {
    const Vec by = B::set1(divide ? scale : 1.0f / scale), most = B::set1(kMost), least = B::set1(-kMost);
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i < 16 ? count - i : 16;
      Vec v[Whole::kVecs];
      Whole::template load16<D>(v, x + i * dtype_size(D), left);
      for (Vec& part : v) {
        part = divide ? B::div(part, by) : B::mul(part, by);
        part = B::round_e4m3(B::min(most, B::max(least, part)));  // not a number comes through
      }
      alignas(64) char buffer[64];
      const int64_t padded = ceil_div(left, 4) * 4;
      char* const to = out + i * Units::kBytes;
      Units::store16(padded == 16 ? to : buffer, v);
      if (padded < 16) __builtin_memcpy(to, buffer, padded * Units::kBytes);
    }
  }

  template <class Units, DType D>
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    const Layout& l = a.layout;
    const int64_t width = l.groups == 1 ? l.k : l.k / l.groups, size = dtype_size(D);
    char* const units = reinterpret_cast<char*>(out.units);
    if (a.activations != Activations::grouped) {
      float scale = a.x_scale;
      if (a.activations == Activations::dynamic)
        scale = scale_of<D>(x, l.k);
      else if (Whole::template largest_bits<D>(x, l.k) > kInfinityBits)
        scale = __builtin_nanf("");
      *out.scale = scale;
      round_to<Units, D>(units, x, l.k, scale, false);
      return;
    }
    const int64_t span = a.x_group > width ? a.x_group : width;
    for (int64_t k = 0; k < l.k; k += span) {
      const int64_t count = l.k - k < span ? l.k - k : span;
      const float scale = scale_of<D>(x + k * size, count);
      for (int64_t i = k / width; i < (k + count) / width; ++i) out.group_scales[i] = scale;
      round_to<Units, D>(units + k * Units::kBytes, x + k * size, count, scale, true);
    }
  }

  template <class Units>
  static void prepare(const Gemm& a, const char* x, const RowOut& out) {
    if (a.dtype == DType::bf16)
      prepare_row<Units, DType::bf16>(a, x, out);
    else if (a.dtype == DType::f16)
      prepare_row<Units, DType::f16>(a, x, out);
    else
      prepare_row<Units, DType::f32>(a, x, out);
  }
};

/// Units of kernels that multiply fp32.
template <class B>
struct Fp32Units {
  static constexpr int64_t kBytes = 4;
  static void store16(char* out, const typename B::Vec (&v)[B::kVecs16]) {
    for (int i = 0; i < B::kVecs16; ++i) B::store_floats(reinterpret_cast<float*>(out) + i * B::kLanes, v[i]);
  }
};

}  // namespace
}  // namespace turbo::cpu
