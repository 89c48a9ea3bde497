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
