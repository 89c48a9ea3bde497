// SPDX-License-Identifier: Apache-2.0
// The part of the test program that quantizes weights.
#pragma once

namespace test {

/// All dtypes, ranges and layouts, in exact buffers between forbidden pages, against plain arithmetic.
void test_quantize_weights();

}  // namespace test
