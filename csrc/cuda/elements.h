// SPDX-License-Identifier: Apache-2.0
// Small types that hosts and devices share.
#pragma once

#include <cstdint>

namespace turbo::cuda {

/// Names of element types, to choose functions by.
struct F16 {};
struct BF16 {};
/// Signed bytes.
struct S8 {};

/// One of the two, known at run time: where a kernel for each would be too many.
struct Half16 {
  bool bf16;
};

inline const char* type_name(F16) { return "f16"; }
inline const char* type_name(BF16) { return "bf16"; }

struct alignas(8) Vec2 {
  uint32_t v[2];
};
struct alignas(16) Vec4 {
  uint32_t v[4];
};

}  // namespace turbo::cuda
