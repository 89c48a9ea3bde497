// SPDX-License-Identifier: Apache-2.0
// Groups of weights along k that share a scale and a zero point.
#pragma once

#include "device.h"
#include "layout.h"
#include "tile_shape.h"

namespace turbo::cuda {

/// How groups lie to slabs. one: all of K is one, whose sums are scaled at the end. small: groups of 32, two in a
/// slab. large: whole slabs.
enum class Groups { one, small, large };

/// The zero points of the channels g and g + 8 of a slab, in the form in which they are used: twice or four times in a
/// register.
struct ZeroPoints {
  uint32_t low, high;
};

/// What a thread keeps of a group: scales and zero points of its channels g and g + 8 of each slab.
template <class Tile>
struct Group {
  uint32_t scale[Tile::kSlabs];  // channel g in the low half
  ZeroPoints zero[Tile::kSlabs];
};

/// Where a slab stands in its group.
class GroupTurn {
 public:
  /// `rows` rows of scales for each group of `slabs` slabs.
  TM_DEVICE GroupTurn(int slabs, int rows, int slab)
      : slabs_(slabs), rows_(rows), group_(slab / slabs), at_(slab % slabs) {}
  TM_DEVICE bool begins() const { return at_ == 0; }
  TM_DEVICE bool ends() const { return at_ == slabs_ - 1; }
  /// The first row of scales of the slab.
  TM_DEVICE int row() const { return group_ * rows_; }
  TM_DEVICE void advance() {
    const bool end = ends();
    group_ += end;
    at_ = end ? 0 : at_ + 1;
  }

 private:
  int slabs_, rows_, group_, at_;
};

TM_DEVICE void read_words(uint32_t at, uint32_t (&out)[1]) { out[0] = load_shared_32(at); }
TM_DEVICE void read_words(uint32_t at, uint32_t (&out)[2]) {
  const Vec2 two = load_shared_64(at);
  out[0] = two.v[0];
  out[1] = two.v[1];
}
TM_DEVICE void read_words(uint32_t at, uint32_t (&out)[4]) {
  const Vec4 four = load_shared_128(at);
  TM_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = four.v[i];
}

}  // namespace turbo::cuda
