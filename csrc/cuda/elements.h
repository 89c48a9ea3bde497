// SPDX-License-Identifier: Apache-2.0
// Small types that hosts and devices share.
#pragma once

#include <cstdint>

namespace turbo::cuda {

/// Names of the 16-bit floats, to choose functions by.
struct F16 {};
struct BF16 {};

inline const char* type_name(F16) { return "f16"; }
inline const char* type_name(BF16) { return "bf16"; }

struct alignas(8) Vec2 {
  uint32_t v[2];
};
struct alignas(16) Vec4 {
  uint32_t v[4];
};
struct alignas(16) Float4 {
  float v[4];
};

}  // namespace turbo::cuda
