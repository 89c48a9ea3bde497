// SPDX-License-Identifier: Apache-2.0
// gemm_u4g, pack_u4g and the bench's loops between guard pages, against a plain double reference, on
// every instruction set that this processor has. Built with sanitizers by test_csrc.py.
//
// Usage: gemm_u4g_test [threads]   "threads" runs only what concerns several threads.
#include <array>
#include <cinttypes>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gemm_u4g.h"
#include "guarded.h"
#include "half_types.h"
#include "machine_limits.h"
#include "pack_u4g.h"
#include "pool.h"

namespace {

using namespace test;
using namespace turbo::cpu;

int failures = 0;
int64_t checks = 0;

void fail(const std::string& what) {
  std::printf("FAILED %s\n", what.c_str());
  if (++failures > 20) std::exit(1);
}

struct Shape {
  int64_t rows, n, k, groups;
};

struct Case {
  Shape shape;
  DType dtype;
  bool asymmetric, bias;
  Edge edge;
  int threads;
  int64_t row_gap;  // elements between rows of x
  std::string name(Isa isa) const {
    static constexpr const char* kTypes[] = {"bf16", "f16", "f32"};
    char text[200];
    std::snprintf(text, sizeof text,
                  "%s %s M=%" PRId64 " N=%" PRId64 " K=%" PRId64 " groups=%" PRId64
                  "%s%s threads=%d gap=%" PRId64 " edge=%s",
                  isa_name(isa), kTypes[static_cast<int>(dtype)], shape.rows, shape.n, shape.k,
                  shape.groups, asymmetric ? " asymmetric" : "", bias ? " bias" : "", threads,
                  row_gap, edge == Edge::begin ? "begin" : "end");
    return text;
  }
};

Parallel pool_of(int threads) {
  return threads == 1 ? pool<1>() : threads == 2 ? pool<2>() : pool<5>();
}

/// The tensors of one case, disk order and packed, each between its own guard pages.
struct Problem {
  Case c;
  LayoutU4g layout;
  int64_t size = dtype_size(c.dtype);
  int64_t x_stride = c.shape.k + c.row_gap;
  Guarded<uint32_t> codes{layout.n * layout.k8(), c.edge};
  Guarded<char> scale{layout.n * layout.groups * size, c.edge};
  Guarded<uint32_t> zeros{c.asymmetric ? ceil_div(layout.n, 8) * layout.groups : 0, c.edge};
  Guarded<char> bias{c.bias ? layout.n * size : 0, c.edge};
  Guarded<char> x{((c.shape.rows - 1) * x_stride + layout.k) * size, c.edge};
  Guarded<uint32_t> weight{layout.padded_n() * layout.k8(), c.edge};
  Guarded<char> scale_out{layout.padded_n() * layout.groups * size, c.edge};
  Guarded<uint32_t> zeros_out{c.asymmetric ? layout.padded_n() / 8 * layout.groups : 0, c.edge};

  explicit Problem(const Case& one)
      : c(one), layout{one.shape.n, one.shape.k, one.shape.groups} {
    std::mt19937 random(static_cast<uint32_t>(layout.n * 31 + layout.k));
    const int64_t range = (int64_t{1} << significand_bits(c.dtype)) - 1;
    std::uniform_int_distribution<int64_t> integer(-range, range);
    const auto number = [&] {  // exact in the dtype, in (-4, 4)
      return std::ldexp(static_cast<float>(integer(random)), 2 - significand_bits(c.dtype));
    };
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint32_t>(random());
    for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint32_t>(random());
    for (int64_t i = 0; i < layout.n * layout.groups; ++i)
      store(scale.data() + i * size, c.dtype, number());
    if (c.bias)
      for (int64_t i = 0; i < layout.n; ++i) store(bias.data() + i * size, c.dtype, number());
    std::memset(x.data(), 0xFF, x.size());  // NaN between the rows, in every dtype
    for (int64_t m = 0; m < c.shape.rows; ++m)
      for (int64_t k = 0; k < layout.k; ++k)
        store(x.data() + (m * x_stride + k) * size, c.dtype, number());
    // Poison: packing must write every element.
    for (auto* words : {&weight, &zeros_out}) std::memset(words->data(), 0xFF, words->size() * 4);
    std::memset(scale_out.data(), 0xFF, scale_out.size());
    pack_u4g({layout, codes.data(), layout.k8(), scale.data(), layout.groups, size,
              c.asymmetric ? zeros.data() : nullptr, layout.groups, weight.data(), scale_out.data(),
              c.asymmetric ? zeros_out.data() : nullptr},
             pool_of(c.threads));
    if (!weight.canary_intact() || !scale_out.canary_intact() || !zeros_out.canary_intact())
      fail("pack writes outside: " + c.name(Isa::none));
  }

  void run(Isa isa, char* y) {
    gemm_u4g({layout, c.dtype, c.shape.rows, x.data(), x_stride, weight.data(), scale_out.data(),
              c.asymmetric ? zeros_out.data() : nullptr, c.bias ? bias.data() : nullptr, y},
             isa, pool_of(c.threads));
  }

  int code(int64_t n, int64_t k) {
    return static_cast<int>(codes[n * layout.k8() + k / 8] >> (4 * (k % 8)) & 15) - 8;
  }
  int zero(int64_t n, int64_t g) {
    if (!c.asymmetric) return 0;
    return static_cast<int>(zeros[n / 8 * layout.groups + g] >> (4 * (n % 8)) & 15) - 8;
  }

  /// Result and permitted deviation of one element; the bound is that of kernels/reference.py.
  std::array<double, 2> expected(int64_t m, int64_t n) {
    const int64_t width = layout.k / layout.groups;
    double y = c.bias ? load(bias.data() + n * size, c.dtype) : 0;
    double absolute = std::fabs(y);
    for (int64_t g = 0; g < layout.groups; ++g) {
      const double step = load(scale.data() + (n * layout.groups + g) * size, c.dtype);
      const int z = zero(n, g);
      for (int64_t k = g * width; k < (g + 1) * width; ++k) {
        const double v = load(x.data() + (m * x_stride + k) * size, c.dtype);
        const int q = code(n, k);
        y += v * (q - z) * step;
        absolute += std::fabs(v * step) * (std::abs(q) + std::abs(z));
      }
    }
    const double walk = 6 * std::sqrt(static_cast<double>(width + layout.groups + 4)) * 0x1p-24;
    return {y, epsilon(c.dtype) / 2 * std::fabs(y) + 1.01 * walk * absolute + 0x1p-25};
  }
};

void check_result(Problem& problem, Isa isa, char* y) {
  const LayoutU4g& l = problem.layout;
  const int64_t rows = problem.c.shape.rows;
  // Large results are sampled: the plain reference is slow. Borders are always looked at.
  const int64_t step = rows * l.n * l.k > 2'000'000 ? 7 : 1;
  for (int64_t m = 0; m < rows; ++m) {
    if (m % step && m != rows - 1) continue;
    for (int64_t n = 0; n < l.n; ++n) {
      if (n % step && n != l.n - 1) continue;
      const auto [want, allowed] = problem.expected(m, n);
      const double got = load(y + (m * l.n + n) * problem.size, problem.c.dtype);
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
  for (int i = 1; i <= static_cast<int>(best_isa()); ++i) {
    const Isa isa = static_cast<Isa>(i);
    Guarded<char> y(c.shape.rows * c.shape.n * problem.size, c.edge);
    std::memset(y.data(), 0xFF, y.size());  // NaN in every dtype
    problem.run(isa, y.data());
    if (!y.canary_intact()) fail("writes outside of y: " + c.name(isa));
    check_result(problem, isa, y.data());
  }
}

void test_shapes() {
  // K and groups: one dword, odd groups, groups beyond a panel, channels without whole dwords.
  const std::array<std::array<int64_t, 2>, 11> widths = {{{8, 1},
                                                          {24, 3},
                                                          {72, 3},
                                                          {64, 2},
                                                          {256, 2},
                                                          {272, 2},
                                                          {384, 1},
                                                          {1, 1},
                                                          {20, 1},
                                                          {100, 1},
                                                          {333, 1}}};
  const std::array<int64_t, 13> rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 129, 513};
  const std::array<int64_t, 8> channels = {1, 7, 15, 16, 17, 48, 65, 129};
  // Every (rows, N), every (rows, K) and every (N, K); the other axes turn with a prime stride.
  int turn = 0;
  for (size_t r = 0; r < rows.size(); ++r)
    for (size_t i = 0; i < widths.size(); ++i) {
      const auto [k, groups] = widths[i];
      for (int repeat = 0; repeat < 3; ++repeat, ++turn) {
        const int64_t n = channels[(r + 3 * i + 2 * repeat + (r + i) / 5) % channels.size()];
        run_case({{rows[r], n, k, groups},
                  static_cast<DType>((turn + r) % 3),
                  turn % 2 == 0,
                  turn % 3 == 0,
                  turn % 5 < 2 ? Edge::begin : Edge::end,
                  turn % 7 == 0 ? 5 : turn % 7 == 1 ? 2 : 1,
                  turn % 4 == 3 ? 3 : 0});
      }
    }
}

/// The same bits from one thread, from several, and from callers that run at the same time.
void test_threads() {
  for (int type = 0; type < 3; ++type)
    for (int i = 1; i <= static_cast<int>(best_isa()); ++i)
      for (const int64_t rows : {1, 4, 40}) {
        const Isa isa = static_cast<Isa>(i);
        Case c{{rows, 100, 256, 4}, static_cast<DType>(type), true, true, Edge::end, 1, 0};
        Problem alone(c);
        const int64_t bytes = rows * 100 * alone.size;
        std::vector<char> want(bytes), first(bytes), second(bytes);
        alone.run(isa, want.data());
        c.threads = 5;
        Problem shared(c);
        std::thread other([&] { shared.run(isa, first.data()); });
        shared.run(isa, second.data());
        other.join();
        checks += 2;
        if (want != first || want != second) fail("not the same on several threads: " + c.name(isa));
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
  for (const DotKind kind : {DotKind::bf16, DotKind::int8, DotKind::fma32}) {
    ++checks;
    if (dot_loop(kind, 200) != 2 * dot_loop(kind, 100)) fail("dot_loop does not scale");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (best_isa() == Isa::none) {
    std::printf("skipped: this processor has no AVX2 with FMA and F16C\n");
    return 0;
  }
  const bool threads_only = argc > 1 && std::string(argv[1]) == "threads";
  test_threads();
  if (!threads_only) {
    test_shapes();
    test_machine_limits();
  }
  std::printf("%" PRId64 " checks, %d failures, up to %s\n", checks, failures,
              isa_name(best_isa()));
  return failures ? 1 : 0;
}
