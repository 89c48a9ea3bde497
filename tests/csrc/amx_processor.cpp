// SPDX-License-Identifier: Apache-2.0
// The processor's own tiles, for amx_simulator_test.cpp.

// This file compares the real instructions with the simulator, which the other tests are built with.
#undef TM_AMX_SIMULATOR

#include "amx_permission.h"
#include "amx_product.h"

namespace test {

bool processor_has_tiles() { return turbo::cpu::has_amx() && turbo::cpu::tiles_refused().empty(); }

void multiply_on_processor(const TileProduct& p) { multiply_on_tiles(p); }

}  // namespace test
