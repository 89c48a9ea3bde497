// SPDX-License-Identifier: Apache-2.0
// Whether this process may use AMX: Linux grants the state of tiles, 8 KiB a thread, only to those who ask.
#pragma once

#include <string>

namespace turbo::cpu {

/// Whether the processor has tiles, bf16 products and int8 products (cpuid).
bool has_amx();

/// As the system call arch_prctl(code, feature): 0, or -1 with errno.
using ArchPrctl = long (*)(long code, long feature);

/// Asks for all threads of the process. "" where it is granted, else why not.
std::string ask_for_tiles(ArchPrctl ask);

/// The answer to this process, which asks once, and only on a processor that has AMX.
const std::string& tiles_refused();

}  // namespace turbo::cpu
