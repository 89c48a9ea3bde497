// SPDX-License-Identifier: Apache-2.0
// Routed experts between guard pages, against the plain double reference, on every instruction set that this
// processor has. gemm_test.cpp runs it.
#include "moe_test.h"

#include "checks.h"
#include "moe_problem.h"

namespace test {
namespace {

constexpr int kKinds = static_cast<int>(std::size(kActivationNames));

void run_case(const MoeCase& c) {
  const MoeProblem problem(c);
  if (!problem.pack_stayed_inside()) fail("pack writes outside: " + c.name(Isa::none));
  std::vector<std::vector<Bounded>> want;
  for (int64_t t = 0; t < c.tokens; ++t) want.push_back(problem.expected(t));
  on_every_isa([&](Isa isa) {
    Guarded<char> y(c.tokens * c.hidden * problem.size(), c.edge);
    std::memset(y.data(), 0xFF, y.size());  // NaN in every dtype
    problem.run(isa, y.data());
    if (!y.canary_intact()) fail("writes outside of y: " + c.name(isa));
    int64_t sharp = 0;  // elements that would show an error of 1 %
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t n = 0; n < c.hidden; ++n) {
        const Bounded one = want[t][n];
        const double got = load(y.data() + (t * c.hidden + n) * problem.size(), c.dtype);
        ++checks;
        sharp += std::fabs(got - 1.01 * one.value) > one.off;
        if (std::fabs(got - one.value) <= one.off) continue;
        char text[120];
        std::snprintf(text, sizeof text, ": y[%" PRId64 "][%" PRId64 "] = %g, expected %g +- %g", t, n, got, one.value,
                      one.off);
        return fail(c.name(isa) + text);
      }
    if (sharp == 0) fail("1 % would not be seen: " + c.name(isa));
  });
}

/// Calls run(mode) for those that experts have: activations that are integers are symmetric.
template <class Run>
void on_every_mode(const Run& run) {
  for (const Mode& mode : kModes)
    if (mode.x_symmetric) run(mode);
}

}  // namespace

void test_moe_shapes() {
  // Hidden, intermediate, group: one dword, odd groups, no whole tiles, more than a block, channels of no whole dword.
  static constexpr std::array<std::array<int64_t, 3>, 6> kFour = {
      {{8, 8, 8}, {40, 24, 8}, {72, 24, 24}, {96, 136, 8}, {37, 20, 0}, {130, 33, 0}}};
  static constexpr std::array<std::array<int64_t, 3>, 6> kEight = {
      {{4, 4, 4}, {40, 24, 4}, {36, 60, 12}, {96, 136, 8}, {37, 21, 0}, {130, 33, 0}}};
  int turn = 0;
  on_every_mode([&](const Mode& mode) {
    for (const int64_t tokens : {1, 2, 3, 9, 40})
      for (const auto& [hidden, intermediate, group] : mode.bits == 4 ? kFour : kEight) {
        const DType dtype = static_cast<DType>((turn + turn / 6) % 3);
        run_case({mode,
                  tokens,
                  1 + turn % 4,
                  1 + turn % 5,
                  hidden,
                  intermediate,
                  group,
                  dtype,
                  mode.scale_dtype(dtype, turn / 5),
                  mode.zero_points() && turn % 2 == 0,
                  turn % 3 != 1,
                  static_cast<ActivationKind>((turn + turn / 9) % kKinds),
                  turn % 5 < 2 ? Edge::begin : Edge::end,
                  turn % 7 == 0 ? 5 : turn % 7 == 1 ? 2 : 1,
                  turn % 4 == 3 ? 3 : 0});
        ++turn;
      }
  });
}

void test_moe_threads() {
  int turn = 0;
  on_every_mode([&](const Mode& mode) {
    for (const int64_t tokens : {1, 5, 60}) {
      const DType dtype = static_cast<DType>((turn + tokens) % 3);
      MoeCase c{mode,      tokens, 3,    5,    100, 136, 0, dtype, mode.scale_dtype(dtype, turn), mode.zero_points(),
                tokens > 1, ActivationKind::swiglu, Edge::end, 1, 0};
      const MoeProblem alone(c);
      c.threads = 5;
      const MoeProblem shared(c);
      const int64_t bytes = tokens * c.hidden * alone.size();
      on_every_isa([&](Isa isa) {
        std::vector<char> want(bytes), first(bytes), second(bytes);
        alone.run(isa, want.data());
        std::thread other([&] { shared.run(isa, first.data()); });
        shared.run(isa, second.data());
        other.join();
        checks += 2;
        if (want != first || want != second) fail("not the same on several threads: " + c.name(isa));
      });
    }
    ++turn;
  });
}

}  // namespace test
