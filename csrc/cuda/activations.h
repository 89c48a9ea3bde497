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

/// A thread's part in bringing slabs of the rows from first_row on to shared memory; zeros where x ends.
template <class Tile>
class ActivationLoader {
 public:
  TM_DEVICE ActivationLoader(const Rows16& in, int first_row, int thread)
      : in_(in), row_(first_row + thread / kRowChunks), k_(thread % kRowChunks * 8), thread_(thread),
        from_(in.x + row_ * in.stride + k_), place_(chunk_offset(thread / kRowChunks, thread % kRowChunks)) {}

  /// Starts to bring slab `slab` to the tile at `to`.
  TM_DEVICE void load(int slab, uint32_t to) const {
    const int k = slab * kSlabK + k_;
    if (!in_.vectors) return gather(k, to);
    const int left = in_.k - k < 8 ? in_.k - k : 8;
    share<kChunks, Tile::kThreads>(thread_, [&](int, int j) {
      const bool inside = row_ + j * kStepRows < in_.rows && left > 0;
      cp_async_16(to + place(j), inside ? from_ + j * kStepRows * in_.stride + slab * kSlabK : in_.x,
                  inside ? 2 * left : 0);
    });
  }

 private:
  static constexpr int kChunks = Tile::kRows * kRowChunks;
  static constexpr int kStepRows = Tile::kThreads / kRowChunks;
  static_assert(kStepRows % 8 == 0);

  /// The rows of a thread's chunks are a multiple of 8 apart: their places in a row are the same.
  TM_DEVICE uint32_t place(int j) const { return place_ + static_cast<uint32_t>(j * kStepRows * kRowBytes); }

  /// Element by element, for rows that start anywhere. Slow, and so kept small.
  TM_DEVICE void gather(int k, uint32_t to) const {
    TM_NO_UNROLL
    for (int i = 0; thread_ + i / 8 * Tile::kThreads < kChunks; ++i) {
      const int j = i / 8, e = i % 8;
      const bool inside = row_ + j * kStepRows < in_.rows && k + e < in_.k;
      const uint16_t x = inside ? load_global(from_ + j * kStepRows * in_.stride + k - k_ + e) : 0;
      store_shared_16(to + place(j) + static_cast<uint32_t>(2 * e), x);
    }
  }

  const Rows16& in_;
  int row_, k_, thread_;
  const uint16_t* from_;
  uint32_t place_;
};

/// Reads B fragments from a tile of x, which begins at a multiple of 128 bytes.
template <class Tile>
class ColumnReader {
 public:
  /// Columns of eight rows of x that one ldmatrix brings; where a warp has one, it brings two steps of it.
  static constexpr int kAtOnce = Tile::kColumns == 1 ? 1 : 2;

  TM_DEVICE explicit ColumnReader(const Place<Tile>& place) {
    const int matrix = place.lane / 8, row = place.first_row() + place.lane % 8;
    first_ = kAtOnce == 1 ? chunk_offset(row, matrix) : chunk_offset(row + 8 * (matrix / 2), matrix % 2);
  }

  /// b = the fragments of step `step` (16 k) of the warp's columns from `column` on. Steps come in ascending order;
  /// both are known while compiling.
  TM_DEVICE void read(uint32_t from, int step, int column, uint32_t (&b)[kAtOnce][2]) {
    // Step s has the chunks 2s and 2s + 1, and a chunk's place is its number, changed in the bits of r % 8.
    const uint32_t at = (from + first_) ^ static_cast<uint32_t>(2 * step * kChunkBytes);
    if constexpr (kAtOnce == 1) {
      if (step % 2 == 0) ldmatrix_x4(read_, at);
      b[0][0] = read_[step % 2 * 2];
      b[0][1] = read_[step % 2 * 2 + 1];
    } else {
      ldmatrix_x4(read_, at + static_cast<uint32_t>(8 * column * kRowBytes));
      TM_UNROLL
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = read_[i];
    }
  }

 private:
  uint32_t first_;
  uint32_t read_[4] = {};
};

}  // namespace turbo::cuda
