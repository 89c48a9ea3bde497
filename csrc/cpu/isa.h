// SPDX-License-Identifier: Apache-2.0
// The instruction sets that kernels exist for, and what this processor can run.
#pragma once

#include <string_view>

namespace turbo::cpu {

/// Ordered: each value can run everything that a smaller one can.
enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

/// Best of the above that processor and operating system support (cpuid and XCR0).
Isa best_isa();

/// "avx2", "avx512", "avx512bf16"; "none" where no kernel can run.
const char* isa_name(Isa isa);

/// Inverse of isa_name; Isa::none for every other text.
Isa isa_from_name(std::string_view name);

}  // namespace turbo::cpu
