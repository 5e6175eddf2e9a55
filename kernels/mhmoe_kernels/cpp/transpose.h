// Matrices turned, and laid out as a CPU's matrix unit reads them.
//
// A product's second operand, K x N, is read in pairs of rows: [K/2][N][2], "paired" here. So everything moves 32-bit
// words, which hold two bfloat16 or one float32, 16 x 16 of them at a time in registers. Matrices are row-major; a pitch
// is the distance from one row to the next, in elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

using i64 = std::int64_t;
using word = std::uint32_t;
using half = std::uint16_t;  // the bits of a bfloat16
typedef word Words __attribute__((vector_size(64)));
typedef half Halves __attribute__((vector_size(32)));

inline Words load(const word* from, i64 n) {
  Words v{};
  if (n >= 16) std::memcpy(&v, from, 64);
  else if (n > 0) std::memcpy(&v, from, n * 4);
  return v;
}

inline Words widen(const half* from, i64 n) {
  Halves v{};
  if (n >= 16) std::memcpy(&v, from, 32);
  else if (n > 0) std::memcpy(&v, from, n * 2);
  return __builtin_convertvector(v, Words);
}

inline void store(word* to, Words v, i64 n) {
  if (n >= 16) std::memcpy(to, &v, 64);
  else if (n > 0) std::memcpy(to, &v, n * 4);
}

inline Halves narrow(__m512 v) { return (Halves)_mm512_cvtneps_pbh(v); }  // to nearest, ties to even

// Words of two rows: those of lower halves `a` and upper halves `b`.
inline Words pair(Halves a, Halves b) {
  return __builtin_convertvector(a, Words) | __builtin_convertvector(b, Words) << 16;
}

// Rows that lie S apart exchange the words of the other's half.
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

// take(row, column) gives 16 words of a matrix of rows x columns; put(column, row, words) gets 16 of the turned one.
// Both are asked beyond the edges too, up to a multiple of 16.
template <class Take, class Put>
inline void turn_words(i64 rows, i64 columns, Take take, Put put) {
  for (i64 i = 0; i < rows; i += 16)
    for (i64 j = 0; j < columns; j += 16) {
      Words block[16];
      for (int k = 0; k < 16; k++) block[k] = take(i + k, j);
      exchange_all<8>(block), exchange_all<4>(block), exchange_all<2>(block), exchange_all<1>(block);
      for (int k = 0; k < 16; k++) put(j + k, i, block[k]);
    }
}

// x [rows][columns] -> paired [columns/2][room][2]: the turned matrix. Rows from `rows` to `room` are zero.
inline void turn_paired(const half* x, i64 rows, i64 room, i64 columns, half* to_paired) {
  auto from = reinterpret_cast<const word*>(x);
  auto to = reinterpret_cast<word*>(to_paired);
  i64 words = columns / 2;
  turn_words(
      room, words, [=](i64 i, i64 j) { return i < rows ? load(from + i * words + j, words - j) : Words{}; },
      [=](i64 j, i64 i, Words v) {
        if (j < words) store(to + j * room + i, v, room - i);
      });
}

// x [rows][columns] -> paired [room/2][columns][2], as it is. Rows from `rows` to `room` are zero.
inline void pair_rows(const half* x, i64 rows, i64 room, i64 columns, half* to_paired) {
  auto to = reinterpret_cast<word*>(to_paired);
  for (i64 i = 0; i < room; i += 2, to += columns)
    for (i64 j = 0; j < columns; j += 16) {
      Words v{};
      if (i < rows) v = widen(x + i * columns + j, columns - j);
      if (i + 1 < rows) v |= widen(x + (i + 1) * columns + j, columns - j) << 16;
      store(to + j, v, columns - j);
    }
}

// x [rows][columns] -> [columns][rows]; rows are even.
inline void turn(const half* x, i64 rows, i64 columns, i64 pitch, half* to, i64 to_pitch) {
  i64 pairs = rows / 2;
  turn_words(
      pairs, columns,
      [=](i64 i, i64 j) {
        if (i >= pairs) return Words{};
        const half* row = x + 2 * i * pitch + j;
        return widen(row, columns - j) | widen(row + pitch, columns - j) << 16;
      },
      [=](i64 j, i64 i, Words v) {
        if (j < columns) store(reinterpret_cast<word*>(to + j * to_pitch) + i, v, pairs - i);
      });
}

// x [rows][columns of a pitch] -> its rounded values [columns][rows].
inline void turn_rounded(const float* x, i64 rows, i64 columns, i64 pitch, half* to, i64 to_pitch) {
  auto from = reinterpret_cast<const word*>(x);
  turn_words(
      rows, columns, [=](i64 i, i64 j) { return i < rows ? load(from + i * pitch + j, columns - j) : Words{}; },
      [=](i64 j, i64 i, Words v) {
        if (j >= columns) return;
        Halves rounded = narrow((__m512)v);
        std::memcpy(to + j * to_pitch + i, &rounded, 2 * std::min<i64>(16, rows - i));
      });
}

inline void round_all(const float* x, i64 n, half* to) {
  for (i64 i = 0; i < n; i += 16) {
    Halves rounded = narrow((__m512)load(reinterpret_cast<const word*>(x + i), n - i));
    std::memcpy(to + i, &rounded, 2 * std::min<i64>(16, n - i));
  }
}
