// SPDX-License-Identifier: Apache-2.0
// The simulator of AMX tiles against a scalar reference in exact arithmetic, and against the processor where it has
// them. gemm_test.cpp runs it.
#ifndef TM_AMX_SIMULATOR
#define TM_AMX_SIMULATOR
#endif

#include "amx_simulator_test.h"

#include <immintrin.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cinttypes>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "amx_product.h"
#include "checks.h"
#include "guarded.h"
#include "half_types.h"

namespace test {
namespace {

using namespace turbo::cpu;

// ---- the reference ----

/// What the inputs have met: without each of these, a wrong simulator could pass.
struct Met {
  int64_t subnormal_input, flushed, rounded_out_of_subnormal, overflow, tie, invalid, quieted;
};
Met met;

bool is_nan(uint32_t v) { return (v & 0x7FFFFFFF) > 0x7F800000; }

/// An fp32 operand; subnormal ones are 0 of the same sign.
double operand(uint32_t v) {
  const bool subnormal = (v & 0x7F800000) == 0 && (v & 0x007FFFFF) != 0;
  met.subnormal_input += subnormal;
  return float_of(subnormal ? v & 0x80000000 : v);
}

/// x + y in double rounded to odd, from which the next rounding to 24 bits is that of the exact sum. All finite fp32
/// and products of bf16 are exact in double, far from its limits.
double add_to_odd(double x, double y) {
  const double sum = x + y, of_y = sum - x, error = (x - (sum - of_y)) + (y - of_y);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if (!std::isfinite(sum) || error == 0 || bits & 1) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

/// The nearest fp32, halves to even; what is still below the normal numbers with 24 bits becomes 0.
uint32_t nearest_f32(double v) {
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint64_t below = bits & 0x1FFFFFFF;
  met.tie += std::isfinite(v) && below == 0x10000000;
  bits += 0x0FFFFFFF + (bits >> 29 & 1);
  bits &= ~uint64_t{0x1FFFFFFF};
  double rounded;
  std::memcpy(&rounded, &bits, sizeof bits);
  const uint32_t sign = std::signbit(v) ? 0x80000000 : 0;
  if (std::fabs(rounded) > FLT_MAX) {
    met.overflow += std::isfinite(v);
    return sign | 0x7F800000;
  }
  if (std::fabs(rounded) < FLT_MIN) {
    met.flushed += v != 0;
    return sign;
  }
  met.rounded_out_of_subnormal += std::fabs(v) < FLT_MIN;
  return bits_of(static_cast<float>(rounded));
}

/// a * b + c, a and b of bf16. The NaN that a comes with goes before b's, and that before c's.
uint32_t reference_fma(uint32_t a, uint32_t b, uint32_t c) {
  for (const uint32_t v : {a, b, c})
    if (is_nan(v)) {
      met.quieted += !(v & 0x00400000);
      return v | 0x00400000;
    }
  const double sum = add_to_odd(operand(a) * operand(b), operand(c));
  met.invalid += std::isnan(sum);
  return std::isnan(sum) ? 0xFFC00000 : nearest_f32(sum);
}

uint32_t reference_add(uint32_t a, uint32_t b) { return reference_fma(a, 0x3F800000, b); }

void reference(const TileProduct& p) {
  for (int row = 0; row < p.rows; ++row)
    for (int lane = 0; lane < p.lanes; ++lane) {
      uint32_t& c = p.c[row * p.lanes + lane];
      uint32_t even = 0, odd = 0;
      for (int k = 0; k < p.depth; ++k) {
        const uint32_t a = p.a[row * p.depth + k], b = p.b[k * p.lanes + lane];
        if (p.dot == TileDot::bf16) {
          even = reference_fma(a << 16, b << 16, even);
          odd = reference_fma(a >> 16 << 16, b >> 16 << 16, odd);
          continue;
        }
        for (int shift = 0; shift < 32; shift += 8) {
          const int x = static_cast<int>(a >> shift & 255), y = static_cast<int8_t>(b >> shift);
          c += static_cast<uint32_t>((p.dot == TileDot::s8s8 && x > 127 ? x - 256 : x) * y);
        }
      }
      if (p.dot == TileDot::bf16) c = reference_add(c, reference_add(even, odd));
    }
}

// ---- products ----

using Random = std::mt19937;

uint32_t below(Random& random, uint32_t count) { return static_cast<uint32_t>(random() % count); }

/// fp32 of a random sign and significand; bf16 has its upper half.
uint32_t number(Random& random, int low, int high) {
  const uint32_t exponent = static_cast<uint32_t>(127 + low) + below(random, static_cast<uint32_t>(high - low + 1));
  return (static_cast<uint32_t>(random()) & 0x807FFFFF) | exponent << 23;
}

enum class Kind { moderate, underflow, least, overflow, cancel, ties, special, any, count };
const char* const kKindNames[] = {"moderate", "underflow", "least", "overflow", "cancel", "ties", "special", "any"};

uint32_t input(Random& random, Kind kind, bool of_b) {
  static constexpr uint32_t kSpecial[] = {0,          0x80000000, 0x7F800000, 0xFF800000, 0x7FC10000, 0xFFC20000,
                                          0x7F830000, 0xFF840000, 0x00010000, 0x807F0000, 0x00800000, 0x7F7F0000};
  switch (kind) {
    case Kind::moderate:
    case Kind::cancel: return number(random, -8, 8);
    case Kind::underflow: return below(random, 8) ? number(random, -66, -60) : number(random, -127, -120);
    case Kind::least:  // products of about the least normal number and of half a last place of it
      if (!of_b) return number(random, -126, -126) & 0xFF810000;
      return below(random, 2) ? 0x3F800000 : number(random, -26, -24) & 0xFF800000;
    case Kind::overflow: return number(random, 60, 64);
    case Kind::ties: return number(random, -13, 0) & 0xFF810000;
    case Kind::special: return below(random, 24) ? number(random, -8, 8) : kSpecial[below(random, std::size(kSpecial))];
    default: return static_cast<uint32_t>(random());
  }
}

/// What C holds before: of the size of the products.
uint32_t addend(Random& random, Kind kind) {
  switch (kind) {
    case Kind::underflow: return below(random, 4) ? number(random, -127, -118) : random() & 0x80000000;
    case Kind::least: return number(random, -126, -125) & 0xFF800000;
    case Kind::overflow: return number(random, 120, 127);
    case Kind::ties: return number(random, -4, 24);
    default: return input(random, kind, false);
  }
}

/// The tensors of a product.
struct Data {
  Data(Random& random, Kind kind, int rows, int depth, int lanes) : a(rows * depth), b(depth * lanes), c(rows * lanes) {
    const auto half = [&](bool of_b) { return input(random, kind, of_b) >> 16; };
    const auto pair = [&](bool of_b) { return half(of_b) | half(of_b) << 16; };
    for (uint32_t& v : a) v = pair(false);
    for (uint32_t& v : b) v = pair(true);
    for (uint32_t& v : c) v = addend(random, kind);
    if (kind != Kind::cancel) return;
    // Products of odd k are about those of even k with the other sign, and later ones about those before.
    for (size_t i = 0; i < a.size(); ++i) a[i] = (a[i] & 0xFFFF) | (a[i] ^ 0x8000 ^ below(random, 2)) << 16;
    for (size_t i = 0; i < b.size(); ++i) b[i] = (b[i] & 0xFFFF) | b[i] << 16;
    for (int row = 0; row < rows; ++row)
      for (int k = 1; k < depth; k += 2) a[row * depth + k] = a[row * depth + k - 1] ^ 0x80008000 ^ below(random, 2);
    for (int k = 1; k < depth; k += 2) std::copy_n(&b[(k - 1) * lanes], lanes, &b[k * lanes]);
  }
  std::vector<uint32_t> a, b, c;
};

void check_product(const char* with, void (*multiply)(const TileProduct&), Random& random, TileDot dot, Kind kind,
                   int rows, int depth, int lanes) {
  const Data data(random, kind, rows, depth, lanes);
  std::vector<uint32_t> want = data.c, got = data.c;
  multiply({dot, rows, depth, lanes, data.a.data(), data.b.data(), want.data()});
  multiply_on_tiles({dot, rows, depth, lanes, data.a.data(), data.b.data(), got.data()});
  checks += static_cast<int64_t>(want.size());
  const auto at = std::mismatch(want.begin(), want.end(), got.begin()).first - want.begin();
  if (at == static_cast<int64_t>(want.size())) return;
  static constexpr const char* kDots[] = {"bf16", "s8s8", "u8s8"};
  char text[200];
  std::snprintf(text, sizeof text, "AMX simulator: %s %s, %d rows, %d dwords, %d lanes: C[%d][%d] is %08x, by %s %08x",
                kDots[static_cast<int>(dot)], kKindNames[static_cast<int>(kind)], rows, depth, lanes,
                static_cast<int>(at) / lanes, static_cast<int>(at) % lanes, got[at], with, want[at]);
  fail(text);
}

/// All shapes with inputs of some kind; the largest with each kind.
void check_products(const char* with, void (*multiply)(const TileProduct&)) {
  Random random(1);
  for (const TileDot dot : {TileDot::bf16, TileDot::s8s8, TileDot::u8s8}) {
    const uint32_t kinds = static_cast<uint32_t>(Kind::count);
    for (int rows = 1; rows <= 16; ++rows)
      for (int depth = 1; depth <= 16; ++depth)
        for (int lanes = 1; lanes <= 16; ++lanes) {
          const Kind kind = dot == TileDot::bf16 ? static_cast<Kind>(below(random, kinds)) : Kind::any;
          check_product(with, multiply, random, dot, kind, rows, depth, lanes);
        }
    for (uint32_t i = 0; i < 20 * kinds; ++i)
      check_product(with, multiply, random, dot, static_cast<Kind>(i % kinds), 16, 16, 16);
  }
}

/// Results of a Xeon (family 6, model 207), since the reference may share an error with the simulator.
void check_known() {
  constexpr uint16_t kOne = 0x3F80, kInf = 0x7F80, kMinusInf = 0xFF80, kMin = 0x0080;
  struct Known {
    uint16_t a[4], b[4];  // even and odd k in turn
    uint32_t c, want;
  };
  static constexpr Known kKnown[] = {
      // 2^-126 less 2^-151 is halfway between two numbers of 24 bits, and normal after rounding.
      {{kMin, 0, 0x8D80, 0}, {kOne, 0, 0x2600, 0}, 0, 0x00800000},
      {{kMin, 0, 0x8D81, 0}, {kOne, 0, 0x2600, 0}, 0, 0},
      {{kMin, 0, 0x8D80, 0}, {kOne, 0, 0x2700, 0}, 0, 0},
      // Zeros: sums begin with +0, and a flushed one keeps its sign.
      {{0x8000, 0x8000, 0x8000, 0x8000}, {kOne, kOne, kOne, kOne}, 0x80000000, 0},
      {{0, 0, 0x9FFF, 0x9FFF}, {0, 0, 0x2000, 0x2000}, 0x80000000, 0x80000000},
      {{0x9FFF, 0x9FFF, 0, 0}, {0x2000, 0x2000, 0, 0}, 0x80000000, 0},
      {{0, 0, 0, 0}, {0, 0, 0, 0}, 0x00700001, 0},
      {{0, 0, 0, 0}, {0, 0, 0, 0}, 0x80000001, 0},
      // Even and odd k are apart: 1 + 2^-24 - 1 in one sum is 0, in two it is 2^-24.
      {{kOne, 0, 0x3380, 0}, {kOne, 0, kOne, 0}, 0xBF800000, 0},
      {{kOne, 0x3380, 0xBF80, 0}, {kOne, kOne, kOne, 0}, 0, 0x33800000},
      // NaN: A's before B's before that of the sum; C's before that of the sum; of even k before odd ones.
      {{0x7F81, 0, 0, 0}, {0xFFC2, 0, 0, 0}, 0, 0x7FC10000},
      {{kOne, 0, 0, 0}, {0xFF82, 0, 0, 0}, 0, 0xFFC20000},
      {{0x7FC1, 0, 0x7F82, 0}, {kOne, 0, 0x7FC3, 0}, 0, 0x7FC20000},
      {{0x7FC1, 0, kInf, 0}, {kOne, 0, 0, 0}, 0, 0x7FC10000},
      {{kInf, 0x7FC2, 0, 0}, {0, kOne, 0, 0}, 0, 0xFFC00000},
      {{0x7FC1, 0x7F82, 0, 0}, {kOne, kOne, 0, 0}, 0xFF812345, 0xFFC12345},
      {{kInf, 0, 0, 0}, {0x0001, 0, 0, 0}, 0, 0xFFC00000},
      {{kInf, kMinusInf, 0, 0}, {kOne, kOne, 0, 0}, 0, 0xFFC00000},
      {{kInf, 0, 0, 0}, {kOne, 0, 0, 0}, 0xFF800000, 0xFFC00000},
  };
  for (size_t i = 0; i < std::size(kKnown); ++i) {
    const Known& known = kKnown[i];
    const auto check = [&](const char* by, void (*multiply)(const TileProduct&)) {
      uint32_t a[2], b[2], c = known.c;
      std::memcpy(a, known.a, sizeof a);
      std::memcpy(b, known.b, sizeof b);
      multiply({TileDot::bf16, 1, 2, 1, a, b, &c});
      ++checks;
      char text[120];
      std::snprintf(text, sizeof text, "AMX %s: known result %zu is %08x, expected %08x", by, i, c, known.want);
      if (c != known.want) fail(text);
    };
    check("simulator", multiply_on_tiles);
    check("reference", reference);
    if (processor_has_tiles()) check("processor", multiply_on_processor);
  }
}

/// The thread's rounding and unmasked exceptions change nothing, and MXCSR gets no flags.
void check_mxcsr(const char* by, void (*multiply)(const TileProduct&)) {
  Random random(2);
  const Data data(random, Kind::any, 16, 16, 16);
  std::vector<uint32_t> want = data.c;
  reference({TileDot::bf16, 16, 16, 16, data.a.data(), data.b.data(), want.data()});
  const unsigned old = _mm_getcsr();
  for (const unsigned mxcsr : {0x1F80u, 0x0000u, 0x2000u, 0x4000u, 0x6000u, 0xFFC0u}) {
    std::vector<uint32_t> got = data.c;
    _mm_setcsr(mxcsr);
    multiply({TileDot::bf16, 16, 16, 16, data.a.data(), data.b.data(), got.data()});
    const unsigned after = _mm_getcsr();
    _mm_setcsr(old);
    checks += 2;
    if (got != want) fail(std::string("AMX ") + by + ": results depend on MXCSR");
    if (after != mxcsr) fail(std::string("AMX ") + by + ": MXCSR has changed");
  }
}

// ---- loads, stores, faults, threads ----

/// All tiles, of 16 rows of 64 bytes.
TileConfig full() {
  TileConfig config;
  std::fill_n(config.rows, 8, uint8_t{16});
  std::fill_n(config.row_bytes, 8, uint16_t{64});
  return config;
}

/// Rows of a tile with gaps between them, forwards and backwards: no byte of the gaps is read or written.
void check_rows() {
  for (const Edge edge : {Edge::begin, Edge::end})
    for (int rows = 1; rows <= 16; ++rows)
      for (int bytes = 4; bytes <= 64; bytes += 4)
        for (const int64_t gap : {0, 12}) {
          TileConfig config = full();
          config.rows[6] = static_cast<uint8_t>(rows);
          config.row_bytes[6] = static_cast<uint16_t>(bytes);
          const int64_t stride = bytes + gap, last = (rows - 1) * stride;
          Guarded<uint8_t> from(last + bytes, edge), to(last + bytes, edge), zeros(last + bytes, edge);
          for (int64_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(i * 7 + 1);
          tile_configure(config);
          tile_load<6>(from.data() + last, -stride);
          tile_store<6>(to.data(), stride);
          tile_zero<6>();
          tile_store<6>(zeros.data(), stride);
          tile_release();
          bool right = to.canary_intact() && zeros.canary_intact();
          for (int64_t i = 0; i < to.size(); ++i) {
            const bool inside = i % stride < bytes;
            right &= to[i] == (inside ? from[last - i / stride * stride + i % stride] : 0xA5);
            right &= zeros[i] == (inside ? 0 : 0xA5);
          }
          ++checks;
          if (!right) fail("AMX simulator: rows of " + std::to_string(bytes) + " bytes, " + std::to_string(rows));
        }
}

/// Runs in a child, which must print this line and nothing else on stderr, and abort.
void check_fault(const std::string& line, void (*run)()) {
  ++checks;
  int ends[2];
  if (pipe(ends) != 0) return fail("AMX simulator: pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    run();
    _exit(0);
  }
  close(ends[1]);
  std::string printed;
  char text[512];
  for (ssize_t count; (count = read(ends[0], text, sizeof text)) > 0;) printed.append(text, count);
  close(ends[0]);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return fail("AMX simulator: fork");
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) fail("AMX simulator: did not abort: " + line);
  if (printed != "AMX simulator: " + line + "\n") fail("AMX simulator: expected " + line + ", got " + printed);
}

alignas(64) uint8_t buffer[1024];

template <class Edit>
void configure_edited(const Edit& edit) {
  TileConfig config = full();
  edit(config);
  tile_configure(config);
}

/// Gives tile T another shape than the others' 16 rows of 64 bytes.
template <int T>
void reshape(int rows, int bytes) {
  TileConfig config = full();
  config.rows[T] = static_cast<uint8_t>(rows);
  config.row_bytes[T] = static_cast<uint16_t>(bytes);
  tile_configure(config);
}

void zero_operands() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
}

void check_configuration_faults() {
  const std::string where = "tile_configure: expected ";
  check_fault(where + "palette 0 or 1, got 2", [] { configure_edited([](TileConfig& c) { c.palette = 2; }); });
  check_fault(where + "start_row 0, got 3", [] { configure_edited([](TileConfig& c) { c.start_row = 3; }); });
  check_fault(where + "reserved[13] to be 0, got 9",
              [] { configure_edited([](TileConfig& c) { c.reserved[13] = 9; }); });
  check_fault(where + "zeros for tile 8, got 1 rows of 0 bytes",
              [] { configure_edited([](TileConfig& c) { c.rows[8] = 1; }); });
  check_fault(where + "zeros for tile 15, got 0 rows of 4 bytes",
              [] { configure_edited([](TileConfig& c) { c.row_bytes[15] = 4; }); });
  check_fault(where + "at most 16 rows of 64 bytes for tile 2, got 17 of 64", [] { reshape<2>(17, 64); });
  check_fault(where + "at most 16 rows of 64 bytes for tile 7, got 16 of 65", [] { reshape<7>(16, 65); });
  check_fault(where + "rows and bytes of tile 0 to be both 0 or neither, got 0 of 64", [] { reshape<0>(0, 64); });
  check_fault(where + "rows and bytes of tile 3 to be both 0 or neither, got 16 of 0", [] { reshape<3>(16, 0); });
}

void check_use_faults() {
  check_fault("tile_zero: tile 3 is used without a configuration", [] { tile_zero<3>(); });
  check_fault("tile_load: tile 2 is used without a configuration", [] { tile_load<2>(buffer, 64); });
  check_fault("tile_store: tile 1 is used without a configuration", [] { tile_store<1>(buffer, 64); });
  check_fault("tile_dot_bf16: tile 4 is used without a configuration", [] { tile_dot_bf16<4, 5, 6>(); });
  check_fault("tile_zero: tile 3 is used without a configuration", [] {
    tile_configure(full());
    tile_release();
    tile_zero<3>();
  });
  check_fault("tile_zero: tile 3 is used without a configuration", [] {
    tile_configure(full());
    TileConfig config = full();
    config.palette = 0;
    tile_configure(config);
    tile_zero<3>();
  });
  check_fault("tile_zero: tile 3 is used without a configuration", [] {
    tile_configure(full());
    std::thread([] { tile_zero<3>(); }).join();
  });
  check_fault("tile_zero: tile 7 has no rows in the configuration", [] {
    reshape<7>(0, 0);
    tile_zero<7>();
  });
  check_fault("tile_load: tile 7 has no rows in the configuration", [] {
    reshape<7>(0, 0);
    tile_load<7>(buffer, 64);
  });
  check_fault("tile_load: expected row_bytes of tile 7 to be a multiple of 4, got 62", [] {
    reshape<7>(16, 62);
    tile_load<7>(buffer, 64);
  });
  check_fault("tile_store: expected row_bytes of tile 7 to be a multiple of 4, got 2", [] {
    reshape<7>(16, 2);
    tile_zero<7>();
    tile_store<7>(buffer, 64);
  });
  check_fault("tile_store: read of tile 6, which was never loaded or zeroed", [] {
    tile_configure(full());
    tile_store<6>(buffer, 64);
  });
  check_fault("tile_store: read of tile 6, which was never loaded or zeroed", [] {
    tile_configure(full());
    tile_zero<6>();
    tile_configure(full());
    tile_store<6>(buffer, 64);
  });
}

void check_dot_faults() {
  check_fault("tile_dot_bf16: read of tile 0, which was never loaded or zeroed", [] {
    tile_configure(full());
    tile_zero<1>();
    tile_zero<2>();
    tile_dot_bf16<0, 1, 2>();
  });
  check_fault("tile_dot_s8s8: read of tile 1, which was never loaded or zeroed", [] {
    tile_configure(full());
    tile_zero<0>();
    tile_zero<2>();
    tile_dot_s8s8<0, 1, 2>();
  });
  check_fault("tile_dot_u8s8: read of tile 2, which was never loaded or zeroed", [] {
    tile_configure(full());
    tile_zero<0>();
    tile_zero<1>();
    tile_dot_u8s8<0, 1, 2>();
  });
  check_fault("tile_dot_bf16: tile 2 has no rows in the configuration", [] {
    reshape<2>(0, 0);
    tile_zero<0>();
    tile_zero<1>();
    tile_dot_bf16<0, 1, 2>();
  });
  check_fault("tile_dot_bf16: expected as many rows of A as of C, 16, got 15", [] {
    reshape<1>(15, 64);
    zero_operands();
    tile_dot_bf16<0, 1, 2>();
  });
  check_fault("tile_dot_s8s8: expected as many rows of B as dwords of A, 15, got 16", [] {
    reshape<1>(16, 60);
    zero_operands();
    tile_dot_s8s8<0, 1, 2>();
  });
  check_fault("tile_dot_u8s8: expected row_bytes of B to be those of C, 60, got 64", [] {
    reshape<0>(16, 60);
    zero_operands();
    tile_dot_u8s8<0, 1, 2>();
  });
  check_fault("tile_dot_u8s8: expected row_bytes of tile 1 to be a multiple of 4, got 63", [] {
    reshape<1>(16, 63);
    zero_operands();
    tile_dot_u8s8<0, 1, 2>();
  });
}

/// What one thread configures and loads is not there in another.
void check_threads() {
  tile_configure(full());
  std::fill_n(buffer, sizeof buffer, uint8_t{7});
  tile_load<0>(buffer, 64);
  uint8_t other[64] = {};
  std::thread([&] {
    reshape<0>(1, 8);
    std::fill_n(other, sizeof other, uint8_t{9});
    tile_zero<0>();
    tile_store<0>(other, 64);
    tile_release();
  }).join();
  uint8_t mine[1024] = {};
  tile_store<0>(mine, 64);
  tile_release();
  checks += 2;
  if (std::memcmp(mine, buffer, sizeof mine) != 0) fail("AMX simulator: a thread changes another's tiles");
  if (std::count(other, other + 64, 0) != 8) fail("AMX simulator: a thread has another's configuration");
}

}  // namespace

void test_amx_simulator() {
  check_products("the reference", reference);
  for (const int64_t times : {met.subnormal_input, met.flushed, met.rounded_out_of_subnormal, met.overflow, met.tie,
                              met.invalid, met.quieted}) {
    ++checks;
    if (times == 0) fail("AMX simulator: the products do not meet every case of rounding");
  }
  check_known();
  check_mxcsr("simulator", multiply_on_tiles);
  check_rows();
  check_configuration_faults();
  check_use_faults();
  check_dot_faults();
  check_threads();
}

void test_amx_simulator_against_processor() {
  if (!processor_has_tiles()) {
    // Not "skipped" at the start of a line: test_csrc.py takes that for the whole program.
    std::printf("note: 1 test skipped, of the AMX simulator against the processor: no AMX here\n");
    return;
  }
  check_products("the processor", multiply_on_processor);
  check_mxcsr("processor", multiply_on_processor);
}

}  // namespace test
