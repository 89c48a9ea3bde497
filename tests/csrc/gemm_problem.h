// SPDX-License-Identifier: Apache-2.0
// One product with all its tensors between guard pages, and the plain double reference of its result.
#pragma once

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gemm.h"
#include "guarded.h"
#include "half_types.h"
#include "pack.h"
#include "pool.h"

namespace test {

using namespace turbo::cpu;

/// A width of weights and what becomes of the activations.
struct Mode {
  const char* name;
  int64_t bits;
  Activations activations;
  bool x_symmetric;
  Code code = Code::integer;
  DType float_scale = DType::f32;  // of weights that are floats
  bool channel_scale = false;

  bool kept() const { return activations == Activations::kept; }
  bool integer() const { return code == Code::integer; }
  bool as_integers() const { return integer() && !kept(); }
  /// 8-bit weights under integer activations: one group, bytes, sums instead of zero points.
  bool bytes() const { return bits == 8 && as_integers(); }
  bool zero_points() const { return integer() && !bytes(); }
  /// Scales that it takes: of the activations' dtype beside integers where they are kept, fp32 for bytes.
  DType scale_dtype(DType dtype, int turn) const {
    if (!integer()) return float_scale;
    return kept() ? dtype : bytes() ? DType::f32 : static_cast<DType>(turn % 3);
  }
  /// Gemm::x_group for weights in groups of `width`: where it may be longer, it is, and the last one may be shorter.
  int64_t x_group(int64_t width) const {
    return activations == Activations::grouped && !integer() ? 2 * width : 0;
  }
  /// What a weight's bits, sign extended, stand for.
  double weight_of(int bits_of_it) const {
    return code == Code::e4m3   ? e4m3_of(static_cast<uint8_t>(bits_of_it))
           : code == Code::e2m1 ? e2m1_of(bits_of_it & 15)
                                : bits_of_it;
  }
  /// Random bits of a weight, none of which are e4m3's NaN.
  int random_weight(uint32_t random) const {
    const int most = 1 << (bits - 1), weight = static_cast<int>(random % (2 * most)) - most;
    return code == Code::e4m3 && (weight & 127) == 127 ? weight - 1 : weight;
  }
};

inline constexpr std::array<Mode, 13> kModes = {{
    {"w4a16", 4, Activations::kept, true},
    {"w8a16", 8, Activations::kept, true},
    {"w4a8", 4, Activations::dynamic, true},
    {"w4a8 grouped", 4, Activations::grouped, true},
    {"w8a8", 8, Activations::dynamic, true},
    {"w8a8 asymmetric", 8, Activations::dynamic, false},
    {"w8a8 static", 8, Activations::fixed, false},
    {"fp8", 8, Activations::kept, true, Code::e4m3},
    {"fp8 token", 8, Activations::dynamic, true, Code::e4m3, DType::f32, true},
    {"fp8 grouped", 8, Activations::grouped, true, Code::e4m3},
    {"fp8 tensor", 8, Activations::fixed, true, Code::e4m3},
    {"fp4 e8m0", 4, Activations::kept, true, Code::e2m1, DType::e8m0},
    {"fp4 e4m3", 4, Activations::kept, true, Code::e2m1, DType::e4m3, true},
}};

struct Case {
  Mode mode;
  int64_t rows, n, k, groups;
  int64_t code_bits;  // 0: bytes
  DType dtype, scale_dtype;
  bool asymmetric, bias;
  Edge edge;
  int threads;
  int64_t row_gap;  // elements between rows of x

  std::string name(Isa isa) const {
    static constexpr const char* kTypes[] = {"bf16", "f16", "f32", "e8m0", "e4m3"};
    char text[240];
    std::snprintf(text, sizeof text,
                  "%s %s %s M=%" PRId64 " N=%" PRId64 " K=%" PRId64 " groups=%" PRId64 " code bits=%" PRId64
                  " scale=%s%s%s threads=%d gap=%" PRId64 " edge=%s",
                  isa_name(isa), mode.name, kTypes[static_cast<int>(dtype)], rows, n, k, groups, code_bits,
                  kTypes[static_cast<int>(scale_dtype)], asymmetric ? " asymmetric" : "",
                  bias ? " bias" : "", threads, row_gap, edge == Edge::begin ? "begin" : "end");
    return text;
  }
};

inline Parallel pool_of(int threads) {
  return threads == 1 ? pool<1>() : threads == 2 ? pool<2>() : pool<5>();
}

/// The static scale and zero point: some of the activations, which lie in (-4, 4), are clamped.
inline constexpr float kXScale = 0.017f;
inline constexpr int32_t kXZeroPoint = -37;
inline constexpr float kXScaleE4m3 = 0.0061f;

/// `bits` bits from `bit` on of a stream of dwords `stride` apart, one bit at a time.
inline int stream_bits(const uint32_t* stream, int64_t stride, int64_t bit, int64_t bits) {
  int code = 0;
  for (int64_t i = 0; i < bits; ++i)
    code |= static_cast<int>(stream[(bit + i) / 32 * stride] >> ((bit + i) % 32) & 1) << i;
  return code;
}

/// Replaces values by their codes less the zero point, in float as gemm.h's callers define it; returns their scale.
inline double round_to_int8(const Mode& mode, double* values, int64_t count) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, static_cast<float>(values[i]));
    high = std::max(high, static_cast<float>(values[i]));
  }
  float scale = kXScale, zero = kXZeroPoint;
  if (mode.activations != Activations::fixed) {
    scale = mode.x_symmetric ? std::max(-low, high) / 127.5f : (high - low) / 255.0f;
    if (scale == 0) scale = 0x1p-23f;
    zero = mode.x_symmetric ? 0 : std::rint(std::clamp(-128.0f - low / scale, -128.0f, 127.0f));
  }
  for (int64_t i = 0; i < count; ++i) {
    const float code = static_cast<float>(values[i]) / scale + zero;
    values[i] = std::rint(std::clamp(code, -128.0f, 127.0f)) - zero;
  }
  return scale;
}

/// The same for e4m3, which has no zero point; `given` is the scale of fixed activations.
inline double round_to_e4m3(const Mode& mode, double* values, int64_t count, float given) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(static_cast<float>(values[i])));
  const bool fixed = mode.activations == Activations::fixed, grouped = mode.activations == Activations::grouped;
  const float scale = fixed ? given : std::max(largest / 448.0f, 1.0f / (448.0f * 512.0f)), inverse = 1.0f / scale;
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(values[i]), scaled = grouped ? value / scale : value * inverse;
    values[i] = nearest_e4m3(std::clamp(scaled, -448.0f, 448.0f));
  }
  return scale;
}

/// Rounds a row of k activations in place; returns the scales of its groups.
inline std::vector<double> round_row(const Mode& mode, double* row, int64_t k, int64_t groups, int64_t x_group,
                                     float given) {
  const int64_t width = k / groups, span = mode.activations == Activations::grouped ? std::max(x_group, width) : k;
  std::vector<double> scales;
  for (int64_t at = 0; at < k; at += span) {
    const int64_t count = std::min(span, k - at);
    const double scale = mode.kept()      ? 1
                         : mode.integer() ? round_to_int8(mode, row + at, count)
                                          : round_to_e4m3(mode, row + at, count, given);
    scales.insert(scales.end(), count / width, scale);
  }
  return scales;
}

/// The tensors of one case, disk order and packed, each between its own guard pages.
class Problem {
 public:
  explicit Problem(const Case& one) : c(one), layout{one.n, one.k, one.groups, one.mode.bits, one.mode.code} {
    fill();
    // Poison: packing must write every element.
    for (auto* words : {&weight_, &zeros_out_}) std::memset(words->data(), 0xFF, words->size() * 4);
    std::memset(scale_out_.data(), 0xFF, scale_out_.size());
    pack({layout, c.code_bits ? c.code_bits : layout.bits, c.code_bits ? codes_.data() : nullptr,
          c.code_bits ? nullptr : bytes_.data(), c.code_bits ? row_dwords_ : layout.k, scale_.data(),
          layout.groups, scale_size_, zero_dwords_ ? zeros_.data() : nullptr, layout.groups,
          weight_.data(), scale_out_.data(), zero_dwords_ ? zeros_out_.data() : nullptr,
          c.mode.bytes() ? sums() : nullptr},
         pool_of(c.threads));
    read_back();
  }

  bool pack_stayed_inside() const {
    return weight_.canary_intact() && scale_out_.canary_intact() && zeros_out_.canary_intact();
  }

  void run(Isa isa, char* y) {
    Gemm args{layout, c.dtype, c.scale_dtype, c.rows, x_.data(), x_stride_, weight_.data(),
              scale_out_.data(), zeros_out_.size() ? zeros_out_.data() : nullptr,
              c.bias ? bias_.data() : nullptr, c.dtype, y, layout.n};
    args.activations = c.mode.activations;
    args.symmetric = c.mode.x_symmetric;
    args.x_scale = c.mode.integer() ? kXScale : kXScaleE4m3;
    args.x_group = c.mode.x_group(c.k / c.groups);
    if (c.mode.channel_scale) args.channel_scale = channel_scale_.data();
    args.x_zero_point = kXZeroPoint;
    gemm(args, isa, pool_of(c.threads));
  }

  /// Result and permitted deviation of one element; the bounds are those of kernels/reference.py and
  /// kernels/reference_int8.py and kernels/reference_float.py.
  std::array<double, 2> expected(int64_t m, int64_t n) const {
    const int64_t width = layout.k / layout.groups;
    const double channel = c.mode.channel_scale ? channel_scale_[n] : 1;
    double y = c.bias ? load(bias_.data() + n * size(), c.dtype) : 0;
    double absolute = std::fabs(y);
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t at = n * layout.groups + g;
      const double step =
          load(scale_.data() + at * scale_size_, c.scale_dtype) * channel * x_scales_[m * layout.groups + g];
      const int z = z_[at];
      double sum = 0, magnitude = 0;
      for (int64_t k = g * width; k < (g + 1) * width; ++k) {
        const double v = values_[m * layout.k + k];
        const double q = q_[n * layout.k + k];
        sum += v * (q - z);
        magnitude += std::fabs(v) * (std::fabs(q) + std::abs(z));
      }
      y += sum * step;
      // Sums of integers are exact; of others each summand is rounded.
      absolute += std::fabs(step) * (c.mode.as_integers() ? std::fabs(sum) : magnitude);
    }
    const double steps = static_cast<double>((c.mode.as_integers() ? 0 : width) + layout.groups + 6);
    const double walk = std::min(steps, 6 * std::sqrt(steps)) * 0x1p-24;
    return {y, epsilon(c.dtype) / 2 * std::fabs(y) + 1.01 * walk * absolute + 0x1p-25};
  }

  int64_t size() const { return dtype_size(c.dtype); }

  const Case c;
  const Layout layout;

 private:
  int32_t* sums() { return reinterpret_cast<int32_t*>(zeros_out_.data()); }

  void fill() {
    std::mt19937 random(static_cast<uint32_t>(layout.n * 31 + layout.k));
    const auto number = [&](DType dtype) {  // exact in the dtype, in (-4, 4)
      const int bits = significand_bits(dtype);
      const int64_t range = (int64_t{1} << bits) - 1;
      return std::ldexp(static_cast<float>(std::uniform_int_distribution<int64_t>(-range, range)(random)), 2 - bits);
    };
    for (int64_t i = 0; i < codes_.size(); ++i) codes_[i] = static_cast<uint32_t>(random());
    for (int64_t i = 0; i < bytes_.size(); ++i)
      bytes_[i] = static_cast<int8_t>(c.mode.random_weight(static_cast<uint32_t>(random())));
    for (int64_t i = 0; i < zeros_.size(); ++i) zeros_[i] = static_cast<uint32_t>(random());
    for (int64_t i = 0; i < layout.n * layout.groups; ++i) {
      char* const to = scale_.data() + i * scale_size_;
      if (c.scale_dtype == DType::e8m0)
        *to = static_cast<char>(124 + random() % 6);
      else if (c.scale_dtype == DType::e4m3)
        *to = static_cast<char>(random() % 127 | (random() & 128));  // no NaN
      else  // e4m3 are larger than fp16's results leave room for
        store(to, c.scale_dtype, number(c.scale_dtype) * (c.mode.code == Code::e4m3 ? 0x1p-6f : 1));
    }
    std::memset(channel_scale_.data(), 0xFF, channel_scale_.size() * 4);  // NaN beside the real channels
    if (c.mode.channel_scale)
      for (int64_t i = 0; i < layout.n; ++i) channel_scale_[i] = number(DType::f32) * 0x1p-6f;
    if (c.bias)
      for (int64_t i = 0; i < layout.n; ++i) store(bias_.data() + i * size(), c.dtype, number(c.dtype));
    std::memset(x_.data(), 0xFF, x_.size());  // NaN between the rows, in every dtype
    for (int64_t m = 0; m < c.rows; ++m)
      for (int64_t k = 0; k < layout.k; ++k)
        store(x_.data() + (m * x_stride_ + k) * size(), c.dtype, number(c.dtype));
  }

  /// The disk tensors as numbers: weights, zero points, and activations as the mode rounds them.
  void read_back() {
    const int64_t bits = c.code_bits, groups = layout.groups;
    const int offset = bits ? 1 << (bits - 1) : 0;
    for (int64_t n = 0; n < layout.n; ++n) {
      for (int64_t k = 0; k < layout.k; ++k)
        q_.push_back(c.mode.weight_of(bits ? stream_bits(codes_.data() + n * row_dwords_, 1, k * bits, bits) - offset
                                           : bytes_[n * layout.k + k]));
      for (int64_t g = 0; g < groups; ++g)
        z_.push_back(zero_dwords_ ? stream_bits(zeros_.data() + g, groups, n * bits, bits) - offset : 0);
    }
    for (int64_t m = 0; m < c.rows; ++m) {
      for (int64_t k = 0; k < layout.k; ++k)
        values_.push_back(load(x_.data() + (m * x_stride_ + k) * size(), c.dtype));
      const std::vector<double> scales = round_row(c.mode, values_.data() + m * layout.k, layout.k, groups,
                                                   c.mode.x_group(layout.k / groups), kXScaleE4m3);
      x_scales_.insert(x_scales_.end(), scales.begin(), scales.end());
    }
  }

  int64_t scale_size_ = dtype_size(c.scale_dtype);
  int64_t x_stride_ = c.k + c.row_gap;
  int64_t row_dwords_ = ceil_div(c.k * c.code_bits, 32);
  int64_t zero_dwords_ = c.asymmetric ? ceil_div(c.n * c.code_bits, 32) * c.groups : 0;
  Guarded<uint32_t> codes_{c.n * row_dwords_, c.edge};
  Guarded<int8_t> bytes_{c.code_bits ? 0 : c.n * c.k, c.edge};
  Guarded<char> scale_{c.n * c.groups * scale_size_, c.edge};
  Guarded<uint32_t> zeros_{zero_dwords_, c.edge};
  Guarded<float> channel_scale_{c.mode.channel_scale ? layout.padded_n() : 0, c.edge};
  Guarded<char> bias_{c.bias ? c.n * size() : 0, c.edge};
  Guarded<char> x_{((c.rows - 1) * x_stride_ + c.k) * size(), c.edge};
  Guarded<uint32_t> weight_{layout.padded_n() * layout.dwords(), c.edge};
  Guarded<char> scale_out_{layout.padded_n() * c.groups * scale_size_, c.edge};
  Guarded<uint32_t> zeros_out_{c.mode.bytes()  ? layout.padded_n()
                               : c.asymmetric ? layout.padded_n() / layout.dword_k() * c.groups
                                              : 0,
                               c.edge};
  std::vector<double> q_;         // [n, k]
  std::vector<int> z_;            // [n, groups]
  std::vector<double> values_;    // [rows, k]: activations, or their codes less the zero point
  std::vector<double> x_scales_;  // [rows, groups]
};

}  // namespace test
