// SPDX-License-Identifier: Apache-2.0
// What stands between the two products of an expert, for every device.
#pragma once

namespace turbo {

/// In fp32. g and u are the two halves of the first product; "no mul" experts have no u.
enum class ActivationKind : int {
  swiglu,            ///< g' * sigmoid(alpha * g') * (u' + beta), g' = min(g, limit), u' = u within +-limit
  swiglustep,        ///< min(silu(g), limit) * (u within +-limit)
  situ,              ///< alpha * tanh(g / alpha) * sigmoid(g) * (beta > 0 ? beta * tanh(u / beta) : u)
  gelu,              ///< gelu(g) * u, with erf
  gelu_tanh,         ///< gelu(g) * u, with tanh
  silu_no_mul,       ///< silu(g)
  gelu_no_mul,       ///< gelu(g), with erf
  gelu_tanh_no_mul,  ///< gelu(g), with tanh
  relu2_no_mul,      ///< max(g, 0) squared
};
inline constexpr const char* kActivationNames[] = {
    "swiglu",      "swiglustep",       "situ",         "gelu", "gelu_tanh", "silu_no_mul",
    "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul",
};

struct Activation {
  ActivationKind kind;
  float alpha, beta, limit;
  bool gated() const { return kind < ActivationKind::silu_no_mul; }
};

}  // namespace turbo
