// SPDX-License-Identifier: Apache-2.0
// A layer of routed experts with all its tensors between guard pages, and a plain double reference of its
// result. What tests/kernels holds to rounding is here held to a hundredth: this is about memory.
#pragma once

#include <cmath>

#include "gemm_problem.h"
#include "moe.h"

namespace test {

struct MoeCase {
  int64_t bits;
  Activations activations;
  ActivationKind kind;
  int64_t tokens, hidden, intermediate, experts, top_k, groups;
  DType dtype;
  bool asymmetric, bias;
  Edge edge;
  int threads;

  bool sums() const { return bits == 8 && activations != Activations::kept; }
  std::string name(Isa isa) const {
    char text[240];
    std::snprintf(text, sizeof text,
                  "%s %d bits activations=%d %s T=%" PRId64 " H=%" PRId64 " I=%" PRId64 " E=%" PRId64 " top=%" PRId64
                  " groups=%" PRId64 " dtype=%d%s%s threads=%d",
                  isa_name(isa), static_cast<int>(bits), static_cast<int>(activations),
                  kActivationNames[static_cast<int>(kind)], tokens, hidden, intermediate, experts, top_k, groups,
                  static_cast<int>(dtype), asymmetric ? " asymmetric" : "", bias ? " bias" : "", threads);
    return text;
  }
};

/// One product's weights: random codes of every expert, packed, and as numbers.
class ExpertWeights {
 public:
  ExpertWeights(const MoeCase& c, int64_t rows, int64_t k, bool gate_up, std::mt19937& random)
      : layout{gate_up ? 2 * ceil_div(rows / 2, kTileN) * kTileN : rows, k, c.groups, c.bits},
        rows_(rows),
        scale_size_(c.sums() ? 4 : dtype_size(c.dtype)),
        weight_(c.experts * layout.padded_n() * layout.dwords(), c.edge),
        scale_(c.experts * layout.padded_n() * c.groups * scale_size_, c.edge),
        third_(c.experts * third_size(c), c.edge),
        bias_(c.bias ? c.experts * layout.padded_n() : 0, c.edge) {
    const int64_t words = ceil_div(k * c.bits, 32), zero_words = ceil_div(rows * c.bits, 32);
    const DType scale_dtype = c.sums() ? DType::f32 : c.dtype;
    const int most = 1 << (c.bits - 1);
    for (int64_t i = 0; i < bias_.size(); ++i) bias_[i] = 0;
    for (int64_t e = 0; e < c.experts; ++e) {
      Guarded<uint32_t> codes(rows * words, c.edge), zeros(c.asymmetric ? zero_words * c.groups : 0, c.edge);
      Guarded<char> scale(rows * c.groups * scale_size_, c.edge);
      for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint32_t>(random());
      for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint32_t>(random());
      for (int64_t i = 0; i < rows * c.groups; ++i)
        store(scale.data() + i * scale_size_, scale_dtype, static_cast<float>(1 + random() % 7) / (256.0f * most));
      Guarded<int8_t> bytes(c.sums() ? rows * k : 0, c.edge);
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t i = 0; i < k; ++i) {
          const int code = stream_bits(codes.data() + n * words, 1, i * c.bits, c.bits) - most;
          if (c.sums()) bytes[n * k + i] = static_cast<int8_t>(code);
          const int64_t g = i / (k / c.groups);
          const int zero = c.asymmetric ? stream_bits(zeros.data() + g, c.groups, n * c.bits, c.bits) - most : 0;
          numbers_.push_back((code - zero) * load(scale.data() + (n * c.groups + g) * scale_size_, scale_dtype));
        }
      for (int64_t n = 0; n < rows; ++n) biases_.push_back(c.bias ? static_cast<float>(random() % 5) / 16 : 0);
      for (int64_t n = 0; n < rows && c.bias; ++n) bias_[e * layout.padded_n() + channel_of(n, gate_up)] =
          static_cast<float>(biases_[static_cast<size_t>(e * rows + n)]);
      pack({layout, c.bits, c.sums() ? nullptr : codes.data(), c.sums() ? bytes.data() : nullptr,
            c.sums() ? k : words, scale.data(), c.groups, scale_size_, c.asymmetric ? zeros.data() : nullptr, c.groups,
            weight_.data() + e * layout.padded_n() * layout.dwords(),
            scale_.data() + e * layout.padded_n() * c.groups * scale_size_,
            c.asymmetric ? third_.data() + e * third_size(c) : nullptr,
            c.sums() ? reinterpret_cast<int32_t*>(third_.data()) + e * third_size(c) : nullptr, gate_up ? rows / 2 : 0},
           pool_of(c.threads));
    }
  }

  Experts experts() const {
    return {layout, weight_.data(), scale_.data(), third_.size() ? third_.data() : nullptr,
            bias_.size() ? bias_.data() : nullptr};
  }

  /// Row `n` of expert `e` times x.
  double product(int64_t e, int64_t n, const std::vector<double>& x) const {
    const int64_t at = e * rows_ + n;
    double sum = biases_[static_cast<size_t>(at)];
    for (size_t i = 0; i < x.size(); ++i) sum += numbers_[static_cast<size_t>(at) * x.size() + i] * x[i];
    return sum;
  }

  const Layout layout;

 private:
  int64_t third_size(const MoeCase& c) const {
    return c.sums() ? layout.padded_n() : c.asymmetric ? layout.padded_n() / layout.dword_k() * c.groups : 0;
  }
  int64_t channel_of(int64_t n, bool gate_up) const {
    if (!gate_up) return n;
    const int64_t half = n / (rows_ / 2), at = n % (rows_ / 2);
    return (at / kTileN * 2 + half) * kTileN + at % kTileN;
  }

  int64_t rows_, scale_size_;
  Guarded<uint32_t> weight_;
  Guarded<char> scale_;
  Guarded<uint32_t> third_;
  Guarded<float> bias_;
  std::vector<double> numbers_, biases_;
};

class MoeProblem {
 public:
  explicit MoeProblem(const MoeCase& one)
      : c(one),
        activation{one.kind, 1.25f, 0.5f, 1.5f},
        w13(one, one.intermediate * (activation.gated() ? 2 : 1), one.hidden, activation.gated(), random_),
        w2(one, one.hidden, one.intermediate, false, random_) {
    std::memset(x_.data(), 0xFF, x_.size());  // NaN between the rows
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t h = 0; h < c.hidden; ++h)
        store(x_.data() + (t * stride_ + h) * size(), c.dtype, (static_cast<int>(random_() % 129) - 64) / 32.0f);
    for (int64_t i = 0; i < c.tokens * c.top_k; ++i) {
      ids_[i] = static_cast<int32_t>(random_() % (c.experts + 1)) - 1;
      weights_[i] = static_cast<float>(random_() % 9) / 4 - 1;
    }
  }

  void run(Isa isa, char* y) const {
    Moe m{c.tokens, c.top_k, c.experts, c.intermediate, c.dtype, c.sums() ? DType::f32 : c.dtype, c.activations,
          x_.data(), stride_, w13.experts(), w2.experts(), activation, weights_.data(), ids_.data(), y};
    moe(m, isa, pool_of(c.threads));
  }

  /// Result and permitted deviation of a token.
  std::vector<std::array<double, 2>> expected(int64_t t) const {
    std::vector<std::array<double, 2>> y(static_cast<size_t>(c.hidden), {0, 1e-3});
    std::vector<double> x;
    for (int64_t h = 0; h < c.hidden; ++h) x.push_back(load(x_.data() + (t * stride_ + h) * size(), c.dtype));
    for (int64_t s = 0; s < c.top_k; ++s) {
      const int64_t e = ids_.data()[t * c.top_k + s];
      if (e < 0) continue;
      std::vector<double> h;
      for (int64_t i = 0; i < c.intermediate; ++i)
        h.push_back(apply(w13.product(e, i, x), activation.gated() ? w13.product(e, c.intermediate + i, x) : 0));
      for (int64_t n = 0; n < c.hidden; ++n) {
        const double out = weights_.data()[t * c.top_k + s] * w2.product(e, n, h);
        y[static_cast<size_t>(n)][0] += out;
        // Where activations are kept, bf16 rounds h and y; where not, 8 bits round x and h.
        y[static_cast<size_t>(n)][1] += 0.03 * (std::fabs(out) + 1);
      }
    }
    return y;
  }

  int64_t size() const { return dtype_size(c.dtype); }
  const MoeCase c;
  const Activation activation;

 private:
  double apply(double g, double u) const {
    const double a = activation.alpha, b = activation.beta, limit = activation.limit;
    const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    const auto gelu = [](double v) { return v / 2 * std::erfc(-v / std::sqrt(2.0)); };
    const auto gelu_tanh = [&](double v) { return v * sigmoid(1.5957691216 * (v + 0.044715 * v * v * v)); };
    const double within = std::clamp(u, -limit, limit), positive = std::max(g, 0.0);
    switch (c.kind) {
      case ActivationKind::swiglu: return std::min(g, limit) * sigmoid(a * std::min(g, limit)) * (within + b);
      case ActivationKind::swiglustep: return std::min(g * sigmoid(g), limit) * within;
      case ActivationKind::situ: return a * std::tanh(g / a) * sigmoid(g) * b * std::tanh(u / b);
      case ActivationKind::gelu: return gelu(g) * u;
      case ActivationKind::gelu_tanh: return gelu_tanh(g) * u;
      case ActivationKind::silu_no_mul: return g * sigmoid(g);
      case ActivationKind::gelu_no_mul: return gelu(g);
      case ActivationKind::gelu_tanh_no_mul: return gelu_tanh(g);
      case ActivationKind::relu2_no_mul: return positive * positive;
    }
    return 0;
  }

  std::mt19937 random_{7};
  int64_t stride_ = c.hidden + 3;
  ExpertWeights w13, w2;
  Guarded<char> x_{((c.tokens - 1) * stride_ + c.hidden) * size(), c.edge};
  Guarded<int32_t> ids_{c.tokens * c.top_k, c.edge};
  Guarded<float> weights_{c.tokens * c.top_k, c.edge};
};

}  // namespace test
