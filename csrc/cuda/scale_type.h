// SPDX-License-Identifier: Apache-2.0
// Scales of weights whose dtype is known at run time.
#pragma once

#include "device.h"
#include "linear.h"

namespace turbo::cuda {

/// Element `index` of scales of a type, as a float.
TM_DEVICE float load_scale(ScaleType type, const void* scale, int64_t index) {
  if (type == ScaleType::f32) return load_global(static_cast<const float*>(scale) + index);
  return to_float(Half16{type == ScaleType::bf16}, load_global(static_cast<const uint16_t*>(scale) + index));
}

}  // namespace turbo::cuda
