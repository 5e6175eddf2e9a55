// Transposition of matrices, and the layouts that a CPU's matrix unit reads.
//
// A matrix unit reads the second operand of a product, K x N, in pairs of rows: [K/2][N][2], "paired" here. This code
// therefore moves words of 32 bits, which hold two bfloat16 or one float32, 16 x 16 of them at a time in registers.
// Matrices are row-major; a pitch is the distance from one row to the next, in elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

using i64 = std::int64_t;
using word = std::uint32_t;
using bf16 = std::uint16_t;  // the bits of a bfloat16
typedef word Words __attribute__((vector_size(64)));
typedef bf16 Bf16s __attribute__((vector_size(32)));

inline Words load(const word* from, i64 n) {
  Words v{};
  if (n >= 16) std::memcpy(&v, from, 64);
  else if (n > 0) std::memcpy(&v, from, n * 4);
  return v;
}

inline Words widen(const bf16* from, i64 n) {
  Bf16s v{};
  if (n >= 16) std::memcpy(&v, from, 32);
  else if (n > 0) std::memcpy(&v, from, n * 2);
  return __builtin_convertvector(v, Words);
}

inline void store(word* to, Words v, i64 n) {
  if (n >= 16) std::memcpy(to, &v, 64);
  else if (n > 0) std::memcpy(to, &v, n * 4);
}

// Two rows of 16 values, rounded to bfloat16 (to nearest, ties to even).
struct Rounded {
  __m512i bits;
  Rounded(__m512 a, __m512 b) : bits((__m512i)_mm512_cvtne2ps_pbh(b, a)) {}

  void store(bf16* to, i64 pitch) const {
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(bits));
    _mm256_storeu_si256((__m256i*)(to + pitch), _mm512_extracti64x4_epi64(bits, 1));
  }

  void store_paired(bf16* to) const {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, bits));
  }
};

inline Bf16s narrow(Words v) { return (Bf16s)_mm512_cvtneps_pbh((__m512)v); }

// Exchange words between two rows that are S rows apart: one step of the transposition of a block.
template <int S>
inline void exchange(Words& a, Words& b) {
  Words low, high;
  for (word i = 0; i < 16; i++) {
    low[i] = i & S ? 16 + i - S : i;
    high[i] = i & S ? 16 + i : i + S;
  }
  Words a_and_b = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = a_and_b;
}

template <int S>
inline void exchange_all(Words* row) {
  for (int i = 0; i < 16; i++)
    if (!(i & S)) exchange<S>(row[i], row[i + S]);
}

inline void transpose_block(Words* row) {
  exchange_all<8>(row), exchange_all<4>(row), exchange_all<2>(row), exchange_all<1>(row);
}

// Transpose a matrix of rows x columns. load_words(row, column) returns 16 words of it, and
// store_words(column, row, words) stores 16 words of the result. Both are also called beyond the edges, up to a multiple
// of 16.
template <class LoadWords, class StoreWords>
inline void transpose_words(i64 rows, i64 columns, LoadWords load_words, StoreWords store_words) {
  for (i64 i = 0; i < rows; i += 16)
    for (i64 j = 0; j < columns; j += 16) {
      Words block[16];
      for (int k = 0; k < 16; k++) block[k] = load_words(i + k, j);
      transpose_block(block);
      for (int k = 0; k < 16; k++) store_words(j + k, i, block[k]);
    }
}

// x [rows][columns] -> paired [columns/2][padded_rows][2], transposed. Rows from `rows` to `padded_rows` are zero.
inline void transpose_paired(const bf16* x, i64 rows, i64 padded_rows, i64 columns, bf16* to_paired, i64 to_pitch) {
  auto from = reinterpret_cast<const word*>(x);
  auto to = reinterpret_cast<word*>(to_paired);
  i64 words = columns / 2;
  transpose_words(
      padded_rows, words, [=](i64 i, i64 j) { return i < rows ? load(from + i * words + j, words - j) : Words{}; },
      [=](i64 j, i64 i, Words v) {
        if (j < words) store(to + j * to_pitch + i, v, padded_rows - i);
      });
}

// x [rows][columns] -> paired [padded_rows/2][columns][2], not transposed. Rows from `rows` to `padded_rows` are zero.
inline void pair_rows(const bf16* x, i64 rows, i64 padded_rows, i64 columns, bf16* to_paired, i64 to_pitch) {
  auto to = reinterpret_cast<word*>(to_paired);
  for (i64 i = 0; i < padded_rows; i += 2, to += to_pitch)
    for (i64 j = 0; j < columns; j += 16) {
      Words v{};
      if (i < rows) v = widen(x + i * columns + j, columns - j);
      if (i + 1 < rows) v |= widen(x + (i + 1) * columns + j, columns - j) << 16;
      store(to + j, v, columns - j);
    }
}

// x [rows][columns] -> [columns][rows]. The number of rows is even.
inline void transpose(const bf16* x, i64 rows, i64 columns, i64 pitch, bf16* to, i64 to_pitch) {
  i64 pairs = rows / 2;
  transpose_words(
      pairs, columns,
      [=](i64 i, i64 j) {
        if (i >= pairs) return Words{};
        const bf16* row = x + 2 * i * pitch + j;
        return widen(row, columns - j) | widen(row + pitch, columns - j) << 16;
      },
      [=](i64 j, i64 i, Words v) {
        if (j < columns) store(reinterpret_cast<word*>(to + j * to_pitch) + i, v, pairs - i);
      });
}

// x [rows][columns], with a pitch -> [columns][rows], rounded.
inline void transpose_rounded(const float* x, i64 rows, i64 columns, i64 pitch, bf16* to, i64 to_pitch) {
  auto load_words = [=](i64 i, i64 j) {
    return i < rows ? load(reinterpret_cast<const word*>(x + i * pitch + j), columns - j) : Words{};
  };
  for (i64 j = 0; j < columns; j += 16)
    // The result goes to memory, so it is written in whole lines of 64 bytes.
    for (i64 i = 0; i < rows; i += 32) {
      Words a[16], b[16];
      for (int k = 0; k < 16; k++) a[k] = load_words(i + k, j), b[k] = load_words(i + 16 + k, j);
      transpose_block(a), transpose_block(b);
      for (i64 k = 0; k < std::min<i64>(16, columns - j); k++) {
        Rounded line((__m512)a[k], (__m512)b[k]);
        std::memcpy(to + (j + k) * to_pitch + i, &line.bits, 2 * std::min<i64>(32, rows - i));
      }
    }
}

// x [rows][columns], with a pitch -> [rows][columns], rounded and without a pitch.
inline void round_all(const float* x, i64 rows, i64 columns, i64 pitch, bf16* to) {
  for (i64 i = 0; i < rows; i++, x += pitch, to += columns)
    for (i64 j = 0; j < columns; j += 16) {
      Bf16s rounded = narrow(load(reinterpret_cast<const word*>(x + j), columns - j));
      std::memcpy(to + j, &rounded, 2 * std::min<i64>(16, columns - j));
    }
}

inline void copy(const bf16* x, i64 rows, i64 columns, bf16* to, i64 to_pitch) {
  for (i64 i = 0; i < rows; i++) std::copy_n(x + i * columns, columns, to + i * to_pitch);
}
