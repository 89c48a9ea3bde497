// SPDX-License-Identifier: Apache-2.0
// The limit loops. Compiled for baseline x86-64: each function names its own instruction set, and
// the two public functions ask the processor which of them they may call.
#include "machine_limits.h"

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>
#include <vector>

#include "amx.h"
#include "isa.h"

namespace turbo::cpu {
namespace {

/// cpuid leaf 7, subleaf 1, EAX bit 4; not every compiler's __builtin_cpu_supports knows the name.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
         (eax >> 4 & 1u);
}

constexpr size_t kLine = 64;
/// Distance of the software prefetch, one small page: a little more than memory latency (about
/// 100 ns) times one core's bandwidth, and across the page ends at which hardware prefetch stops.
constexpr size_t kPrefetchBytes = 64 * kLine;
constexpr size_t kBlock = 8 * kLine;

void prefetch(const char* p) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + kPrefetchBytes),
               _MM_HINT_T0);
}

uint64_t word(const char* p, size_t bytes = 8) {
  uint64_t value = 0;
  std::memcpy(&value, p, bytes);
  return value;
}

/// Any processor, and the tail that the wide loops leave.
uint64_t read_plain(const char* p, size_t bytes) {
  uint64_t sum[4] = {};
  size_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    if (i % kLine == 0) prefetch(p + i);
    for (int j = 0; j < 4; ++j) sum[j] += word(p + i + 8 * j);
  }
  for (; i + 8 <= bytes; i += 8) sum[0] += word(p + i);
  if (i < bytes) sum[0] += word(p + i, bytes - i);
  return sum[0] + sum[1] + sum[2] + sum[3];
}

__attribute__((target("avx2"))) uint64_t read_avx2(const char* p, size_t bytes) {
  __m256i sum[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) sum[j] = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      if (j % 2 == 0) prefetch(p + i + 32 * j);
      const auto* at = reinterpret_cast<const __m256i*>(p + i + 32 * j);
      sum[j % 8] = _mm256_add_epi64(sum[j % 8], _mm256_loadu_si256(at));
    }
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_add_epi64(sum[0], sum[j]);
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum[0]);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + read_plain(p + i, bytes - i);
}

__attribute__((target("avx512f"))) uint64_t read_avx512(const char* p, size_t bytes) {
  __m512i sum[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) sum[j] = _mm512_setzero_si512();
  size_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      prefetch(p + i + kLine * j);
      sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + i + kLine * j));
    }
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) sum[0] = _mm512_add_epi64(sum[0], sum[j]);
  uint64_t lanes[8], total = 0;
  _mm512_storeu_si512(lanes, sum[0]);
  for (const uint64_t lane : lanes) total += lane;
  return total + read_plain(p + i, bytes - i);
}

/// Keeps a register's value alive and unknown to the optimizer, at no cost: sums that start alike
/// would otherwise be computed once.
#define TM_OPAQUE(reg) asm volatile("" : "+v"(reg))

// Sixteen accumulators hide latency (at most 6 cycles) times issue rate (at most 2 a cycle) and leave
// half of the 32 registers free; the sixteen registers before AVX-512 have room for twelve.
constexpr int kAccumulators = 16;
constexpr int kAccumulatorsAvx2 = 12;

// A loop is the same text for every instruction; only types, constants and the instruction differ,
// and a function with its own target attribute cannot be a template argument's caller. The operands
// are small so that no sum becomes infinite or subnormal, which some processors slow down for.
#define TM_DOT_LOOP(name, isa, type, count, zero, left, right, step, macs)      \
  __attribute__((target(isa), noinline)) int64_t name(int64_t iterations) {     \
    auto a = left;                                                              \
    auto b = right;                                                             \
    TM_OPAQUE(a);                                                               \
    TM_OPAQUE(b);                                                               \
    type sum[count];                                                            \
    _Pragma("GCC unroll 16") for (int j = 0; j < count; ++j) {                  \
      sum[j] = zero;                                                            \
      TM_OPAQUE(sum[j]);                                                        \
    }                                                                           \
    for (int64_t i = 0; i < iterations; ++i) {                                  \
      _Pragma("GCC unroll 16") for (int j = 0; j < count; ++j) {                \
        sum[j] = step(sum[j], a, b);                                            \
      }                                                                         \
    }                                                                           \
    _Pragma("GCC unroll 16") for (int j = 0; j < count; ++j) TM_OPAQUE(sum[j]); \
    return iterations * count * (macs);                                         \
  }

#define TM_FMA512(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define TM_FMA256(sum, a, b) _mm256_fmadd_ps(a, b, sum)

TM_DOT_LOOP(dot_bf16_avx512, "avx512f,avx512bf16", __m512, kAccumulators, _mm512_setzero_ps(),
            _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0F), _mm512_set1_ps(1.0F)),
            _mm512_cvtne2ps_pbh(_mm512_set1_ps(0x1p-20F), _mm512_set1_ps(-0x1p-21F)),
            _mm512_dpbf16_ps, 32)
TM_DOT_LOOP(dot_int8_avx512, "avx512f,avx512vnni", __m512i, kAccumulators, _mm512_setzero_si512(),
            _mm512_set1_epi8(3), _mm512_set1_epi8(-2), _mm512_dpbusd_epi32, 64)
TM_DOT_LOOP(dot_int8_avx2, "avx2,avxvnni", __m256i, kAccumulatorsAvx2, _mm256_setzero_si256(),
            _mm256_set1_epi8(3), _mm256_set1_epi8(-2), _mm256_dpbusd_avx_epi32, 32)
TM_DOT_LOOP(dot_fma32_avx512, "avx512f", __m512, kAccumulators, _mm512_setzero_ps(),
            _mm512_set1_ps(1.0F), _mm512_set1_ps(0x1p-20F), TM_FMA512, 16)
TM_DOT_LOOP(dot_fma32_avx2, "avx2,fma", __m256, kAccumulatorsAvx2, _mm256_setzero_ps(),
            _mm256_set1_ps(1.0F), _mm256_set1_ps(0x1p-20F), TM_FMA256, 8)

template <bool Bf16, int C, int A, int B>
void multiply_tiles() {
  if constexpr (Bf16)
    tile_dot_bf16<C, A, B>();
  else
    tile_dot_s8s8<C, A, B>();
}

// Tiles of A are half of a second-level cache of 2 MiB, those of B a sixth of a first-level one of 48 KiB.
constexpr int64_t kATiles = 1024, kBTiles = 8;

/// 16 products a round, four for each of four C tiles. `Loads`: every four products load two tiles
/// of A and two of B.
template <bool Bf16, bool Loads>
int64_t dot_tiles(int64_t iterations) {
  static_assert(kATiles % 8 == 0 && kBTiles == 8);
  // bf16 1 and 2^-20, or 3 and -2: see above.
  struct alignas(64) Tile {
    char bytes[kTileBytes];
  };
  thread_local std::vector<Tile> left, right;
  if (left.empty()) {
    Tile a, b;
    for (int64_t i = 0; i < kTileBytes; ++i) {
      a.bytes[i] = Bf16 ? (i % 2 ? 0x3F : static_cast<char>(0x80)) : 3;
      b.bytes[i] = Bf16 ? (i % 2 ? 0x35 : static_cast<char>(0x80)) : -2;
    }
    left.assign(kATiles, a);
    right.assign(kBTiles, b);
  }
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = kTileRowBytes;
    config.rows[t] = kTileRows;
  }
  tile_configure(config);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  tile_load<4>(left[0].bytes, kTileRowBytes);
  tile_load<5>(left[1].bytes, kTileRowBytes);
  tile_load<6>(right[0].bytes, kTileRowBytes);
  tile_load<7>(right[1].bytes, kTileRowBytes);
  for (int64_t i = 0; i < iterations; ++i) {
    for (int64_t step = 0; step < 4; ++step) {
      if constexpr (Loads) {
        const Tile* const a = &left[static_cast<size_t>((i * 8 + step * 2) % kATiles)];
        const Tile* const b = &right[static_cast<size_t>(step * 2)];
        tile_load<4>(a[0].bytes, kTileRowBytes);
        tile_load<5>(a[1].bytes, kTileRowBytes);
        tile_load<6>(b[0].bytes, kTileRowBytes);
        tile_load<7>(b[1].bytes, kTileRowBytes);
      }
      multiply_tiles<Bf16, 0, 4, 6>();
      multiply_tiles<Bf16, 1, 4, 7>();
      multiply_tiles<Bf16, 2, 5, 6>();
      multiply_tiles<Bf16, 3, 5, 7>();
    }
  }
  tile_release();
  return iterations * 16 * kTileRows * 16 * (Bf16 ? 32 : 64);
}

}  // namespace

uint64_t read_lines(const void* p, size_t bytes) {
  const char* const from = static_cast<const char*>(p);
  if (__builtin_cpu_supports("avx512f")) return read_avx512(from, bytes);
  if (__builtin_cpu_supports("avx2")) return read_avx2(from, bytes);
  return read_plain(from, bytes);
}

int64_t dot_loop(DotKind kind, int64_t iterations) {
  switch (kind) {
    case DotKind::bf16:
      return __builtin_cpu_supports("avx512bf16") ? dot_bf16_avx512(iterations) : 0;
    case DotKind::int8:
      if (__builtin_cpu_supports("avx512vnni")) return dot_int8_avx512(iterations);
      return has_avx_vnni() ? dot_int8_avx2(iterations) : 0;
    case DotKind::fma32: {
      if (__builtin_cpu_supports("avx512f")) return dot_fma32_avx512(iterations);
      const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
      return fma ? dot_fma32_avx2(iterations) : 0;
    }
    case DotKind::amx_bf16: return isa_supported(Isa::amx) ? dot_tiles<true, false>(iterations) : 0;
    case DotKind::amx_int8: return isa_supported(Isa::amx) ? dot_tiles<false, false>(iterations) : 0;
    case DotKind::amx_bf16_l2: return isa_supported(Isa::amx) ? dot_tiles<true, true>(iterations) : 0;
    case DotKind::amx_int8_l2: return isa_supported(Isa::amx) ? dot_tiles<false, true>(iterations) : 0;
  }
  return 0;
}

}  // namespace turbo::cpu
