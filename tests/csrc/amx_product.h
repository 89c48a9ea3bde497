// SPDX-License-Identifier: Apache-2.0
// One product on tiles: simulated in amx_simulator_test.cpp, on the processor in amx_processor.cpp.
#pragma once

#include "amx.h"

namespace test {

enum class TileDot { bf16, s8s8, u8s8 };

/// C [rows, lanes] += A [rows, depth] * B [depth, lanes], all of dwords without gaps.
struct TileProduct {
  TileDot dot;
  int rows, depth, lanes;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t* c;
};

/// Whether the processor has the instructions and Linux lets this process use them.
bool processor_has_tiles();

void multiply_on_processor(const TileProduct& p);

namespace {

/// The product by the tile_* functions of this translation unit. The numbers of the tiles are arbitrary.
inline void multiply_on_tiles(const TileProduct& p) {
  using namespace turbo::cpu;
  constexpr int kC = 5, kA = 7, kB = 0;
  TileConfig config;
  const auto set = [&](int tile, int rows, int dwords) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(4 * dwords);
  };
  set(kC, p.rows, p.lanes);
  set(kA, p.rows, p.depth);
  set(kB, p.depth, p.lanes);
  tile_configure(config);
  tile_load<kC>(p.c, 4 * p.lanes);
  tile_load<kA>(p.a, 4 * p.depth);
  tile_load<kB>(p.b, 4 * p.lanes);
  switch (p.dot) {
    case TileDot::bf16: tile_dot_bf16<kC, kA, kB>(); break;
    case TileDot::s8s8: tile_dot_s8s8<kC, kA, kB>(); break;
    case TileDot::u8s8: tile_dot_u8s8<kC, kA, kB>(); break;
  }
  tile_store<kC>(p.c, 4 * p.lanes);
  tile_release();
}

}  // namespace
}  // namespace test
