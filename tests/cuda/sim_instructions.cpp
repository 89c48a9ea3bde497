// SPDX-License-Identifier: Apache-2.0
// The simulator's instructions against plain arithmetic, with fragment indices as the PTX manual writes them: by the
// element, not by the register.
#include <bit>
#include <cmath>
#include <cstring>

#include "sim_checks.h"

namespace {

using namespace test;

std::mt19937 generator(3);
int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

/// Element i of a lane's A fragment of 16-bit operands: row and column.
int half_a_row(int lane, int i) { return lane / 4 + (i / 2 % 2 ? 8 : 0); }
int half_a_column(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
int half_b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
/// The same of 8-bit operands.
int byte_a_row(int lane, int i) { return lane / 4 + (i / 4 % 2 ? 8 : 0); }
int byte_a_column(int lane, int i) { return lane % 4 * 4 + (i & 3) + (i >= 8 ? 16 : 0); }
int byte_b_row(int lane, int i) { return lane % 4 * 4 + (i & 3) + (i >= 4 ? 16 : 0); }
int d_row(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
int d_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

template <class T>
void test_half_mma(T type) {
  float a[16][16], b[16][8], d[16][8];
  for (auto& row : a)
    for (float& v : row) v = static_cast<float>(random_int(-64, 64)) / 8;
  for (auto& row : b)
    for (float& v : row) v = static_cast<float>(random_int(-64, 64)) / 8;
  for (auto& row : d)
    for (float& v : row) v = static_cast<float>(random_int(-1000, 1000));
  std::vector<float> got(16 * 8);
  run({}, [&] {
    const int lane = thread_index();
    uint16_t fa[8], fb[4];
    float fd[4];
    for (int i = 0; i < 8; ++i) fa[i] = from_float(type, a[half_a_row(lane, i)][half_a_column(lane, i)]);
    for (int i = 0; i < 4; ++i) fb[i] = from_float(type, b[half_b_row(lane, i)][lane / 4]);
    for (int i = 0; i < 4; ++i) fd[i] = d[d_row(lane, i)][d_column(lane, i)];
    uint32_t ra[4], rb[2];
    std::memcpy(ra, fa, sizeof ra);
    std::memcpy(rb, fb, sizeof rb);
    mma_m16n8k16(type, fd, ra, rb);
    for (int i = 0; i < 4; ++i) got[d_row(lane, i) * 8 + d_column(lane, i)] = fd[i];
  });
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float want = d[m][n];
      for (int k = 0; k < 16; ++k) want += a[m][k] * b[k][n];  // exact: small multiples of 1/64
      check(got[m * 8 + n] == want, "mma at " + std::to_string(m) + ", " + std::to_string(n));
    }
}

SIM_TEST(mma_of_f16_is_a_product) { test_half_mma(F16{}); }
SIM_TEST(mma_of_bf16_is_a_product) { test_half_mma(BF16{}); }

SIM_TEST(mma_of_bytes_is_a_product) {
  int8_t a[16][32], b[32][8];
  for (auto& row : a)
    for (int8_t& v : row) v = static_cast<int8_t>(random_int(-128, 127));
  for (auto& row : b)
    for (int8_t& v : row) v = static_cast<int8_t>(random_int(-128, 127));
  std::vector<int32_t> got(16 * 8);
  run({}, [&] {
    const int lane = thread_index();
    int8_t fa[16], fb[8];
    int32_t fd[4];
    for (int i = 0; i < 16; ++i) fa[i] = a[byte_a_row(lane, i)][byte_a_column(lane, i)];
    for (int i = 0; i < 8; ++i) fb[i] = b[byte_b_row(lane, i)][lane / 4];
    for (int i = 0; i < 4; ++i) fd[i] = 1000 * d_row(lane, i) + d_column(lane, i);
    uint32_t ra[4], rb[2];
    std::memcpy(ra, fa, sizeof ra);
    std::memcpy(rb, fb, sizeof rb);
    mma_m16n8k32(fd, ra, rb);
    for (int i = 0; i < 4; ++i) got[d_row(lane, i) * 8 + d_column(lane, i)] = fd[i];
  });
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int32_t want = 1000 * m + n;
      for (int k = 0; k < 32; ++k) want += a[m][k] * b[k][n];
      check(got[m * 8 + n] == want, "s8 mma at " + std::to_string(m) + ", " + std::to_string(n));
    }
}

SIM_TEST(mma_rounds_toward_zero) {
  float got = 0;
  run({}, [&] {
    // 1 + 3 * 2^-25 would be rounded up to nearest; one product of row 0, column 0 is 3 * 2^-25.
    float d[4] = {thread_index() == 0 ? 1.0f : 0.0f, 0, 0, 0};
    const uint32_t a[4] = {from_float(BF16{}, 3 * 0x1p-13f), 0, 0, 0}, b[2] = {from_float(BF16{}, 0x1p-12f), 0};
    uint32_t zero[4] = {};
    if (thread_index() == 0)
      mma_m16n8k16(BF16{}, d, a, b);
    else
      mma_m16n8k16(BF16{}, d, zero, b);
    if (thread_index() == 0) got = d[0];
  });
  check(got == 1.0f, "1 + 3 * 2^-25 must become 1");
}

SIM_TEST(ldmatrix_gives_rows_to_lanes) {
  std::vector<uint32_t> got(4 * 32);
  run({}, [&] {
    const int lane = thread_index();
    // Row r of matrix m at an address of its own, its element c is 1000 * m + 10 * r + c.
    const uint32_t address = 16 * static_cast<uint32_t>((lane * 7) % 32);
    Vec4 row;
    uint16_t elements[8];
    for (int c = 0; c < 8; ++c) elements[c] = static_cast<uint16_t>(1000 * (lane / 8) + 10 * (lane % 8) + c);
    std::memcpy(&row, elements, sizeof row);
    store_shared_128(address, row);
    sync_warp();
    uint32_t d[4];
    ldmatrix_x4(d, address);
    for (int m = 0; m < 4; ++m) got[m * 32 + lane] = d[m];
  });
  for (int m = 0; m < 4; ++m)
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t low = 1000 * m + 10 * (lane / 4) + 2 * (lane % 4);
      check(got[m * 32 + lane] == (low | (low + 1) << 16), "ldmatrix register of lane " + std::to_string(lane));
    }
}

SIM_TEST(ldmatrix_counts_bank_conflicts) {
  const auto conflicts = [](uint32_t pitch) {
    hostsim::total_counts() = {};
    run({}, [&] {
      const uint32_t address = static_cast<uint32_t>(thread_index()) * pitch;
      store_shared_128(address, {});
      sync_warp();
      uint32_t d[4];
      ldmatrix_x4(d, address);
    });
    return hostsim::total_counts().ldmatrix_conflicts;
  };
  check(conflicts(16) == 0, "rows side by side use every bank once");
  check(conflicts(128) == 4 * 7, "rows 128 bytes apart use the same banks");
  check(conflicts(64) == 4 * 3, "rows 64 bytes apart use two sets of banks");
}

SIM_TEST(shuffles_exchange) {
  std::vector<uint32_t> crossed(32), chosen(32);
  run({}, [&] {
    const int lane = thread_index();
    crossed[lane] = shuffle_xor(100 + lane, 5);
    chosen[lane] = shuffle(100 + lane, (lane + 3) % 32);
  });
  for (unsigned lane = 0; lane < 32; ++lane) {
    check(crossed[lane] == 100 + (lane ^ 5u), "shuffle_xor");
    check(chosen[lane] == 100 + (lane + 3) % 32, "shuffle");
  }
}

SIM_TEST(bit_instructions) {
  const uint32_t a = 0x12345678, b = 0x0F0F3C5A, c = 0x64006400;
  check(lop3<0xEA>(a, b, c) == ((a & b) | c), "lop3 and-or");
  check(lop3<0x96>(a, b, c) == (a ^ b ^ c), "lop3 xor");
  check(lop3<0x6A>(a, b, c) == ((a & b) ^ c), "lop3 and-xor");
  check(prmt(0x33221100, 0x77665544, 0x7531) == 0x77553311, "prmt picks bytes");
  check(prmt(0x80000000, 0x00000000, 0xB000) == 0xFF000000, "prmt spreads a sign");
}

template <class T>
void test_conversions(T type, uint32_t infinity) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float v = to_float(type, half);
    if (std::isnan(v)) continue;
    check(from_float(type, v) == half, "conversion of " + std::to_string(bits));
    // Between this number and the next larger one in size: halves go to the even one, all else to the nearer one.
    if ((bits & 0x7FFF) >= infinity - 1) continue;
    const float next = to_float(type, static_cast<uint16_t>(bits + 1)), middle = v + (next - v) / 2;
    check(from_float(type, middle) == half + (half & 1), "half way above " + std::to_string(bits));
    check(from_float(type, std::nextafter(middle, v)) == half, "below half way of " + std::to_string(bits));
    check(from_float(type, std::nextafter(middle, next)) == half + 1, "above half way of " + std::to_string(bits));
  }
  const float largest = to_float(type, static_cast<uint16_t>(infinity - 1));
  check(from_float(type, largest * 1.0001f) == infinity - 1, "a little above the largest number");
  check(from_float(type, 2 * largest) == infinity, "far above the largest number");
}

SIM_TEST(conversions_of_f16) { test_conversions(F16{}, 0x7C00); }
SIM_TEST(conversions_of_bf16) {
  test_conversions(BF16{}, 0x7F80);
  check(to_float(BF16{}, from_float(BF16{}, std::bit_cast<float>(0x00000001u))) == 0, "subnormals below bf16's");
}

SIM_TEST(fma_rounds_once) {
  const auto two = [](auto type, float v) { return from_float(type, v) * 0x00010001u; };
  // (1 + 2^-10) (1 + 2^-9) has 2^-19 as its last bit, which a product that is rounded by itself loses.
  check(fma2(F16{}, two(F16{}, 1 + 0x1p-10f), two(F16{}, 1 + 0x1p-9f), two(F16{}, -1)) ==
            two(F16{}, 0x1p-9f + 0x1p-10f + 0x1p-19f),
        "fma2 of f16");
  check(fma2(BF16{}, two(BF16{}, 143), two(BF16{}, 1), two(BF16{}, -136)) == two(BF16{}, 7), "fma2 of bf16");
}

}  // namespace
