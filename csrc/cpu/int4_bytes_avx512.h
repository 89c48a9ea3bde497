// SPDX-License-Identifier: Apache-2.0
// Weights of 4 bits as bytes, AVX-512: codes q + 8. Internal linkage, see gemm_kernel.h.
#pragma once

#include "avx512.h"

namespace turbo::cpu {
namespace {

struct Int4Bytes {
  /// Codes of the low or the high nibbles: (nibble & 15) ^ 8.
  template <int J>
  static __m512i decode(__m512i raw) {
    const __m512i low = J ? _mm512_srli_epi16(raw, 4) : raw;
    return _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6A);
  }
  static __m512i zero_vec(const uint32_t* zero, int v) {
    return _mm512_ternarylogic_epi32(Avx512::zero_nibbles(zero, v), _mm512_set1_epi32(15), _mm512_set1_epi32(8), 0x6A);
  }
};

/// The same as signed numbers q.
struct Int4SignedBytes {
  template <int J>
  static __m512i decode(__m512i raw) {
    return _mm512_sub_epi8(Int4Bytes::decode<J>(raw), _mm512_set1_epi8(8));
  }
  static __m512i zero_vec(const uint32_t* zero, int v) {
    return _mm512_sub_epi32(Int4Bytes::zero_vec(zero, v), _mm512_set1_epi32(8));
  }
};

}  // namespace
}  // namespace turbo::cpu
