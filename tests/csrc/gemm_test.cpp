// SPDX-License-Identifier: Apache-2.0
// The products, the packer and the bench's loops between guard pages, against a plain double reference, on
// every instruction set that this processor has. Built with sanitizers by test_csrc.py.
//
// Usage: gemm_test [threads]   "threads" runs only what concerns several threads.
#include <cerrno>

#include "amx_permission.h"
#include "amx_simulator_test.h"
#include "checks.h"
#include "gemm_problem.h"
#include "machine_limits.h"
#include "moe_test.h"
#include "quantize_weights_test.h"

namespace {

using namespace test;

void check_result(const Problem& problem, Isa isa, const char* y) {
  const Layout& l = problem.layout;
  const int64_t rows = problem.c.rows;
  // Large results are sampled: the plain reference is slow. Borders are always looked at.
  const int64_t step = rows * l.n * l.k > 300'000 ? 7 : 1;
  for (int64_t m = 0; m < rows; ++m) {
    if (m % step && m != rows - 1) continue;
    for (int64_t n = 0; n < l.n; ++n) {
      if (n % step && n != l.n - 1) continue;
      const auto [want, allowed] = problem.expected(m, n);
      const double got = load(y + (m * l.n + n) * problem.size(), problem.c.dtype);
      ++checks;
      if (std::fabs(got - want) <= allowed) continue;
      char text[120];
      std::snprintf(text, sizeof text, ": y[%" PRId64 "][%" PRId64 "] = %g, expected %g +- %g", m, n,
                    got, want, allowed);
      return fail(problem.c.name(isa) + text);
    }
  }
}

void run_case(const Case& c) {
  Problem problem(c);
  if (!problem.pack_stayed_inside()) fail("pack writes outside: " + c.name(Isa::none));
  on_every_isa([&](Isa isa) {
    Guarded<char> y(c.rows * c.n * problem.size(), c.edge);
    std::memset(y.data(), 0xFF, y.size());  // NaN in every dtype
    problem.run(isa, y.data());
    if (!y.canary_intact()) fail("writes outside of y: " + c.name(isa));
    check_result(problem, isa, y.data());
  });
}

/// K and groups: one dword, odd groups, groups beyond any unrolling, channels without whole dwords.
using Widths = std::vector<std::array<int64_t, 2>>;
const Widths& widths_of(const Mode& mode) {
  static const Widths four = {{8, 1}, {24, 3}, {72, 3}, {64, 2}, {272, 2}, {384, 1}, {1, 1}, {20, 1}, {100, 1}, {333, 1}};
  static const Widths eight = {{4, 1}, {12, 3}, {60, 3}, {64, 2}, {200, 2}, {384, 1}, {1, 1}, {7, 1}, {102, 1}, {333, 1}};
  static const Widths channel = {{4, 1}, {12, 1}, {1, 1}, {2, 1}, {3, 1}, {17, 1}, {64, 1}, {102, 1}, {333, 1}, {1024, 1}};
  return mode.bytes() ? channel : mode.bits == 4 ? four : eight;
}

/// The width of the codes on disk: the kernel's own, narrower ones, 0 for bytes.
int64_t code_bits(const Mode& mode, int turn) {
  if (mode.bytes() || mode.code == Code::e4m3) return 0;
  if (mode.code == Code::e2m1) return turn % 2 ? 0 : 4;
  static constexpr int64_t kFour[] = {4, 3, 0, 4, 2}, kEight[] = {8, 5, 0, 7, 6};
  return mode.bits == 4 ? kFour[turn % 5] : kEight[turn % 5];
}

void test_shapes() {
  const std::array<int64_t, 13> rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 129, 513};
  const std::array<int64_t, 8> channels = {1, 7, 15, 16, 17, 48, 65, 129};
  // Every mode with every (rows, K); the other axes turn with strides that have no common factor.
  int turn = 0;
  for (const Mode& mode : kModes) {
    const Widths& widths = widths_of(mode);
    for (size_t r = 0; r < rows.size(); ++r)
      for (size_t i = 0; i < widths.size(); ++i, ++turn) {
        const auto [k, groups] = widths[i];
        const DType dtype = static_cast<DType>((turn + r) % 3);
        const int64_t bits = code_bits(mode, turn);
        run_case({mode,
                  rows[r],
                  channels[(r + 3 * i + turn / 7) % channels.size()],
                  k,
                  groups,
                  bits,
                  dtype,
                  mode.scale_dtype(dtype, turn / 3),
                  mode.zero_points() && bits != 0 && turn % 2 == 0,
                  turn % 3 == 0,
                  turn % 5 < 2 ? Edge::begin : Edge::end,
                  turn % 7 == 0 ? 5 : turn % 7 == 1 ? 2 : 1,
                  turn % 4 == 3 ? 3 : 0});
      }
  }
}

/// Codes whose K is cut into parts for many rows.
void test_long_rows() {
  for (const Mode& mode : kModes)
    if (mode.bytes())
      run_case({mode, 13, 70, 4500, 1, 0, DType::bf16, mode.scale_dtype(DType::bf16, 0), false, true, Edge::end, 2, 0});
}

/// The same bits from one thread, from several, and from callers that run at the same time.
void test_threads() {
  for (const Mode& mode : kModes)
    for (int type = 0; type < 3; ++type)
      for (const int64_t rows : {1, 4, 40}) {
        const DType dtype = static_cast<DType>(type);
        Case c{mode, rows, 100, 256, mode.bytes() ? 1 : 4, code_bits(mode, 0), dtype,
               mode.scale_dtype(dtype, type), mode.zero_points(), true, Edge::end, 1, 0};
        Problem alone(c);
        c.threads = 5;
        Problem shared(c);
        const int64_t bytes = rows * c.n * alone.size();
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
}

void test_machine_limits() {
  for (const int64_t bytes : {0, 1, 7, 8, 63, 64, 65, 511, 512, 513, 4096, 5000}) {
    for (const Edge edge : {Edge::begin, Edge::end}) {
      Guarded<unsigned char> buffer(bytes, edge);
      uint64_t want = 0;
      for (int64_t i = 0; i < bytes; ++i) {
        buffer[i] = static_cast<unsigned char>(i * 37 + 11);
        want += static_cast<uint64_t>(buffer[i]) << (8 * (i % 8));
      }
      ++checks;
      if (read_lines(buffer.data(), bytes) != want)
        fail("read_lines of " + std::to_string(bytes) + " bytes");
    }
  }
  for (const DotKind kind : {DotKind::bf16, DotKind::int8, DotKind::fma32, DotKind::amx_bf16, DotKind::amx_int8,
                             DotKind::amx_bf16_l2, DotKind::amx_int8_l2}) {
    ++checks;
    if (dot_loop(kind, 20) != 2 * dot_loop(kind, 10)) fail("dot_loop does not scale");
  }
}

/// A system that forbids tiles, as a container may: the reason is told.
void test_amx_permission() {
  checks += 2;
  if (!ask_for_tiles([](long, long) -> long { return 0; }).empty()) fail("tiles that were granted count as refused");
  const std::string refused = ask_for_tiles([](long code, long feature) -> long {
    errno = code == 0x1023 && feature == 18 ? EPERM : EINVAL;
    return -1;
  });
  if (refused.find("arch_prctl: Operation not permitted") == std::string::npos)
    fail("no reason for refused tiles: " + refused);
}

}  // namespace

int main(int argc, char** argv) {
  if (best_isa() == Isa::none) {
    std::printf("skipped: this processor has no AVX2 with FMA and F16C\n");
    return 0;
  }
  const bool threads_only = argc > 1 && std::string(argv[1]) == "threads";
  test_threads();
  test_moe_threads();
  if (!threads_only) {
    test_amx_simulator();
    test_amx_simulator_against_processor();
    test_shapes();
    test_long_rows();
    test_moe_shapes();
    test_machine_limits();
    test_amx_permission();
    test_quantize_weights();
  }
  std::printf("%" PRId64 " checks, %d failures, up to %s\n", checks, failures,
              isa_name(best_isa()));
  return failures ? 1 : 0;
}
