// SPDX-License-Identifier: Apache-2.0
// The part of the test program that runs routed experts.
#pragma once

namespace test {

/// All schemes, activations and shapes against the plain reference.
void test_moe_shapes();

/// The same bits from one thread, from several, and from callers that run at the same time.
void test_moe_threads();

}  // namespace test
