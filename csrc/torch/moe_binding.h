// SPDX-License-Identifier: Apache-2.0
// What the bindings of routed experts share, whatever the device.
#pragma once

#include <iterator>

#include "../cpu/activation_kind.h"
#include "binding.h"

namespace turbo::binding {

inline Activation activation_of(const char* op, const std::string& name, double alpha, double beta, double limit) {
  for (size_t i = 0; i < std::size(kActivationNames); ++i)
    if (name == kActivationNames[i])
      return {static_cast<ActivationKind>(i), static_cast<float>(alpha), static_cast<float>(beta),
              static_cast<float>(limit)};
  std::string known;
  for (const char* one : kActivationNames) known += (known.empty() ? "" : ", ") + std::string(one);
  STD_TORCH_CHECK(false, op, ": argument 'activation': expected one of {", known, "}, given '", name, "'");
  return {};
}

}  // namespace turbo::binding

/// The parameters that all ops of experts begin with; `Third`: what a product has beside weights and scales, Tensor or
/// MaybeTensor.
#define TM_MOE_PARAMETERS(Third)                                                                                  \
  Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13, Tensor w13_scale, Third w13_third, MaybeTensor w13_bias, \
      Tensor w2, Tensor w2_scale, Third w2_third, MaybeTensor w2_bias, int64_t intermediate_size,                  \
      std::string activation, double alpha, double beta, double limit, MaybeTensor expert_map
#define TM_MOE_ARGUMENTS                                                                                      \
  x, topk_weights, topk_ids, w13, w13_scale, w13_third, w13_bias, w2, w2_scale, w2_third, w2_bias, intermediate_size, \
      activation, alpha, beta, limit, expert_map
