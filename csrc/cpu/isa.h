// SPDX-License-Identifier: Apache-2.0
// The instruction sets that kernels exist for, and what this processor can run.
#pragma once

#include <string_view>

namespace turbo::cpu {

/// In the order of preference, worst first. The VNNI ones differ from those before them for 8-bit activations
/// only, avx512bf16 (which implies VNNI) from avx512vnni for 16-bit ones only. amx has bf16 and int8 tiles.
enum class Isa : int { none = 0, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx };
inline constexpr int kIsas = 7;

/// Whether processor and operating system support it (cpuid and XCR0), and, for amx, let this process use it: the first
/// call asks for that, for all threads.
bool isa_supported(Isa isa);

/// Why amx is not supported on a processor that has it; "" where it is, or where the processor lacks it.
const char* amx_problem();

/// Whether the processor also permutes bytes (AVX-512 VBMI), as all but the first with BF16 do.
bool has_vbmi();

/// The vectors that `isa` computes with where it has no instructions of its own: for amx the widest, else `isa`.
Isa vector_isa(Isa isa);

/// Best supported one: the last, but for avx512bf16 where its dot is the slower one.
Isa best_isa();

/// The name above; "none" where no kernel can run.
const char* isa_name(Isa isa);

/// Inverse of isa_name; Isa::none for every other text.
Isa isa_from_name(std::string_view name);

}  // namespace turbo::cpu
