// SPDX-License-Identifier: Apache-2.0
// Rounds rows of activations to int8 and lays the codes out as units of an integer dot.
//
// As compressed-tensors defines it, in fp32: symmetric scale = max|x| / 127.5; with zero point scale =
// (max - min) / 255 over a range that holds 0, zero = round(clamp(-128 - min / scale)); code =
// round(clamp(x / scale + zero)) within -128..127, halves to even; a scale of 0 becomes the fp32 epsilon. A
// row with a value that is not finite (at a given scale: not a number) gets the scale NaN, so its results say so.
#pragma once

#include <immintrin.h>

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

inline constexpr uint32_t kInfinityBits = 0x7F800000u;

struct Quantization {
  float scale;
  int32_t zero;
};

template <class B>
struct Quantize {
  using Vec = typename B::Vec;
  static constexpr int kLanes = B::kLanes, kVecs = B::kVecs16;

  template <DType D>
  static void load16(Vec (&v)[kVecs], const char* x, int64_t count) {
    for (int i = 0; i < kVecs; ++i) {
      const int64_t left = count - i * kLanes;
      v[i] = left >= kLanes
                 ? B::template load_full<D>(x + i * kLanes * dtype_size(D))
                 : B::template load_d<D>(x + i * kLanes * dtype_size(D), left > 0 ? static_cast<int>(left) : 0);
    }
  }

  static float not_finite(uint32_t bits) { return bits >= kInfinityBits ? __builtin_nanf("") : 0.0f; }

  /// Bits of the largest |x|; above those of infinity where one is not a number.
  template <DType D>
  static uint32_t largest_bits(const char* x, int64_t count) {
    if constexpr (D == DType::bf16) return B::largest_halves(x, count) << 16;
    if constexpr (D == DType::f16) {
      const float largest = _cvtsh_ss(static_cast<uint16_t>(B::largest_halves(x, count)));
      uint32_t bits;
      __builtin_memcpy(&bits, &largest, sizeof bits);
      return bits;
    }
    typename B::Raw most = B::int_zero();
    for (int64_t i = 0; i < count; i += 16) {
      Vec v[kVecs];
      load16<D>(v, x + i * dtype_size(D), count - i);
      for (int j = 0; j < kVecs; ++j) most = B::max_abs_bits(most, v[j]);
    }
    return B::reduce_max(most);
  }

  template <DType D>
  static Quantization symmetric(const char* x, int64_t count) {
    const uint32_t bits = largest_bits<D>(x, count);
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    const float scale = largest / 127.5f;
    return {(scale == 0 ? 0x1p-23f : scale) + not_finite(bits), 0};
  }

  template <DType D>
  static Quantization asymmetric(const char* x, int64_t count) {
    typename B::Raw most = B::int_zero();
    Vec low = B::zero(), high = B::zero();
    for (int64_t i = 0; i < count; i += 16) {
      Vec v[kVecs];
      load16<D>(v, x + i * dtype_size(D), count - i);
      for (int j = 0; j < kVecs; ++j) {
        most = B::max_abs_bits(most, v[j]);
        low = B::min(low, v[j]);
        high = B::max(high, v[j]);
      }
    }
    const float bad = not_finite(B::reduce_max(most));
    const float smallest = B::reduce_min(low), range = B::reduce_max(high) - smallest;
    const float scale = range / 255.0f;
    if (scale == 0) return {0x1p-23f + bad, -128};
    float zero = -128.0f - smallest / scale;
    zero = zero < -128.0f ? -128.0f : zero > 127.0f ? 127.0f : zero;
    return {scale + bad, bad == bad ? _mm_cvtss_si32(_mm_set_ss(zero)) : 0};
  }

  /// Where codes go: bytes, or 16-bit integers for instruction sets without a byte dot.
  template <class Format>
  static void store16(char* out, __m128i codes, int64_t count) {
    codes = _mm_shuffle_epi8(codes, Format::order());
    if constexpr (Format::kFlip) codes = _mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(0x80)));
    alignas(32) char buffer[32];
    constexpr int kBytes = Format::kWords ? 2 : 1;
    char* to = count == 16 ? out : buffer;
    if constexpr (Format::kWords)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepi8_epi16(codes));
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
    if (count < 16) __builtin_memcpy(out, buffer, count * kBytes);
  }

  /// Rounds and stores 64 values at a time from i = 0 on, and moves i on. Returns two parts of the sum of their codes,
  /// each off by 128.
  template <class Format, DType D>
  static __m128i round64(char* out, const char* x, int64_t count, int64_t& i, Vec scale, Vec reciprocal, Vec zero) {
    __m512i sums = _mm512_setzero_si512();
    const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80)), order = _mm512_broadcast_i32x4(Format::order());
    for (; i + 64 <= count; i += 64) {
      Vec v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = B::template load_full<D>(x + (i + 16 * j) * dtype_size(D));
      __m512i codes = B::codes64(v, scale, reciprocal, zero);
      const __m512i flipped = _mm512_xor_si512(codes, top);
      sums = _mm512_add_epi64(sums, _mm512_sad_epu8(flipped, _mm512_setzero_si512()));
      codes = _mm512_shuffle_epi8(Format::kFlip ? flipped : codes, order);
      if constexpr (Format::kWords) {
        _mm512_storeu_si512(out + 2 * i, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(codes)));
        _mm512_storeu_si512(out + 2 * i + 64, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(codes, 1)));
      } else {
        _mm512_storeu_si512(out + i, codes);
      }
    }
    return _mm_cvtsi64_si128(_mm512_reduce_add_epi64(sums));
  }

  /// Rounds `count` values and stores them, padded with zero codes to a whole dword of weights. Returns
  /// the sum of the codes, right where the zero point is 0.
  template <class Format, DType D>
  static int32_t round_to(char* out, const char* x, int64_t count, const Quantization& q) {
    const Vec scale = B::set1(q.scale), reciprocal = B::set1(1.0f / q.scale);
    const Vec zero = B::set1(static_cast<float>(q.zero));
    __m128i sums = _mm_setzero_si128();
    constexpr int kBytes = Format::kWords ? 2 : 1;
    int64_t i = 0;
    if constexpr (B::kWide) sums = round64<Format, D>(out, x, count, i, scale, reciprocal, zero);
    for (; i < count; i += 16) {
      const int64_t left = count - i < 16 ? count - i : 16;
      Vec v[kVecs];
      load16<D>(v, x + i * dtype_size(D), left);
      const __m128i codes = B::codes(v, scale, reciprocal, zero);
      const __m128i flipped = _mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(0x80)));
      sums = _mm_add_epi64(sums, _mm_sad_epu8(flipped, _mm_setzero_si128()));
      const int64_t padded = ceil_div(left, Format::kDwordK) * Format::kDwordK;
      store16<Format>(out + i * kBytes, codes, padded);
    }
    const int64_t sum = _mm_cvtsi128_si64(sums) + _mm_extract_epi64(sums, 1);
    return static_cast<int32_t>(sum - ceil_div(count, 16) * 16 * 128);
  }

  template <class Format, DType D>
  static void prepare_row(const Gemm& a, const char* x, const RowOut& out) {
    const Layout& l = a.layout;
    const int64_t width = l.groups == 1 ? l.k : l.k / l.groups, size = dtype_size(D);
    constexpr int kBytes = Format::kWords ? 2 : 1;
    char* units = reinterpret_cast<char*>(out.units);
    Quantization q{a.x_scale, a.x_zero_point};
    if (a.activations == Activations::dynamic)
      q = a.symmetric ? symmetric<D>(x, l.k) : asymmetric<D>(x, l.k);
    // Infinities saturate at a given scale, but what is not a number has no code.
    if (a.activations == Activations::fixed && largest_bits<D>(x, l.k) > kInfinityBits)
      q.scale = __builtin_nanf("");
    if (out.scale) *out.scale = q.scale;
    for (int64_t g = 0; g < l.groups; ++g) {
      const char* from = x + g * width * size;
      if (a.activations == Activations::grouped) {
        q = symmetric<D>(from, width);
        out.group_scales[g] = q.scale;
      }
      const int32_t sum = round_to<Format, D>(units + g * width * kBytes, from, width, q);
      out.offsets[g] = Format::offset(sum, q.zero, a.zero != nullptr);
    }
  }

  template <class Format>
  static void prepare(const Gemm& a, const char* x, const RowOut& out) {
    if (a.dtype == DType::bf16)
      prepare_row<Format, DType::bf16>(a, x, out);
    else if (a.dtype == DType::f16)
      prepare_row<Format, DType::f16>(a, x, out);
    else
      prepare_row<Format, DType::f32>(a, x, out);
  }
};

/// 4-bit weights and bytes: the low nibbles of a dword are k0 k4 k1 k5, the high ones k2 k6 k3 k7. A weight is
/// multiplied as its code q + 8, or less its zero point as -(z + 8) sum(x).
template <bool Words>
struct Units4 {
  static constexpr int kDwordK = 8;
  static constexpr bool kWords = Words, kFlip = false;
  static __m128i order() {
    if (Words) return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  }
  static int32_t offset(int32_t sum, int32_t, bool asymmetric) { return asymmetric ? -sum : -8 * sum; }
};

/// 8-bit weights. Bytes: unsigned, so off by 128. Words: pairs (k0, k2) and (k1, k3), the even and the odd bytes
/// of a dword.
template <bool Words>
struct Units8 {
  static constexpr int kDwordK = 4;
  static constexpr bool kWords = Words, kFlip = !Words;
  static __m128i order() {
    if (Words) return _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static int32_t offset(int32_t, int32_t zero, bool) { return -zero - (Words ? 0 : 128); }
};

}  // namespace
}  // namespace turbo::cpu
