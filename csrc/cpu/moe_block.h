// SPDX-License-Identifier: Apache-2.0
// Activations and the weighted sum over experts, for `B` of avx2.h or avx512.h. Internal linkage, see gemm_kernel.h.
#pragma once

#include "moe_isa.h"

namespace turbo::cpu {
namespace {

/// Elementary functions in fp32, within 24 units in the last place of the result (in gelu's tails, 48).
template <class B>
struct VectorMath {
  using Vec = typename B::Vec;
  static Vec c(float v) { return B::set1(v); }

  /// e^x: 0 is 1e-38, infinite from 88.3 on, so that what is divided by it vanishes; NaN stays. x = n ln 2 + r, then
  /// a polynomial in r of degree 6.
  static Vec exp(Vec whole) {
    // The second operand comes through where one is NaN.
    const Vec x = B::max(c(-87.3f), B::min(c(88.3f), whole));
    const Vec n = B::round(B::mul(x, c(1.44269504f)));
    Vec r = B::fnma(n, c(0.693359375f), x);
    r = B::fnma(n, c(-2.12194440e-4f), r);
    Vec p = c(1.0f / 720);
    p = B::fma(p, r, c(1.0f / 120));
    p = B::fma(p, r, c(1.0f / 24));
    p = B::fma(p, r, c(1.0f / 6));
    p = B::fma(p, r, c(0.5f));
    p = B::fma(B::mul(r, r), p, B::add(r, c(1)));
    return B::select_below(c(88.3f), whole, c(__builtin_inff()), B::scale2(p, n));
  }

  /// x * sigmoid(alpha * x)
  static Vec swish(Vec x, Vec alpha) {
    return B::div(x, B::add(c(1), exp(B::mul(B::sub(B::zero(), x), alpha))));
  }
  static Vec silu(Vec x) { return swish(x, c(1)); }
  static Vec tanh(Vec x) {
    // 2 sigmoid(2x) - 1 loses digits near 0, where x - x^3/3 + 2x^5/15 - 17x^7/315 has them.
    const Vec far = B::sub(B::div(c(2), B::add(c(1), exp(B::mul(c(-2), x)))), c(1));
    const Vec s = B::mul(x, x);
    Vec p = c(-17.0f / 315);
    p = B::fma(p, s, c(2.0f / 15));
    p = B::fma(p, s, c(-1.0f / 3));
    const Vec near = B::fma(B::mul(s, x), p, x);
    return B::select_below(s, c(0.0225f), near, far);
  }

  /// x * Phi(x). Phi(x) = erfc(-x / sqrt 2) / 2, and erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z/2) for z >= 0: a
  /// Chebyshev fit (Press et al., Numerical Recipes, section 6.2) with a relative error below 1.2e-7; exp and the
  /// sum in its argument make it 2^-19 far out, where the result is small.
  static Vec gelu(Vec x) {
    const Vec z = B::mul(B::abs(x), c(0.707106781f));
    const Vec t = B::div(c(2), B::add(c(2), z));
    static constexpr float kFit[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                     -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
    Vec p = c(kFit[0]);
    for (int i = 1; i < 10; ++i) p = B::fma(p, t, c(kFit[i]));
    const Vec tail = B::mul(B::mul(t, c(0.5f)), exp(B::fnma(z, z, p)));  // Phi(-|x|)
    return B::mul(x, B::select_below(x, B::zero(), tail, B::sub(c(1), tail)));
  }
  /// x / 2 * (1 + tanh(v)) = x * sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3).
  static Vec gelu_tanh(Vec x) {
    const Vec twice = B::mul(B::mul(x, c(1.59576912f)), B::fma(B::mul(x, x), c(0.044715f), c(1)));
    return B::div(x, B::add(c(1), exp(B::sub(B::zero(), twice))));
  }
};

template <class B>
struct MoeBlock {
  using Vec = typename B::Vec;
  using Math = VectorMath<B>;
  static constexpr int64_t kLanes = B::kLanes;

  template <ActivationKind Kind>
  static Vec apply(const Activation& a, Vec g, Vec u) {
    const Vec limit = B::set1(a.limit);
    // The second operand comes through where one is NaN.
    const auto within = [&](Vec v) { return B::max(B::set1(-a.limit), B::min(limit, v)); };
    switch (Kind) {
      case ActivationKind::swiglu:
        return B::mul(Math::swish(B::min(limit, g), B::set1(a.alpha)), B::add(within(u), B::set1(a.beta)));
      case ActivationKind::swiglustep: return B::mul(B::min(limit, Math::silu(g)), within(u));
      case ActivationKind::situ: {
        const Vec alpha = B::set1(a.alpha), beta = B::set1(a.beta);
        const Vec one = B::div(B::set1(1), B::add(B::set1(1), Math::exp(B::sub(B::zero(), g))));
        const Vec gate = B::mul(B::mul(alpha, Math::tanh(B::div(g, alpha))), one);
        return B::mul(gate, a.beta > 0 ? B::mul(beta, Math::tanh(B::div(u, beta))) : u);
      }
      case ActivationKind::gelu: return B::mul(Math::gelu(g), u);
      case ActivationKind::gelu_tanh: return B::mul(Math::gelu_tanh(g), u);
      case ActivationKind::silu_no_mul: return Math::silu(g);
      case ActivationKind::gelu_no_mul: return Math::gelu(g);
      case ActivationKind::gelu_tanh_no_mul: return Math::gelu_tanh(g);
      case ActivationKind::relu2_no_mul: break;
    }
    const Vec positive = B::max(B::zero(), g);
    return B::mul(positive, positive);
  }

  template <ActivationKind Kind>
  static void activate_as(const Activation& a, const float* block, int64_t rows, int64_t tiles, DType dtype,
                          char* h, int64_t h_bytes, int64_t count) {
    constexpr bool kGated = Kind < ActivationKind::silu_no_mul;
    constexpr int64_t kStep = kGated ? 2 : 1;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = block + r * kBlockChannels;
      char* to = h + r * h_bytes;
      int64_t left = count;
      for (int64_t tile = 0; tile < tiles; tile += kStep)
        for (int64_t lane = 0; lane < kTileN && left > 0; lane += kLanes) {
          const float* gate = from + tile * kTileN + lane;
          const Vec g = B::load_floats(gate), u = kGated ? B::load_floats(gate + kTileN) : g;
          const int width = static_cast<int>(left < kLanes ? left : kLanes);
          B::store_y(dtype, to, apply<Kind>(a, g, u), width);
          to += width * dtype_size(dtype);
          left -= width;
        }
    }
  }

  static void activate(const Activation& a, const float* block, int64_t rows, int64_t tiles, DType dtype, char* h,
                       int64_t h_bytes, int64_t count) {
    using K = ActivationKind;
    static constexpr decltype(&activate) kKinds[] = {
        activate_as<K::swiglu>,      activate_as<K::swiglustep>,  activate_as<K::situ>,
        activate_as<K::gelu>,        activate_as<K::gelu_tanh>,   activate_as<K::silu_no_mul>,
        activate_as<K::gelu_no_mul>, activate_as<K::gelu_tanh_no_mul>, activate_as<K::relu2_no_mul>,
    };
    kKinds[static_cast<int>(a.kind)](a, block, rows, tiles, dtype, h, h_bytes, count);
  }

  static void accumulate(const float* block, int64_t rows, const int32_t* token, const float* weight, float* total,
                         int64_t stride, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = total + token[r] * stride;
      const float* from = block + r * kBlockChannels;
      const Vec w = B::set1(weight[r]);
      for (int64_t c = 0; c < count; c += kTileN)
        for (int64_t lane = c; lane < c + kTileN; lane += kLanes)
          B::store_floats(to + lane, B::fma(w, B::load_floats(from + lane), B::load_floats(to + lane)));
    }
  }

  static void store(const float* total, DType dtype, char* y, int64_t count) {
    for (int64_t c = 0; c < count; c += kLanes) {
      const int width = static_cast<int>(count - c < kLanes ? count - c : kLanes);
      B::store_y(dtype, y + c * dtype_size(dtype), B::load_floats(total + c), width);
    }
  }

  static constexpr MoeIsa kTable{activate, accumulate, store};
};

}  // namespace
}  // namespace turbo::cpu
