// SPDX-License-Identifier: Apache-2.0
// A tile of x in shared memory: how it gets there, and how its fragments leave.
//
// A row has the 128 bytes of one slab's k, in eight chunks of 16 bytes; chunk c of row r lies at place c ^ (r % 8), so
// that a column of chunks, which is what ldmatrix reads, touches every bank once.
#pragma once

#include "device.h"
#include "tile_shape.h"

namespace turbo::cuda {

inline constexpr int kRowBytes = 128;  // of x in shared memory
inline constexpr int kChunkBytes = 16, kRowChunks = kRowBytes / kChunkBytes;

/// Address, in a tile, of chunk `chunk` of row `row`.
TM_DEVICE uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + (chunk ^ (row & 7)) * kChunkBytes);
}

/// x [rows, k] of 16-bit elements, `stride` elements from row to row. `vectors`: every row starts at a multiple of 16
/// bytes.
struct Rows16 {
  const uint16_t* x;
  int64_t stride;
  int rows, k;
  bool vectors;
};

/// Element by element, for rows that start anywhere.
TM_DEVICE Vec4 gather_chunk(const Rows16& in, int row, int k) {
  Vec4 chunk = {};
  TM_UNROLL
  for (int i = 0; i < 8; ++i)
    if (row < in.rows && k + i < in.k)
      chunk.v[i / 2] |= static_cast<uint32_t>(load_global(in.x + row * in.stride + k + i)) << (16 * (i % 2));
  return chunk;
}

/// Starts to bring slab `slab` of the rows from first_row on to `to`; zeros where x ends.
template <class Tile>
TM_DEVICE void load_activations(const Rows16& in, int first_row, int slab, uint32_t to, int thread) {
  constexpr int kChunks = Tile::kRows * kRowChunks;
  TM_UNROLL
  for (int i = thread; i < kChunks; i += Tile::kThreads) {
    const int tile_row = i / kRowChunks, chunk = i % kRowChunks;
    const int row = first_row + tile_row, k = slab * kSlabK + chunk * 8;
    const uint32_t place = to + chunk_offset(tile_row, chunk);
    if (in.vectors) {
      const int left = row < in.rows ? in.k - k : 0;
      const bool any = left > 0;
      cp_async_16(place, any ? in.x + row * in.stride + k : in.x, any ? (left < 8 ? left * 2 : kChunkBytes) : 0);
    } else {
      store_shared_128(place, gather_chunk(in, row, k));
    }
  }
}

/// B fragments of a warp's columns.
template <class Tile>
using Columns = uint32_t[Tile::kColumns][2];

/// Reads the B fragments of one step (16 k) after the other from a tile of x.
template <class Tile>
class ColumnReader {
 public:
  TM_DEVICE explicit ColumnReader(const Place<Tile>& place) : lane_(place.lane), row_(place.first_row()) {}

  /// Steps of a slab in ascending order; `step` is known while compiling.
  TM_DEVICE void read(uint32_t from, int step, Columns<Tile>& b) {
    if constexpr (Tile::kColumns == 1) {
      // One ldmatrix brings two steps.
      if (step % 2 == 0) ldmatrix_x4(pair_, from + chunk_offset(row_ + (lane_ & 7), step * 2 + lane_ / 8));
      b[0][0] = step % 2 ? pair_[2] : pair_[0];
      b[0][1] = step % 2 ? pair_[3] : pair_[1];
    } else {
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; c += 2) {
        uint32_t d[4];
        const int row = row_ + 8 * (c + lane_ / 16) + (lane_ & 7);
        ldmatrix_x4(d, from + chunk_offset(row, 2 * step + (lane_ / 8 & 1)));
        b[c][0] = d[0];
        b[c][1] = d[1];
        b[c + 1][0] = d[2];
        b[c + 1][1] = d[3];
      }
    }
  }

 private:
  int lane_, row_;
  uint32_t pair_[4] = {};
};

}  // namespace turbo::cuda
