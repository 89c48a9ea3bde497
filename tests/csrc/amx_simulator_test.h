// SPDX-License-Identifier: Apache-2.0
// The part of the test program that checks the simulator of AMX tiles.
#pragma once

namespace test {

/// The simulator against a scalar reference: all shapes, known results, faults, threads, MXCSR.
void test_amx_simulator();

/// The simulator against the processor's own tiles, bit for bit; skipped with a note where it has none.
void test_amx_simulator_against_processor();

}  // namespace test
