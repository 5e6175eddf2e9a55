// SwiGLU experts over sorted rows, y = down (silu(gate x) * up x): an expert's hidden layer never leaves the cache, and
// nothing but x is kept for the backward, which computes it anew.
//
// All products are oneDNN's, one block at a time, by ATen's brgemm: C (float32) = A (bfloat16, row-major) B (bfloat16,
// paired as in transpose.h). Everything between is written so that what one product leaves is what the next one reads;
// hence hidden layers stand on their side, hidden units down and rows across:
//
//   forward, for each block of rows                 backward, for each block of hidden units, over all rows
//     gate' [f][n] = gate [f][D]  x' [D][n]           gate', up' anew; dhidden' [f][n] = down' [f][D]  dy' [D][n]
//     up'   [f][n] = up   [f][D]  x' [D][n]           dgate [f][D] += dgate' [f][n]  x  [n][D]    and dup
//     y'    [D][n] += down [D][f]  hidden' [f][n]     ddown' [f][D] += hidden' [f][n]  dy [n][D]
//                                                     dx' [D][n] += gate' and up' [D][2f]  dgate' and dup' [2f][n]
//
// (x' is x turned.) Sums are float32; an expert's dx is summed by each thread over its own hidden units, then over
// threads, so that results depend on the number of threads, in their last bit, and on nothing else.

#include <ATen/native/CPUBlas.h>

#include <omp.h>

#include <vector>

#include "transpose.h"

namespace {

using Bf16 = at::BFloat16;

constexpr i64 FORWARD_ROWS = 256;  // of a block; the more blocks, the more threads have work
constexpr i64 ROWS = 512;          // of a block in the backward, over which its sums are kept
constexpr i64 ROUNDED = 32;        // numbers of rows are rounded up to these, so that few kernels are compiled

i64 up_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hidden units of a block. What a backward sums up, 12 D bytes for each, stays in the cache of a core (measured at
// D 128 to 512 with 2 MB); each thread gets some.
i64 units(i64 D, i64 F, int threads) {
  i64 best = D >= 384 ? 256 : 96;
  return std::max<i64>(2, std::min(best, up_to((F + threads - 1) / threads, 2)));
}

// c [m][n] (+)= a [m][k] b [k][n]
void multiply(i64 m, i64 n, i64 k, const half* a, const half* b, float* c, bool add) {
  at::native::cpublas::brgemm(
      m, n, k, k, n, n, add, reinterpret_cast<const Bf16*>(a), reinterpret_cast<const Bf16*>(b), c);
}

void multiply(i64 m, i64 n, i64 k, const half* a, i64 pitch, const half* b, float* c, bool add) {
  at::native::cpublas::brgemm(
      m, n, k, pitch, n, n, add, reinterpret_cast<const Bf16*>(a), reinterpret_cast<const Bf16*>(b), c);
}

// Hands out parts of a piece of memory; of none, it only counts.
struct Room {
  char* start;
  i64 used = 0;
  template <class T>
  T* take(i64 n) {
    i64 at = used;
    used += up_to(n * sizeof(T), 64);
    return start ? reinterpret_cast<T*>(start + at) : nullptr;
  }
};

struct ForwardRoom {
  half *xt, *hidden;
  float *gate, *up, *yt;
  ForwardRoom(Room& room, i64 D, i64 units) {
    xt = room.take<half>(FORWARD_ROWS * D), hidden = room.take<half>(units * FORWARD_ROWS);
    gate = room.take<float>(units * FORWARD_ROWS), up = room.take<float>(units * FORWARD_ROWS), yt = room.take<float>(D * FORWARD_ROWS);
  }
};

// Of a thread.
struct BackwardRoom {
  half *gate_up, *down_t, *gate_up_t;     // weights of a block of hidden units
  half *hidden, *dgate_up, *dgate_up_paired;
  float *gate_up_out, *dhidden;
  float *dgate_up_sum, *ddown_sum, *dxt;  // gradients
  BackwardRoom(Room& room, i64 most, i64 D, i64 units) {
    gate_up = room.take<half>(2 * units * D), down_t = room.take<half>(units * D);
    gate_up_t = room.take<half>(2 * units * D), hidden = room.take<half>(units * ROWS);
    dgate_up = room.take<half>(2 * units * ROWS), dgate_up_paired = room.take<half>(2 * units * ROWS);
    gate_up_out = room.take<float>(2 * units * ROWS), dhidden = room.take<float>(units * ROWS);
    dgate_up_sum = room.take<float>(2 * units * D), ddown_sum = room.take<float>(units * D);
    dxt = room.take<float>(most * D);
  }
};

// Of an expert: its rows and their gradients, both ways.
struct RowsRoom {
  half *xt, *x, *dyt, *dy;
  RowsRoom(Room& room, i64 most, i64 D) {
    xt = room.take<half>(most * D), x = room.take<half>(most * D);
    dyt = room.take<half>(most * D), dy = room.take<half>(most * D);
  }
};

i64 most_rows(const i64* counts, i64 E) { return E ? up_to(*std::max_element(counts, counts + E), ROUNDED) : 0; }

// e^x to 2 units in the last place of float32. What is not a number stays so.
__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(100.f), _mm512_max_ps(_mm512_set1_ps(-100.f), x));
  __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = x - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln 2, in two parts
  __m512 p = r * (1.f / 5040) + 1.f / 720;                // Taylor: |r| is below 0.35
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return _mm512_scalef_ps(p, n);
}

__m512 sigmoid(__m512 x) {
  __m512 d = exponential(-x) + 1.f, about = _mm512_rcp14_ps(d);
  return about * (2.f - d * about);
}

// hidden, paired, of gate and up [f][n]
void activate(i64 f, i64 n, const float* gate, const float* up, half* hidden_paired) {
  auto hidden = [=](i64 at) {
    __m512 g = _mm512_loadu_ps(gate + at);
    return narrow(g * sigmoid(g) * _mm512_loadu_ps(up + at));
  };
  for (i64 i = 0; i < f; i += 2)
    for (i64 r = 0; r < n; r += 16) {
      Words both = pair(hidden(i * n + r), hidden((i + 1) * n + r));
      std::memcpy(hidden_paired + i * n + 2 * r, &both, 64);
    }
}

// hidden, dgate and dup [f][n], the latter two also paired, of gate, up and dhidden [f][n]
void activate_backward(i64 f, i64 n, const BackwardRoom& my) {
  const float *gate = my.gate_up_out, *up = gate + f * n, *dhidden = my.dhidden;
  half *dgate = my.dgate_up, *dup = dgate + f * n;
  half *dgate_paired = my.dgate_up_paired, *dup_paired = dgate_paired + f * n;
  for (i64 i = 0; i < f; i += 2)
    for (i64 r = 0; r < n; r += 16) {
      Halves of_gate[2], of_up[2];
      for (int k = 0; k < 2; k++) {
        i64 at = (i + k) * n + r;
        __m512 g = _mm512_loadu_ps(gate + at), u = _mm512_loadu_ps(up + at), d = _mm512_loadu_ps(dhidden + at);
        __m512 s = sigmoid(g), silu = g * s;
        Halves hidden = narrow(silu * u);
        of_gate[k] = narrow(d * u * (s + silu * (1.f - s)));
        of_up[k] = narrow(d * silu);
        std::memcpy(my.hidden + at, &hidden, 32);
        std::memcpy(dgate + at, &of_gate[k], 32);
        std::memcpy(dup + at, &of_up[k], 32);
      }
      Words gates = pair(of_gate[0], of_gate[1]), ups = pair(of_up[0], of_up[1]);
      std::memcpy(dgate_paired + i * n + 2 * r, &gates, 64);
      std::memcpy(dup_paired + i * n + 2 * r, &ups, 64);
    }
}

}  // namespace

extern "C" {

// Bytes that forward, or backward, works in.
i64 forward_bytes(i64 D, i64 F, int threads) {
  Room room{nullptr};
  ForwardRoom(room, D, units(D, F, threads));
  return threads * room.used;
}

i64 backward_bytes(const i64* counts, i64 E, i64 D, i64 F, int threads) {
  Room shared{nullptr}, own{nullptr};
  RowsRoom(shared, most_rows(counts, E), D);
  BackwardRoom(own, most_rows(counts, E), D, units(D, F, threads));
  return shared.used + threads * own.used;
}

// x, y [R][D] of sorted rows, counts [E] of them; gate, up [E][F][D]; down [E][D][F]. D and F are even.
void forward(const half* x, const half* gate, const half* up, const half* down, half* y, char* work, const i64* counts,
             i64 E, i64 D, i64 F, int threads) {
  struct Block {
    i64 expert, start, rows;
  };
  std::vector<Block> blocks;
  for (i64 e = 0, start = 0; e < E; start += counts[e++])
    for (i64 at = 0; at < counts[e]; at += FORWARD_ROWS) blocks.push_back({e, start + at, std::min(FORWARD_ROWS, counts[e] - at)});
  const i64 step = units(D, F, threads), each = forward_bytes(D, F, threads) / threads, n_blocks = blocks.size();
#pragma omp parallel num_threads(threads)
  {
    Room room{work + omp_get_thread_num() * each};
    ForwardRoom my(room, D, step);
#pragma omp for schedule(dynamic)
    for (i64 b = 0; b < n_blocks; b++) {
      auto [e, start, rows] = blocks[b];
      const half *gate_e = gate + e * F * D, *up_e = up + e * F * D, *down_e = down + e * D * F;
      i64 n = up_to(rows, ROUNDED);
      turn_paired(x + start * D, rows, n, D, my.xt);
      for (i64 at = 0; at < F; at += step) {
        i64 f = std::min(step, F - at);
        multiply(f, n, D, gate_e + at * D, my.xt, my.gate, false);
        multiply(f, n, D, up_e + at * D, my.xt, my.up, false);
        activate(f, n, my.gate, my.up, my.hidden);
        multiply(D, n, f, down_e + at, F, my.hidden, my.yt, at > 0);
      }
      turn_rounded(my.yt, D, rows, n, y + start * D, D);
    }
    at::native::cpublas::brgemm_release();
  }
}

// Gradients of x and weights, for dy of y. Those of weights without rows are zero.
void backward(const half* x, const half* gate, const half* up, const half* down, const half* dy, half* dx, half* dgate,
              half* dup, half* ddown, char* work, const i64* counts, i64 E, i64 D, i64 F, int threads) {
  const i64 most = most_rows(counts, E), step = units(D, F, threads), n_steps = (F + step - 1) / step;
  Room room{work};
  RowsRoom rows_of(room, most, D);
  std::vector<BackwardRoom> of;
  for (int t = 0; t < threads; t++) of.emplace_back(room, most, D, step);
  std::vector<char> has_dx(threads);
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    const BackwardRoom& my = of[me];
    for (i64 e = 0, start = 0; e < E; start += counts[e++]) {
      const i64 R = counts[e], n_blocks = (R + ROWS - 1) / ROWS, weights = e * F * D;
      const half *gate_e = gate + weights, *up_e = up + weights, *down_e = down + weights;
      has_dx[me] = false;
#pragma omp for schedule(static)
      for (i64 b = 0; b < n_blocks; b++) {
        i64 rows = std::min(ROWS, R - b * ROWS), n = up_to(rows, ROUNDED), at = b * ROWS * D, from = start * D + at;
        turn_paired(x + from, rows, n, D, rows_of.xt + at);
        pair_rows(x + from, rows, n, D, rows_of.x + at);
        turn_paired(dy + from, rows, n, D, rows_of.dyt + at);
        pair_rows(dy + from, rows, n, D, rows_of.dy + at);
      }
#pragma omp for schedule(static)
      for (i64 s = 0; s < n_steps; s++) {
        i64 first = s * step, f = std::min(step, F - first), here = weights + first * D;
        if (R == 0) {
          std::fill_n(my.dgate_up_sum, 2 * f * D, 0.f);
          std::fill_n(my.ddown_sum, f * D, 0.f);
        } else {
          std::copy_n(gate_e + first * D, f * D, my.gate_up);
          std::copy_n(up_e + first * D, f * D, my.gate_up + f * D);
          turn(down_e + first, D, f, F, my.down_t, D);
          turn(my.gate_up, 2 * f, D, D, my.gate_up_t, 2 * f);
        }
        for (i64 b = 0; b < n_blocks; b++) {
          i64 n = up_to(std::min(ROWS, R - b * ROWS), ROUNDED), at = b * ROWS * D;
          multiply(2 * f, n, D, my.gate_up, rows_of.xt + at, my.gate_up_out, false);
          multiply(f, n, D, my.down_t, rows_of.dyt + at, my.dhidden, false);
          activate_backward(f, n, my);
          multiply(2 * f, D, n, my.dgate_up, rows_of.x + at, my.dgate_up_sum, b > 0);
          multiply(f, D, n, my.hidden, rows_of.dy + at, my.ddown_sum, b > 0);
          multiply(D, n, 2 * f, my.gate_up_t, my.dgate_up_paired, my.dxt + at, has_dx[me]);
        }
        has_dx[me] = true;
        round_all(my.dgate_up_sum, f * D, dgate + here);
        round_all(my.dgate_up_sum + f * D, f * D, dup + here);
        turn_rounded(my.ddown_sum, f, D, D, ddown + weights + first, F);
      }
#pragma omp for schedule(static)
      for (i64 b = 0; b < n_blocks; b++) {
        i64 rows = std::min(ROWS, R - b * ROWS), n = up_to(rows, ROUNDED), at = b * ROWS * D;
        float* sum = of[0].dxt + at;  // schedule(static) gives thread 0 the first step
        for (int t = 1; t < threads; t++)
          if (has_dx[t])
            for (i64 i = 0; i < D * n; i++) sum[i] += of[t].dxt[at + i];
        turn_rounded(sum, D, rows, n, dx + start * D + at, D);
      }
    }
    at::native::cpublas::brgemm_release();
  }
}
}
