// SPDX-License-Identifier: Apache-2.0
// Preparation of a row of activations that keep their bits: conversion to units where needed, group sums.
#pragma once

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

/// `I` has convert_row and sum_units; `dword_units` are the units of one dword of weights.
template <class I>
inline void prepare_kept(const Gemm& a, const char* x, const RowOut& out, int64_t dword_units) {
  const Layout& l = a.layout;
  const Unit* units = out.source;
  if (out.units) {
    I::convert_row(x, l.k, out.units, l.dwords() * dword_units);
    units = out.units;
  }
  if (!out.sums) return;
  const int64_t count = l.group_dwords() * dword_units;
  for (int64_t g = 0; g < l.groups; ++g) out.sums[g] = I::sum_units(units + g * count, count);
}

}  // namespace
}  // namespace turbo::cpu
