// SPDX-License-Identifier: Apache-2.0
// One layer of routed experts with all its tensors between guard pages, and the plain double reference of its
// result. Bounds are those of kernels/reference_moe.py.
#pragma once

#include "gemm_problem.h"
#include "moe.h"

namespace test {

using turbo::Activation;
using turbo::ActivationKind;
using turbo::kActivationNames;

struct MoeCase {
  Mode mode;
  int64_t tokens, top_k, experts, hidden, intermediate, group;  // group 0: channels
  DType dtype, scale_dtype;
  bool asymmetric, bias;
  ActivationKind kind;
  Edge edge;
  int threads;
  int64_t row_gap;  // elements between rows of x

  int64_t x_group() const { return group ? mode.x_group(group) : 0; }
  bool gated() const { return Activation{kind, 0, 0, 0}.gated(); }
  std::string name(Isa isa) const {
    char text[240];
    std::snprintf(text, sizeof text,
                  "moe %s %s %s dtype=%d scale=%d T=%" PRId64 " top=%" PRId64 " E=%" PRId64 " H=%" PRId64 " I=%" PRId64
                  " group=%" PRId64 "%s%s threads=%d gap=%" PRId64 " edge=%s",
                  isa_name(isa), mode.name, kActivationNames[static_cast<int>(kind)], static_cast<int>(dtype),
                  static_cast<int>(scale_dtype), tokens, top_k, experts, hidden, intermediate, group,
                  asymmetric ? " asymmetric" : "", bias ? " bias" : "", threads, row_gap,
                  edge == Edge::begin ? "begin" : "end");
    return text;
  }
};

inline constexpr double kUnit = 0x1p-24;
inline constexpr double kFunctionUnits = 24;

/// A value and how far from it a right kernel may be.
struct Bounded {
  double value = 0, off = 0;
};

/// v in `dtype`, halves to even.
inline double rounded(double v, DType dtype) {
  if (v == 0) return 0;
  const int lowest = dtype == DType::f16 ? -24 : -149;
  const double step = std::ldexp(1, std::max(std::ilogb(v) + 1 - significand_bits(dtype), lowest));
  return std::nearbyint(v / step) * step;
}

inline double activation(const Activation& a, double g, double u) {
  const double limit = a.limit, within = std::clamp<double>(u, -limit, limit), one = 1 / (1 + std::exp(-g));
  const double tanh_of = std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g));
  switch (a.kind) {
    case ActivationKind::swiglu: g = std::min(g, limit); return g / (1 + std::exp(-a.alpha * g)) * (within + a.beta);
    case ActivationKind::swiglustep: return std::min(g * one, limit) * within;
    case ActivationKind::situ:
      return a.alpha * std::tanh(g / a.alpha) * one * (a.beta > 0 ? a.beta * std::tanh(u / a.beta) : u);
    case ActivationKind::gelu: return g * std::erfc(-g * M_SQRT1_2) / 2 * u;
    case ActivationKind::gelu_tanh: return g * (1 + tanh_of) / 2 * u;
    case ActivationKind::silu_no_mul: return g * one;
    case ActivationKind::gelu_no_mul: return g * std::erfc(-g * M_SQRT1_2) / 2;
    case ActivationKind::gelu_tanh_no_mul: return g * (1 + tanh_of) / 2;
    case ActivationKind::relu2_no_mul: break;
  }
  return g > 0 ? g * g : 0;
}

/// One row of activations of a product: values, or their codes, and a scale for each group of weights.
struct Row {
  std::vector<double> values, scales;

  Row(const MoeCase& c, std::vector<double> v, int64_t groups, float given) : values(std::move(v)) {
    scales = round_row(c.mode, values.data(), static_cast<int64_t>(values.size()), groups, c.x_group(), given);
  }
};

/// The weights of one product for all experts: as numbers, and packed.
class ExpertWeights {
 public:
  /// `gate_up`: 0, or the number of gates among the rows.
  ExpertWeights(const MoeCase& c, int64_t rows, int64_t k, int64_t gate_up, uint32_t seed, float x_scale)
      : c_(c),
        rows_(rows),
        gate_up_(gate_up),
        layout{gate_up ? 2 * ceil_div(gate_up, kTileN) * kTileN : rows, k, c.mode.bytes() || !c.group ? 1 : k / c.group,
               c.mode.bits, c.mode.code},
        x_scale(x_scale),
        random_(seed) {
    for (auto* words : {&weight_, &zero_}) std::memset(words->data(), 0xFF, words->size() * 4);
    std::memset(scale_.data(), 0xFF, scale_.size());
    // NaN beside the real channels
    for (auto* floats : {&bias_, &channel_scale_}) std::memset(floats->data(), 0xFF, floats->size() * 4);
    for (int64_t e = 0; e < c.experts; ++e) fill(e);
  }

  Experts experts() const {
    return {layout, weight_.data(), scale_.data(), zero_.size() ? zero_.data() : nullptr,
            bias_.size() ? bias_.data() : nullptr, channel_scale_.size() ? channel_scale_.data() : nullptr, x_scale};
  }
  bool canary_intact() const { return weight_.canary_intact() && scale_.canary_intact() && zero_.canary_intact(); }

  double weight(int64_t e, int64_t row, int64_t k) const {
    const int64_t at = (e * rows_ + row) * layout.groups + k / (layout.k / layout.groups);
    return (q_[(e * rows_ + row) * layout.k + k] - z_[at]) * s_[at];
  }

  /// The fp32 result of one row of weights.
  Bounded dot(int64_t e, int64_t row, const Row& x) const {
    const int64_t width = layout.k / layout.groups, first = (e * rows_ + row) * layout.groups;
    double y = c_.bias ? bias_[e * layout.padded_n() + channel(row)] : 0, absolute = std::fabs(y);
    for (int64_t g = 0; g < layout.groups; ++g) {
      double sum = 0, magnitude = 0;
      for (int64_t k = g * width; k < (g + 1) * width; ++k) {
        const double q = q_[(e * rows_ + row) * layout.k + k], z = z_[first + g];
        sum += x.values[k] * (q - z);
        magnitude += std::fabs(x.values[k]) * (std::fabs(q) + std::fabs(z));
      }
      const double step = s_[first + g] * x.scales[g];
      y += sum * step;
      absolute += std::fabs(step) * (c_.mode.as_integers() ? std::fabs(sum) : magnitude);
    }
    const double steps = static_cast<double>((c_.mode.as_integers() ? 0 : width) + layout.groups + 6);
    return {y, kUnit * std::fabs(y) + std::min(steps, 6 * std::sqrt(steps)) * kUnit * absolute};
  }

 private:
  /// Where a row of the checkpoint is among the packed channels.
  int64_t channel(int64_t row) const {
    if (!gate_up_) return row;
    const int64_t at = row % gate_up_;
    return (at / kTileN * 2 + row / gate_up_) * kTileN + at % kTileN;
  }

  void fill(int64_t e) {
    const int64_t groups = layout.groups, bits = layout.bits, channels = layout.padded_n();
    const int most = 1 << (bits - 1);
    Guarded<int8_t> codes(rows_ * layout.k, c_.edge);
    Guarded<char> scale(rows_ * groups * scale_size_, c_.edge);
    Guarded<uint32_t> zero(c_.asymmetric ? ceil_div(rows_ * bits, 32) * groups : 0, c_.edge);
    for (int64_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<int8_t>(c_.mode.random_weight(static_cast<uint32_t>(random_())));
      q_.push_back(c_.mode.weight_of(codes[i]));
    }
    for (int64_t i = 0; i < zero.size(); ++i) zero[i] = static_cast<uint32_t>(random_());
    // Results of about 1 for activations of about 1.
    const int exponent = std::ilogb(2 / (most * std::sqrt(static_cast<double>(layout.k)))) + 1;
    if (c_.mode.channel_scale)
      for (int64_t row = 0; row < rows_; ++row)
        channel_scale_[e * channels + channel(row)] = std::ldexp(static_cast<float>(random_() % 1000 + 1000), -11);
    for (int64_t i = 0; i < rows_ * groups; ++i) {
      char* const to = scale.data() + i * scale_size_;
      store_scale(to, exponent);
      const double channel_scale = c_.mode.channel_scale ? channel_scale_[e * channels + channel(i / groups)] : 1;
      s_.push_back(load(to, c_.scale_dtype) * channel_scale);
      z_.push_back(c_.asymmetric ? stream_bits(zero.data() + i % groups, groups, i / groups * bits, bits) - most : 0);
    }
    if (c_.bias)
      for (int64_t row = 0; row < rows_; ++row)
        bias_[e * channels + channel(row)] = static_cast<float>(random_() % 1000) / 1000 - 0.5f;
    const int64_t zero_step = zero_.size() / c_.experts;
    uint32_t* const third = zero_.size() ? zero_.data() + e * zero_step : nullptr;
    const bool sums = c_.mode.bytes();
    pack({layout, bits, nullptr, codes.data(), layout.k, scale.data(), groups, scale_size_,
          zero.size() ? zero.data() : nullptr, groups, weight_.data() + e * channels * layout.dwords(),
          scale_.data() + e * channels * groups * scale_size_, sums ? nullptr : third,
          sums ? reinterpret_cast<int32_t*>(third) : nullptr, gate_up_},
         pool_of(c_.threads));
  }

  /// A random scale with this exponent or the next lower one; e4m3, which has few: up to two more.
  void store_scale(char* to, int exponent) {
    if (c_.scale_dtype == DType::e8m0) {
      *to = static_cast<char>(127 + exponent - random_() % 2);
    } else if (c_.scale_dtype == DType::e4m3) {
      const uint32_t top = static_cast<uint32_t>(std::max(exponent + 7, 1)) << 3;
      *to = static_cast<char>((top + random_() % 16) | (random_() % 2) << 7);
    } else {
      const int significand = significand_bits(c_.scale_dtype);
      const int64_t half = int64_t{1} << (significand - 1), number = half + static_cast<int64_t>(random_() % half);
      store(to, c_.scale_dtype,
            std::ldexp(static_cast<float>(random_() % 2 ? number : -number), exponent - significand));
    }
  }

  const MoeCase& c_;
  const int64_t rows_, gate_up_;

 public:
  const Layout layout;
  const float x_scale;  // fixed activations

 private:
  std::mt19937 random_;
  int64_t scale_size_ = dtype_size(c_.scale_dtype), channels_ = c_.experts * layout.padded_n();
  Guarded<uint32_t> weight_{channels_ * layout.dwords(), c_.edge};
  Guarded<char> scale_{channels_ * layout.groups * scale_size_, c_.edge};
  Guarded<uint32_t> zero_{c_.mode.bytes()  ? channels_
                          : c_.asymmetric ? channels_ / layout.dword_k() * layout.groups
                                          : 0,
                          c_.edge};
  Guarded<float> bias_{c_.bias ? channels_ : 0, c_.edge};
  Guarded<float> channel_scale_{c_.mode.channel_scale ? channels_ : 0, c_.edge};
  std::vector<double> q_;  // [experts, rows, k]
  std::vector<int> z_;     // [experts, rows, groups]
  std::vector<double> s_;  // [experts, rows, groups], times the channel's
};

/// The tensors of one case.
class MoeProblem {
 public:
  explicit MoeProblem(const MoeCase& one) : c(one) {
    std::mt19937 random(7);
    std::memset(x_.data(), 0xFF, x_.size());  // NaN between the rows, in every dtype
    const int bits = significand_bits(c.dtype);
    const int64_t range = int64_t{1} << bits;
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t k = 0; k < c.hidden; ++k) {
        const int64_t number = static_cast<int64_t>(random() % (2 * range - 1)) - (range - 1);
        store(x_at(t, k), c.dtype, std::ldexp(static_cast<float>(number), 1 - bits));
      }
    for (int64_t i = 0; i < ids_.size(); ++i) {
      // Some are elsewhere, some experts come twice; the first is there.
      ids_[i] = static_cast<int32_t>(random() % (c.experts + 1)) - (i > 0);
      if (ids_[i] == c.experts) ids_[i] = 0;
      weights_[i] = static_cast<float>(random() % 1000 + 100) / 1000;
    }
  }

  bool pack_stayed_inside() const { return w13_.canary_intact() && w2_.canary_intact(); }

  void run(Isa isa, char* y) const {
    moe({c.tokens, c.top_k, c.experts, c.intermediate, c.dtype, c.scale_dtype, c.mode.activations, x_.data(), x_stride_,
         w13_.experts(), w2_.experts(), activation_, weights_.data(), ids_.data(), y, c.x_group()},
        isa, pool_of(c.threads));
  }

  /// One token's results.
  std::vector<Bounded> expected(int64_t t) const {
    std::vector<double> x;
    for (int64_t k = 0; k < c.hidden; ++k) x.push_back(load(x_at(t, k), c.dtype));
    const Row row(c, x, w13_.layout.groups, w13_.x_scale);
    std::vector<Bounded> y(c.hidden);
    std::vector<double> magnitude(c.hidden);
    for (int64_t slot = 0; slot < c.top_k; ++slot) {
      const int32_t e = ids_[t * c.top_k + slot];
      if (e < 0) continue;
      const double weight = weights_[t * c.top_k + slot];
      const std::vector<Bounded> h = between(e, row);
      std::vector<double> values;
      for (const Bounded& one : h)
        values.push_back(c.mode.kept() ? rounded(one.value, c.dtype) : static_cast<float>(one.value));
      const Row h_row(c, values, w2_.layout.groups, w2_.x_scale);
      const std::vector<double> moved = moved_by_rounding(h, h_row);
      for (int64_t n = 0; n < c.hidden; ++n) {
        Bounded down = w2_.dot(e, n, h_row);
        for (int64_t i = 0; i < c.intermediate; ++i) down.off += moved[i] * std::fabs(w2_.weight(e, n, i));
        y[n].value += weight * down.value;
        y[n].off += weight * down.off;
        magnitude[n] += weight * std::fabs(down.value);
      }
    }
    for (int64_t n = 0; n < c.hidden; ++n) {
      y[n].off += static_cast<double>(c.top_k + 1) * kUnit * magnitude[n];
      y[n].off = epsilon(c.dtype) / 2 * std::fabs(y[n].value) + 1.01 * y[n].off + 0x1p-25;
    }
    return y;
  }

  int64_t size() const { return dtype_size(c.dtype); }

  const MoeCase c;

 private:
  char* x_at(int64_t t, int64_t k) { return x_.data() + (t * x_stride_ + k) * size(); }
  const char* x_at(int64_t t, int64_t k) const { return x_.data() + (t * x_stride_ + k) * size(); }

  /// What the activation makes of the first product, not yet rounded.
  std::vector<Bounded> between(int64_t e, const Row& x) const {
    std::vector<Bounded> h;
    for (int64_t i = 0; i < c.intermediate; ++i) {
      const Bounded g = w13_.dot(e, i, x), u = c.gated() ? w13_.dot(e, c.intermediate + i, x) : Bounded{};
      const auto of = [&](double dg, double du) { return activation(activation_, g.value + dg, u.value + du); };
      const double value = of(0, 0);
      const auto off = [&](double dg, double du) {
        return std::max(std::fabs(of(dg, du) - value), std::fabs(of(-dg, -du) - value));
      };
      h.push_back({value, kFunctionUnits * kUnit * std::fabs(value) + off(g.off, 0) + off(0, u.off)});
    }
    return h;
  }

  /// How far each rounded h may be from the reference's.
  std::vector<double> moved_by_rounding(const std::vector<Bounded>& h, const Row& row) const {
    std::vector<double> moved;
    const int64_t count = static_cast<int64_t>(h.size()), width = count / w2_.layout.groups;
    const int64_t piece = c.mode.activations == Activations::grouped ? std::max(width, c.x_group()) : count;
    const bool integer = c.mode.integer(), fixed = c.mode.activations == Activations::fixed;
    for (int64_t i = 0; i < count; ++i) {
      if (c.mode.kept()) {
        moved.push_back(rounded(h[i].value + h[i].off, c.dtype) - rounded(h[i].value - h[i].off, c.dtype));
        continue;
      }
      // The scale moves with the largest value, and every quotient with it.
      double largest = integer ? 0x1p-126 : 1.0 / 512, off = 0;
      for (int64_t j = i / piece * piece; j < std::min((i / piece + 1) * piece, count); ++j) {
        largest = std::max(largest, std::fabs(h[j].value));
        off = std::max(off, h[j].off);
      }
      const double scale = row.scales[i / width], size = std::fabs(h[i].value);
      if (fixed) off = 0;  // as is the scale
      const double wide = h[i].off + size * (off / largest + 4 * kUnit);
      const auto code = [&](double v) {
        return integer ? std::nearbyint(std::clamp(v / scale, -128.0, 127.0))
                       : nearest_e4m3(std::clamp(v / scale, -448.0, 448.0));
      };
      const double low = code(h[i].value - wide) * scale, high = code(h[i].value + wide) * scale;
      const double scale_off = off / largest + off / largest + 4 * kUnit;
      moved.push_back(high - low + std::max({size, std::fabs(low), std::fabs(high)}) * scale_off);
    }
    return moved;
  }

  int64_t x_stride_ = c.hidden + c.row_gap;
  // Limits that a fifth of the values meet.
  Activation activation_{c.kind, 1.3f, c.kind == ActivationKind::swiglu ? 1.0f : 0.9f, 1.25f};
  ExpertWeights w13_{c, c.gated() ? 2 * c.intermediate : c.intermediate, c.hidden, c.gated() ? c.intermediate : 0, 1,
                     0.0035f};
  ExpertWeights w2_{c, c.hidden, c.intermediate, 0, 2, 0.0047f};
  Guarded<char> x_{((c.tokens - 1) * x_stride_ + c.hidden) * size(), c.edge};
  Guarded<float> weights_{c.tokens * c.top_k, c.edge};
  Guarded<int32_t> ids_{c.tokens * c.top_k, c.edge};
};

}  // namespace test
