// SPDX-License-Identifier: Apache-2.0
// How kernels walk their share of channels and rows. Internal linkage, see gemm_kernel.h.
#pragma once

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

/// Calls body(tile, count) for runs of at most `most` channel tiles, each within one block.
template <class Body>
inline __attribute__((always_inline)) void each_run_of_tiles(const Range& tiles, int64_t most, const Body& body) {
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const int64_t block_end = (tile / kBlockTiles + 1) * kBlockTiles;
    int64_t count = (block_end < tiles.end ? block_end : tiles.end) - tile;
    if (count > most) count = most;
    body(tile, count);
    tile += count;
  }
}

/// Calls body(row tiles, their first row) for runs of row tiles of at most kRowChunk rows.
template <class Body>
inline __attribute__((always_inline)) void each_row_chunk(const PreparedX& x, const Range& row_tiles, const Body& body) {
  for (int64_t first = row_tiles.begin, last; first < row_tiles.end; first = last) {
    const int64_t top = part(x.rows, x.row_tiles, first).begin;
    for (last = first; last < row_tiles.end; ++last)
      if (part(x.rows, x.row_tiles, last).end - top > kRowChunk) break;
    body(Range{first, last}, top);
  }
}

/// body.operator()<tiles, rows>() for a register tile of at most T by R.
template <int T, int R, class Body>
inline __attribute__((always_inline)) auto with_shape(int64_t tiles, int64_t rows, const Body& body) {
  if constexpr (T > 1) {
    if (tiles < T) return with_shape<T - 1, R>(tiles, rows, body);
  }
  if constexpr (R > 1) {
    if (rows < R) return with_shape<T, R - 1>(tiles, rows, body);
  }
  return body.template operator()<T, R>();
}

}  // namespace
}  // namespace turbo::cpu
