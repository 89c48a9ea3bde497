// SPDX-License-Identifier: Apache-2.0
// A tile of x in shared memory: how it gets there, and how its fragments leave.
//
// A row has the bytes of one slab's k in chunks of 16 bytes: eight chunks of 16-bit elements, four of codes. Where rows
// begin, 128 bytes pass through all banks once; within them a row's chunks change places by the row's number, so that
// a column of chunks of eight rows, which is what ldmatrix reads, touches every bank once.
#pragma once

#include "device.h"
#include "tile_shape.h"

namespace turbo::cuda {

inline constexpr int kChunkBytes = 16;
inline constexpr int kBanksBytes = 128;

/// Rows of RowBytes, 128 or 64, in shared memory.
template <int RowBytes>
struct SharedRows {
  static constexpr int kChunks = RowBytes / kChunkBytes;
  static_assert(kBanksBytes % RowBytes == 0);

  /// Address, in a tile, of chunk `chunk` of row `row`.
  TM_DEVICE static uint32_t offset(int row, int chunk) {
    constexpr int kSideBySide = kBanksBytes / RowBytes;  // rows that pass through all banks together
    return static_cast<uint32_t>(row * RowBytes + (chunk ^ (row / kSideBySide % kChunks)) * kChunkBytes);
  }
};

/// x [., k] of 16-bit elements, `stride` elements from row to row. `vectors`: every row starts at a multiple of 16
/// bytes.
struct Rows16 {
  const uint16_t* x;
  int64_t stride;
  int k;
  bool vectors;
};

/// Codes of x as quantize.h writes them: rows of whole slabs, 64 bytes each.
struct Codes8 {
  const Vec4* codes;
  int slabs;

  /// The row of codes, and of what belongs to it, that row `row` of the product is.
  TM_DEVICE int source(int row) const { return row; }
};

/// The rows of a tile that a thread brings to shared memory, chunk by chunk.
template <class Tile, int RowBytes>
struct LoaderShare {
  static constexpr int kRowChunks = SharedRows<RowBytes>::kChunks;
  static constexpr int kChunks = Tile::kRows * kRowChunks;
  static constexpr int kStepRows = Tile::kThreads / kRowChunks;
  static_assert(kStepRows % 8 == 0, "the rows of a thread's chunks are a multiple of 8 apart: their places are the same");
};

/// Rows of experts: row r of the product is row sorted[r] / top_k of x, or row r itself where sorted is nullptr.
template <class Rows>
struct Routed {
  Rows rows;
  const int32_t* sorted;
  int top_k;

  TM_DEVICE int source(int row) const { return sorted ? load_global(sorted + row) / top_k : row; }
};
using RoutedRows16 = Routed<Rows16>;
using RoutedCodes8 = Routed<Codes8>;

/// A thread's part in bringing slabs of a block's rows to shared memory; zeros where they end. load(slab, to) starts to
/// bring a slab, arrive(barrier) arrives at a barrier when all that was started has come.
template <class Tile, class Source>
class ActivationLoader;

/// What x of 16-bit elements has in common, whichever row is where: `Row` gives the address of the first element of
/// k that a thread has, of its j-th row.
template <class Tile>
class Loader16 : protected LoaderShare<Tile, 128> {
 protected:
  using Share = LoaderShare<Tile, 128>;

  TM_DEVICE Loader16(const Rows16& in, const TileRows& rows, int thread)
      : in_(in), row_(rows.first + thread / Share::kRowChunks), end_(rows.end), k_(thread % Share::kRowChunks * 8),
        thread_(thread), place_(SharedRows<128>::offset(thread / Share::kRowChunks, thread % Share::kRowChunks)) {}

  template <class Row>
  TM_DEVICE void bring(int slab, uint32_t to, const Row& row) const {
    const int k = slab * kSlabK + k_, left = in_.k - k < 8 ? in_.k - k : 8;
    share<Share::kChunks, Tile::kThreads>(thread_, [&](int, int j) {
      const bool inside = is_row(j) && left > 0;
      cp_async_16(to + place(j), inside ? row(j) + slab * kSlabK : in_.x, inside ? 2 * left : 0);
    });
  }

  /// Element by element, for rows that start anywhere. Slow, and so kept small.
  template <class Row>
  TM_DEVICE void gather(int slab, uint32_t to, const Row& row) const {
    const int k = slab * kSlabK + k_;
    TM_NO_UNROLL
    for (int i = 0; thread_ + i / 8 * Tile::kThreads < Share::kChunks; ++i) {
      const int j = i / 8, e = i % 8;
      const uint16_t x = is_row(j) && k + e < in_.k ? load_global(row(j) + slab * kSlabK + e) : 0;
      store_shared_16(to + place(j) + static_cast<uint32_t>(2 * e), x);
    }
  }

  /// What was stored element by element has come.
  TM_DEVICE void arrive_at(uint32_t barrier) const {
    if (in_.vectors)
      barrier_arrive_copies(barrier);
    else
      barrier_arrive(barrier);
  }

  TM_DEVICE bool is_row(int j) const { return row_ + j * Share::kStepRows < end_; }
  TM_DEVICE uint32_t place(int j) const { return place_ + static_cast<uint32_t>(j * Share::kStepRows * 128); }

  const Rows16& in_;
  int row_, end_, k_, thread_;
  uint32_t place_;
};

template <class Tile>
class ActivationLoader<Tile, Rows16> : Loader16<Tile> {
  using Base = Loader16<Tile>;

 public:
  TM_DEVICE ActivationLoader(const Rows16& in, const TileRows& rows, int thread)
      : Base(in, rows, thread), from_(in.x + Base::row_ * in.stride + Base::k_) {}

  TM_DEVICE void load(int slab, uint32_t to) const {
    const auto row = [&](int j) { return from_ + j * Base::Share::kStepRows * Base::in_.stride; };
    if (!Base::in_.vectors) return Base::gather(slab, to, row);
    Base::bring(slab, to, row);
  }
  TM_DEVICE void arrive(uint32_t barrier) const { Base::arrive_at(barrier); }

 private:
  const uint16_t* from_;
};

template <class Tile>
class ActivationLoader<Tile, RoutedRows16> : Loader16<Tile> {
  using Base = Loader16<Tile>;

 public:
  TM_DEVICE ActivationLoader(const RoutedRows16& in, const TileRows& rows, int thread)
      : Base(in.rows, rows, thread), routed_(in) {
    TM_UNROLL
    for (int j = 0; j < kRows; ++j) source_[j] = Base::is_row(j) ? in.source(number(j)) : 0;
  }

  TM_DEVICE void load(int slab, uint32_t to) const {
    const auto from = [&](int source) { return Base::in_.x + source * Base::in_.stride + Base::k_; };
    // The slow way's j is not known while compiling, and would put the rows into memory.
    if (!Base::in_.vectors) return Base::gather(slab, to, [&](int j) { return from(routed_.source(number(j))); });
    Base::bring(slab, to, [&](int j) { return from(source_[j]); });
  }
  TM_DEVICE void arrive(uint32_t barrier) const { Base::arrive_at(barrier); }

 private:
  static constexpr int kRows = (Base::Share::kChunks + Tile::kThreads - 1) / Tile::kThreads;

  TM_DEVICE int number(int j) const { return Base::row_ + j * Base::Share::kStepRows; }

  const RoutedRows16& routed_;
  int source_[kRows];
};

template <class Tile>
class ActivationLoader<Tile, Codes8> : LoaderShare<Tile, 64> {
  using Share = LoaderShare<Tile, 64>;

 public:
  TM_DEVICE ActivationLoader(const Codes8& in, const TileRows& rows, int thread)
      : in_(in), row_(rows.first + thread / Share::kRowChunks), end_(rows.end), thread_(thread),
        from_(in.codes + int64_t{row_} * in.slabs * Share::kRowChunks + thread % Share::kRowChunks),
        place_(SharedRows<64>::offset(thread / Share::kRowChunks, thread % Share::kRowChunks)) {}

  TM_DEVICE void load(int slab, uint32_t to) const {
    share<Share::kChunks, Tile::kThreads>(thread_, [&](int, int j) {
      const bool inside = row_ + j * Share::kStepRows < end_;
      const int64_t at = (int64_t{j} * Share::kStepRows * in_.slabs + slab) * Share::kRowChunks;
      cp_async_16(to + place_ + static_cast<uint32_t>(j * Share::kStepRows * 64), inside ? from_ + at : in_.codes,
                  inside ? kChunkBytes : 0);
    });
  }
  TM_DEVICE void arrive(uint32_t barrier) const { barrier_arrive_copies(barrier); }

 private:
  const Codes8& in_;
  int row_, end_, thread_;
  const Vec4* from_;
  uint32_t place_;
};

template <class Tile>
class ActivationLoader<Tile, RoutedCodes8> : LoaderShare<Tile, 64> {
  using Share = LoaderShare<Tile, 64>;

 public:
  TM_DEVICE ActivationLoader(const RoutedCodes8& in, const TileRows& rows, int thread)
      : codes_(in.rows.codes), slabs_(in.rows.slabs), row_(rows.first + thread / Share::kRowChunks), end_(rows.end),
        thread_(thread), place_(SharedRows<64>::offset(thread / Share::kRowChunks, thread % Share::kRowChunks)) {
    TM_UNROLL
    for (int j = 0; j < kRows; ++j) source_[j] = is_row(j) ? in.source(row_ + j * Share::kStepRows) : 0;
  }

  TM_DEVICE void load(int slab, uint32_t to) const {
    share<Share::kChunks, Tile::kThreads>(thread_, [&](int, int j) {
      const int64_t at = (int64_t{source_[j]} * slabs_ + slab) * Share::kRowChunks + thread_ % Share::kRowChunks;
      cp_async_16(to + place_ + static_cast<uint32_t>(j * Share::kStepRows * 64), codes_ + at,
                  is_row(j) ? kChunkBytes : 0);
    });
  }
  TM_DEVICE void arrive(uint32_t barrier) const { barrier_arrive_copies(barrier); }

 private:
  static constexpr int kRows = (Share::kChunks + Tile::kThreads - 1) / Tile::kThreads;

  TM_DEVICE bool is_row(int j) const { return row_ + j * Share::kStepRows < end_; }

  const Vec4* codes_;
  int slabs_, row_, end_, thread_;
  uint32_t place_;
  int source_[kRows];
};

/// Reads B fragments from a tile of x, which begins at a multiple of 128 bytes. A step is 32 bytes of k.
template <class Tile, int RowBytes>
class ColumnReader {
 public:
  /// Columns of eight rows of x that one ldmatrix brings; where a warp has one, it brings two steps of it.
  static constexpr int kAtOnce = Tile::kColumns == 1 ? 1 : 2;

  TM_DEVICE explicit ColumnReader(const Place<Tile>& place) {
    const int matrix = place.lane / 8, row = place.first_row() + place.lane % 8;
    first_ = kAtOnce == 1 ? SharedRows<RowBytes>::offset(row, matrix)
                          : SharedRows<RowBytes>::offset(row + 8 * (matrix / 2), matrix % 2);
  }

  /// b = the fragments of step `step` of the warp's columns from `column` on. Steps come in ascending order; both are
  /// known while compiling.
  TM_DEVICE void read(uint32_t from, int step, int column, uint32_t (&b)[kAtOnce][2]) {
    // Step s has the chunks 2s and 2s + 1, and a chunk's place is its number, changed in bits by the row's.
    const uint32_t at = (from + first_) ^ static_cast<uint32_t>(2 * step * kChunkBytes);
    if constexpr (kAtOnce == 1) {
      if (step % 2 == 0) ldmatrix_x4(read_, at);
      b[0][0] = read_[step % 2 * 2];
      b[0][1] = read_[step % 2 * 2 + 1];
    } else {
      ldmatrix_x4(read_, at + static_cast<uint32_t>(8 * column * RowBytes));
      TM_UNROLL
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = read_[i];
    }
  }

 private:
  uint32_t first_;
  uint32_t read_[4] = {};
};

}  // namespace turbo::cuda
