// SPDX-License-Identifier: Apache-2.0
// Simulates the tile instructions of amx.h, which includes this file, on a processor with AVX2 and FMA. The results are
// the processor's bit for bit, which amx_simulator_test.cpp checks. What faults there prints a line here and aborts.
//
// Two faults are the simulator's alone: a start_row other than 0, and a read of a tile before it is loaded or zeroed.
#pragma once

#include <immintrin.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace turbo::cpu {

/// The tile registers of a thread. Not in an unnamed namespace: all translation units share them.
namespace tile_registers {

struct Tile {
  uint16_t row_bytes;
  uint8_t rows;
  bool written;  // since the configuration
  alignas(64) uint8_t bytes[16][64];
};
struct Registers {
  bool configured;
  Tile tiles[8];
};
inline constinit thread_local Registers registers = {};

}  // namespace tile_registers

namespace {
namespace tile_simulator {

using tile_registers::registers;
using tile_registers::Tile;

[[noreturn, gnu::format(printf, 1, 2)]] inline void fault(const char* format, ...) {
  char text[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "AMX simulator: %s\n", text);
  std::abort();
}

inline Tile& configured_tile(const char* where, int t) {
  if (!registers.configured) fault("%s: tile %d is used without a configuration", where, t);
  if (registers.tiles[t].rows == 0) fault("%s: tile %d has no rows in the configuration", where, t);
  return registers.tiles[t];
}

/// For all instructions but tile_zero, which alone takes rows of any length.
inline Tile& tile_of_dwords(const char* where, int t) {
  Tile& tile = configured_tile(where, t);
  if (tile.row_bytes % 4 != 0)
    fault("%s: expected row_bytes of tile %d to be a multiple of 4, got %d", where, t, tile.row_bytes);
  return tile;
}

inline Tile& tile_to_read(const char* where, int t) {
  Tile& tile = tile_of_dwords(where, t);
  if (!tile.written) fault("%s: read of tile %d, which was never loaded or zeroed", where, t);
  return tile;
}

struct DotTiles {
  Tile& c;
  const Tile& a;
  const Tile& b;
};

inline DotTiles dot_tiles(const char* where, int c, int a, int b) {
  const DotTiles t{tile_to_read(where, c), tile_to_read(where, a), tile_to_read(where, b)};
  const int dwords = t.a.row_bytes / 4;
  if (t.a.rows != t.c.rows) fault("%s: expected as many rows of A as of C, %d, got %d", where, t.c.rows, t.a.rows);
  if (dwords != t.b.rows) fault("%s: expected as many rows of B as dwords of A, %d, got %d", where, dwords, t.b.rows);
  if (t.b.row_bytes != t.c.row_bytes)
    fault("%s: expected row_bytes of B to be those of C, %d, got %d", where, t.c.row_bytes, t.b.row_bytes);
  return t;
}

// An attribute, because files without -mavx2 include this one too.
#define TM_TILE_TARGET [[gnu::target("avx2,fma")]]

inline constexpr int kLanes = 8;  // a row of C or B is two vectors

TM_TILE_TARGET inline __m256i load_lanes(const Tile& tile, int row, int lane) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.bytes[row] + 4 * lane));
}
/// Lanes beyond the tile's row_bytes stay 0.
TM_TILE_TARGET inline void store_lanes(Tile& tile, int row, int lane, __m256i v) {
  const int bytes = tile.row_bytes - 4 * lane;
  if (bytes > 0) std::memcpy(tile.bytes[row] + 4 * lane, &v, bytes < 32 ? bytes : 32);
}

/// Sets MXCSR to what the tile instructions compute by: nearest even, subnormals are 0, exceptions are masked. Restores
/// the thread's own with its flags, since those instructions neither read nor write it.
class ScopedMxcsr {
 public:
  ScopedMxcsr() {
    asm volatile("stmxcsr %0" : "=m"(old_));
    set(0x9FC0);
  }
  ~ScopedMxcsr() { set(old_); }
  ScopedMxcsr(const ScopedMxcsr&) = delete;
  ScopedMxcsr& operator=(const ScopedMxcsr&) = delete;

 private:
  static void set(uint32_t mxcsr) { asm volatile("ldmxcsr %0" ::"m"(mxcsr)); }
  uint32_t old_;
};

TM_TILE_TARGET inline __m256i nan_lanes(__m256i v) {
  return _mm256_cmpgt_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0x7FFFFFFF)), _mm256_set1_epi32(0x7F800000));
}

/// Replaces NaNs: a result is the first operand that is NaN, made quiet, or 0xFFC00000 if none is. Chosen here, not by
/// the instruction: vfmadd132, vfmadd213 and vfmadd231 order their operands differently.
TM_TILE_TARGET inline __m256i with_nan_of(__m256i result, __m256i first, __m256i second, __m256i third) {
  const __m256i nan = nan_lanes(result);
  if (_mm256_testz_si256(nan, nan)) return result;
  const __m256i quiet = _mm256_set1_epi32(0x00400000), operands[] = {third, second, first};
  __m256i chosen = _mm256_set1_epi32(static_cast<int>(0xFFC00000));
  for (int i = 0; i < 3; ++i)
    chosen = _mm256_blendv_epi8(chosen, _mm256_or_si256(operands[i], quiet), nan_lanes(operands[i]));
  return _mm256_blendv_epi8(result, chosen, nan);
}

// Volatile assembler for all that reads MXCSR: compilers keep its order, but may move an intrinsic past ScopedMxcsr.
TM_TILE_TARGET inline __m256i fma(__m256i a, __m256i b, __m256i sum) {
  __m256i result = sum;
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(result) : "x"(a), "x"(b));
  return with_nan_of(result, a, b, sum);
}
TM_TILE_TARGET inline __m256i add(__m256i a, __m256i b) {
  __m256i result;
  asm volatile("vaddps %2, %1, %0" : "=x"(result) : "x"(a), "x"(b));
  return with_nan_of(result, a, b, b);
}

TM_TILE_TARGET inline void dot_bf16(const DotTiles& t) {
  const ScopedMxcsr mxcsr;
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  for (int row = 0; row < t.c.rows; ++row)
    for (int lane = 0; lane < 2 * kLanes; lane += kLanes) {
      __m256i even = _mm256_setzero_si256(), odd = even;
      for (int k = 0; k < t.b.rows; ++k) {
        int32_t pair;
        std::memcpy(&pair, t.a.bytes[row] + 4 * k, 4);
        const __m256i a = _mm256_set1_epi32(pair), b = load_lanes(t.b, k, lane);
        even = fma(_mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16), even);
        odd = fma(_mm256_and_si256(a, upper), _mm256_and_si256(b, upper), odd);
      }
      store_lanes(t.c, row, lane, add(load_lanes(t.c, row, lane), add(even, odd)));
    }
}

template <bool UnsignedA>
TM_TILE_TARGET inline void dot_s8(const DotTiles& t) {
  for (int row = 0; row < t.c.rows; ++row)
    for (int lane = 0; lane < 2 * kLanes; lane += kLanes) {
      __m256i sum = load_lanes(t.c, row, lane);
      for (int k = 0; k < t.b.rows; ++k)
        for (int byte = 0; byte < 4; ++byte) {
          const auto code = static_cast<uint8_t>(t.a.bytes[row][4 * k + byte]);
          const __m256i a = _mm256_set1_epi32(UnsignedA ? code : static_cast<int8_t>(code));
          const __m256i top = _mm256_slli_epi32(load_lanes(t.b, k, lane), 24 - 8 * byte);
          const __m256i b = _mm256_srai_epi32(top, 24);
          sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(a, b));
        }
      store_lanes(t.c, row, lane, sum);
    }
}

#undef TM_TILE_TARGET

/// The assembler refuses the same of the instructions.
template <int C, int A, int B>
constexpr void check_dot_tiles() {
  static_assert(0 <= C && C < 8 && 0 <= A && A < 8 && 0 <= B && B < 8, "tiles are 0 to 7");
  static_assert(C != A && C != B && A != B, "the tiles of a dot must be distinct");
}

}  // namespace tile_simulator

inline void tile_release() { tile_simulator::registers = {}; }

inline void tile_configure(const TileConfig& config) {
  using tile_simulator::fault, tile_simulator::registers;
  registers = {};
  if (config.palette == 0) return;
  if (config.palette != 1) fault("tile_configure: expected palette 0 or 1, got %d", config.palette);
  if (config.start_row != 0) fault("tile_configure: expected start_row 0, got %d", config.start_row);
  for (int i = 0; i < 14; ++i)
    if (config.reserved[i] != 0) fault("tile_configure: expected reserved[%d] to be 0, got %d", i, config.reserved[i]);
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    if (t >= 8 && (rows != 0 || bytes != 0))
      fault("tile_configure: expected zeros for tile %d, got %d rows of %d bytes", t, rows, bytes);
    if (rows > kTileRows || bytes > kTileRowBytes)
      fault("tile_configure: expected at most 16 rows of 64 bytes for tile %d, got %d of %d", t, rows, bytes);
    if ((rows == 0) != (bytes == 0))
      fault("tile_configure: expected rows and bytes of tile %d to be both 0 or neither, got %d of %d", t, rows, bytes);
    if (t >= 8) continue;
    registers.tiles[t].rows = config.rows[t];
    registers.tiles[t].row_bytes = config.row_bytes[t];
  }
  registers.configured = true;
}

template <int T>
inline void tile_zero() {
  static_assert(0 <= T && T < 8, "tiles are 0 to 7");
  tile_simulator::Tile& tile = tile_simulator::configured_tile("tile_zero", T);
  std::memset(tile.bytes, 0, sizeof tile.bytes);
  tile.written = true;
}

template <int T>
inline void tile_load(const void* p, int64_t stride) {
  static_assert(0 <= T && T < 8, "tiles are 0 to 7");
  tile_simulator::Tile& tile = tile_simulator::tile_of_dwords("tile_load", T);
  std::memset(tile.bytes, 0, sizeof tile.bytes);
  for (int i = 0; i < tile.rows; ++i)
    std::memcpy(tile.bytes[i], static_cast<const char*>(p) + i * stride, tile.row_bytes);
  tile.written = true;
}

template <int T>
inline void tile_stream(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}

inline void tile_fence() {}

template <int T>
inline void tile_store(void* p, int64_t stride) {
  static_assert(0 <= T && T < 8, "tiles are 0 to 7");
  const tile_simulator::Tile& tile = tile_simulator::tile_to_read("tile_store", T);
  for (int i = 0; i < tile.rows; ++i)
    std::memcpy(static_cast<char*>(p) + i * stride, tile.bytes[i], tile.row_bytes);
}

template <int C, int A, int B>
inline void tile_dot_bf16() {
  tile_simulator::check_dot_tiles<C, A, B>();
  tile_simulator::dot_bf16(tile_simulator::dot_tiles("tile_dot_bf16", C, A, B));
}
template <int C, int A, int B>
inline void tile_dot_s8s8() {
  tile_simulator::check_dot_tiles<C, A, B>();
  tile_simulator::dot_s8<false>(tile_simulator::dot_tiles("tile_dot_s8s8", C, A, B));
}
template <int C, int A, int B>
inline void tile_dot_u8s8() {
  tile_simulator::check_dot_tiles<C, A, B>();
  tile_simulator::dot_s8<true>(tile_simulator::dot_tiles("tile_dot_u8s8", C, A, B));
}

}  // namespace
}  // namespace turbo::cpu
