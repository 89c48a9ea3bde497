// SPDX-License-Identifier: Apache-2.0
// The functions between the two products of an expert, in fp32 and within 24 units in the last place (in gelu's tails,
// 48), as the CPU has them. What is not a number stays so.
#pragma once

#include "../cpu/activation_kind.h"
#include "device.h"

namespace turbo::cuda {

/// x * sigmoid(alpha * x)
TM_DEVICE float swish(float x, float alpha) { return divide(x, add(1.0f, exponential(-multiply(x, alpha)))); }

TM_DEVICE float at_most(float v, float limit) { return v > limit ? limit : v; }
TM_DEVICE float within(float v, float limit) { return v < -limit ? -limit : at_most(v, limit); }

/// x * Phi(x)
TM_DEVICE float gelu(float x) { return multiply(multiply(0.5f, x), erf_complement(multiply(x, -0.707106781f))); }

/// x / 2 * (1 + tanh(v)) = x * sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3).
TM_DEVICE float gelu_tanh(float x) {
  const float twice = multiply(multiply(x, 1.59576912f), multiply_add(multiply(x, x), 0.044715f, 1.0f));
  return divide(x, add(1.0f, exponential(-twice)));
}

TM_DEVICE float situ(const Activation& a, float g, float u) {
  const float gate = multiply(multiply(a.alpha, hyperbolic_tangent(divide(g, a.alpha))), divide(1.0f, add(1.0f, exponential(-g))));
  return multiply(gate, a.beta > 0 ? multiply(a.beta, hyperbolic_tangent(divide(u, a.beta))) : u);
}

/// h of a gate g and an up u; without ups u is not looked at.
TM_DEVICE float activated(const Activation& a, float g, float u) {
  switch (a.kind) {
    case ActivationKind::swiglu: return multiply(swish(at_most(g, a.limit), a.alpha), add(within(u, a.limit), a.beta));
    case ActivationKind::swiglustep: return multiply(at_most(swish(g, 1.0f), a.limit), within(u, a.limit));
    case ActivationKind::situ: return situ(a, g, u);
    case ActivationKind::gelu: return multiply(gelu(g), u);
    case ActivationKind::gelu_tanh: return multiply(gelu_tanh(g), u);
    case ActivationKind::silu_no_mul: return swish(g, 1.0f);
    case ActivationKind::gelu_no_mul: return gelu(g);
    case ActivationKind::gelu_tanh_no_mul: return gelu_tanh(g);
    case ActivationKind::relu2_no_mul: break;
  }
  const float positive = g < 0 ? 0.0f : g;
  return multiply(positive, positive);
}

}  // namespace turbo::cuda
