// SPDX-License-Identifier: Apache-2.0
// Scratch memory, and rows of activations in the form that kernels read, for the drivers. Plain code: no
// instruction set is named here.
#pragma once

#include <cstdlib>
#include <new>

#include "gemm_isa.h"

namespace turbo::cpu {

/// Grow-only memory of one thread. 64-byte aligned, freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* ensure(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      bytes = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// Hands out pieces of one block of scratch memory, each on its own cache lines. A caller takes everything
/// twice: first sizes are added up and nullptr comes back; after `begin`, pointers.
class Pieces {
 public:
  explicit Pieces(Scratch& scratch) : scratch_(scratch) {}

  template <class T>
  T* take(bool wanted, int64_t count) {
    if (!wanted) return nullptr;
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  void begin() {
    memory_ = static_cast<char*>(scratch_.ensure(used_));
    used_ = 0;
  }
  size_t bytes() const { return used_; }

 private:
  Scratch& scratch_;
  char* memory_ = nullptr;
  size_t used_ = 0;
};

/// What stands beside the units of rows: [rows, groups] where not said otherwise, nullptr where a kernel has no use
/// for it.
struct BesideRows {
  float* sums = nullptr;
  int32_t* offsets = nullptr;
  float* group_scales = nullptr;
  float* scales = nullptr;  // [rows]

  void take(Pieces& pieces, const Gemm& args, int64_t rows) {
    const bool kept = args.activations == Activations::kept, grouped = args.activations == Activations::grouped;
    const int64_t count = rows * args.layout.groups;
    sums = pieces.take<float>(kept && args.zero, count);
    offsets = pieces.take<int32_t>(args.as_integers(), count);
    group_scales = pieces.take<float>(grouped, count);
    scales = pieces.take<float>(!kept && !grouped, rows);
  }
  bool any() const { return sums || offsets || group_scales || scales; }
  /// The arrays from `row` on.
  BesideRows from(int64_t row, int64_t groups) const {
    return {sums ? sums + row * groups : nullptr, offsets ? offsets + row * groups : nullptr,
            group_scales ? group_scales + row * groups : nullptr, scales ? scales + row : nullptr};
  }
};

/// Rows of activations in the form that kernels read.
struct PreparedRows {
  const Gemm args;
  const GemmIsa& isa;
  const bool convert;  // else the units are x itself
  const int64_t row_units, tile_units;
  uint32_t* units = nullptr;
  BesideRows beside;

  PreparedRows(const Gemm& a, const GemmIsa& i)
      : args(a),
        isa(i),
        convert(!i.reads_in_place || a.layout.k % a.layout.dword_k() != 0),
        row_units(a.layout.dwords() * i.units_per_dword),
        tile_units(i.tile_units(a.layout)) {}

  void take(Pieces& pieces, int64_t rows) {
    units = pieces.take<uint32_t>(convert, rows * row_units);
    beside.take(pieces, args, rows);
  }

  /// Rows that one of `row_tiles` tiles of `rows` rows has memory for.
  int64_t room(int64_t row_tiles, int64_t rows) const {
    return isa.full_tiles && row_tiles > 1 ? kMostTileRows : rows;
  }

  /// Whether rows need any preparation at all.
  bool needed() const { return convert || beside.sums; }  // what is rounded is converted

  void prepare(int64_t row) const {
    const BesideRows at = beside.from(row, args.layout.groups);
    isa.prepare(args, row,
                {convert ? units + row * row_units : nullptr, source(row), at.sums, at.offsets, at.group_scales,
                 at.scales});
  }

  const Unit* units_of(int64_t row) const { return convert ? units + row * row_units : source(row); }
  int64_t row_bytes() const { return convert ? row_units * 4 : args.x_stride * dtype_size(args.dtype); }

 private:
  const Unit* source(int64_t row) const {
    const char* x = static_cast<const char*>(args.x);
    return reinterpret_cast<const Unit*>(x + row * args.x_stride * dtype_size(args.dtype));
  }
};

/// Runs one share of a product on this thread, which keeps the workspace for its next one.
void run_share(const GemmIsa& isa, const Gemm& args, const PreparedX& x, Share share);

/// Below this many units the preparation of rows costs less than waking the other threads.
inline constexpr int64_t kParallelUnits = 1 << 15;

/// The table of `isa` for a product.
const GemmIsa& kernels(const Gemm& args, Isa isa);

}  // namespace turbo::cpu
