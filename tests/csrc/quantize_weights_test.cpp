// SPDX-License-Identifier: Apache-2.0
#include "quantize_weights_test.h"

#include <random>

#include "checks.h"
#include "guarded.h"
#include "half_types.h"
#include "pool.h"
#include "quantize_weights.h"

namespace test {
namespace {

using namespace turbo::cpu;

/// Weights are multiples of 1/8 up to 2, so every dtype holds them; scales are fp32.
struct Case {
  int64_t n, k, group;
  DType dtype;
  int bits;
  WeightRange range;
  bool packed;
  Edge edge;
};

void check_case(const Case& c) {
  const int64_t size = dtype_size(c.dtype), groups = c.k / c.group;
  Guarded<char> weight(c.n * c.k * size, c.edge);
  Guarded<char> codes(c.n * c.k * (c.packed ? c.bits : 8) / 8, c.edge);
  Guarded<float> scale(c.n * groups, c.edge);
  Guarded<int8_t> zero(c.n * groups, c.edge);
  std::mt19937 random(7);
  for (int64_t i = 0; i < c.n * c.k; ++i)
    store(weight.data() + i * size, c.dtype, static_cast<float>(static_cast<int>(random() % 33) - 16) / 8);
  const bool asymmetric = c.range == WeightRange::asymmetric;
  const QuantizeWeights args{weight.data(), c.dtype, c.n, c.k, c.group, c.bits, c.range, c.packed, DType::f32,
                             codes.data(), scale.data(), asymmetric ? zero.data() : nullptr};
  if (quantize_weights_avx2(args, pool<3>()) != -1) fail("quantize_weights: finite weights called otherwise");
  const int offset = 1 << (c.bits - 1);
  for (int64_t i = 0; i < c.n * c.k; ++i, ++checks) {
    const int64_t g = i / c.k * groups + i % c.k / c.group;
    const float value = static_cast<float>(load(weight.data() + i * size, c.dtype));
    const float exact = std::nearbyint(value / scale[g]) + static_cast<float>(asymmetric ? zero[g] : 0);
    const int code = static_cast<int>(std::clamp(exact, static_cast<float>(-offset), offset - 1.0f));
    const auto* bytes = reinterpret_cast<const uint8_t*>(codes.data());
    const int stored = c.packed && c.bits == 4 ? bytes[i / 2] >> i % 2 * 4 & 15 : bytes[i];
    const int found = c.packed ? stored - offset : static_cast<int8_t>(stored);
    if (found != code) fail("quantize_weights: code " + std::to_string(found) + ", not " + std::to_string(code));
    // Every weight lies within its group's range: one and a half steps off would be a wrong scale.
    const float back = static_cast<float>(code - (asymmetric ? zero[g] : 0)) * scale[g];
    if (!(std::fabs(back - value) <= 1.01f * std::fabs(scale[g]))) fail("quantize_weights: a scale is wrong");
  }
  if (!codes.canary_intact() || !scale.canary_intact() || !zero.canary_intact())
    fail("quantize_weights: written beside an output");
}

void check_not_finite() {
  Guarded<float> weight(5 * 16, Edge::end);
  Guarded<int8_t> codes(5 * 16, Edge::end);
  Guarded<float> scale(5 * 2, Edge::end);
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i);
  weight[3 * 16 + 15] = INFINITY;
  weight[4 * 16] = NAN;
  const QuantizeWeights args{weight.data(), DType::f32, 5, 16, 8, 4, WeightRange::centred, false, DType::f32,
                             codes.data(), scale.data(), nullptr};
  ++checks;
  if (quantize_weights_avx2(args, pool<2>()) != 3) fail("quantize_weights: the first row that is not finite is 3");
}

}  // namespace

void test_quantize_weights() {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    for (const int bits : {4, 8})
      for (const WeightRange range : {WeightRange::centred, WeightRange::signed_, WeightRange::asymmetric})
        for (const bool packed : {false, true})
          for (const Edge edge : {Edge::begin, Edge::end}) {
            check_case({3, 40, 8, dtype, bits, range, packed, edge});
            check_case({5, 240, 120, dtype, bits, range, packed, edge});
            check_case({1, 96, 96, dtype, bits, range, packed, edge});
          }
  check_not_finite();
}

}  // namespace test
