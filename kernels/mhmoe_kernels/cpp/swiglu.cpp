// SwiGLU experts over sorted rows, y = down (silu(gate x) * up x). An expert's hidden layer stays in the cache. Only x is
// kept for the backward, which computes the hidden layer again.
//
// oneDNN computes all products, one block at a time, through ATen's brgemm: C (float32) = A (bfloat16, row-major) B
// (bfloat16, paired as in transpose.h). The code between the products writes each operand in the layout that the next
// product reads. Hidden layers are therefore transposed, with hidden units down and rows across:
//
//   forward, for each block of rows                 backward, for each block of hidden units, over all rows
//     gate' [f][n] = gate [f][D]  x' [D][n]           gate', up' again; dhidden' [f][n] = down' [f][D]  dy' [D][n]
//     up'   [f][n] = up   [f][D]  x' [D][n]           dgate [f][D] += dgate' [f][n]  x  [n][D]    and dup
//     y'    [D][n] += down [D][f]  hidden' [f][n]     ddown' [f][D] += hidden' [f][n]  dy [n][D]
//                                                     dx' [D][n] += gate' and up' [D][2f]  dgate' and dup' [2f][n]
//
// (x' is x transposed.) Sums are float32. Each thread sums an expert's dx over its own hidden units, and these sums are
// then added over threads. The last bit of the results therefore depends on the number of threads, and on nothing else.

#include <ATen/native/CPUBlas.h>

#include <omp.h>

#include <vector>

#include "transpose.h"

namespace {

using Bf16 = at::BFloat16;

// Numbers of rows are rounded up to a multiple of this, because oneDNN compiles a kernel for each number.
constexpr i64 ROUNDED = 32;
// Rows of a block in the forward. More blocks give more threads work.
constexpr i64 FORWARD_ROWS = 256;

i64 up_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows and hidden units of a block in the backward: the fastest of 35 pairs at D 128, 256 and 512, on cores with 2 MB of
// cache. The units are shared out among the threads.
i64 rows_of_block(i64 D) { return D < 384 ? 256 : 512; }
i64 units_of_block(i64 D, i64 F, int threads) {
  i64 best = D < 384 ? 192 : 256;
  return std::max<i64>(2, std::min(best, up_to((F + threads - 1) / threads, 2)));
}

// Distance from one row to the next in scratch memory. With a power of two, all rows would map to a few sets of the
// cache, which made products with D 256 take 1.7 times as long.
i64 pitch(i64 n) { return n + 32; }

// c [m][n] (+)= a [m][k] b [k][n]
void multiply(i64 m, i64 n, i64 k, const half* a, i64 pitch_a, const half* b, float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, pitch_a, pitch(n), pitch(n), add, reinterpret_cast<const Bf16*>(a),
                              reinterpret_cast<const Bf16*>(b), c);
}

// Number of values of a block of an expert's rows, with the pitch of both layouts.
i64 block_values(i64 most, i64 D) { return pitch(std::min(rows_of_block(D), most)) * pitch(D); }
i64 n_blocks(i64 rows, i64 D) { return (rows + rows_of_block(D) - 1) / rows_of_block(D); }

// Allocator that hands out parts of the scratch memory. Without memory it only counts bytes.
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

// Scratch memory of a thread in the forward; the table above has the shapes.
struct ForwardRoom {
  half *xt, *hidden;
  float *gate, *up, *yt;
  ForwardRoom(Room& room, i64 D, i64 units) {
    xt = room.take<half>(D * pitch(FORWARD_ROWS)), hidden = room.take<half>(units * pitch(FORWARD_ROWS));
    gate = room.take<float>(units * pitch(FORWARD_ROWS)), up = room.take<float>(units * pitch(FORWARD_ROWS));
    yt = room.take<float>(D * pitch(FORWARD_ROWS));
  }
};

// Scratch memory of a thread in the backward.
struct BackwardRoom {
  half *gate_up, *down_t, *gate_up_t;          // weights of a block of hidden units
  float *gate_up_out, *dhidden;                // outputs of products for a block of rows
  half *hidden, *dgate_up, *dgate_up_paired;   // operands of the next products
  float *dgate_up_sum, *ddown_sum, *dxt;       // gradients; dxt is that of all rows of an expert
  BackwardRoom(Room& room, i64 most, i64 D, i64 units) {
    const i64 weights = units * pitch(D), rows = units * pitch(std::min(rows_of_block(D), most));
    gate_up = room.take<half>(2 * weights), down_t = room.take<half>(weights);
    gate_up_t = room.take<half>(D * pitch(2 * units));
    gate_up_out = room.take<float>(2 * rows), dhidden = room.take<float>(rows);
    hidden = room.take<half>(rows), dgate_up = room.take<half>(2 * rows), dgate_up_paired = room.take<half>(2 * rows);
    dgate_up_sum = room.take<float>(2 * weights), ddown_sum = room.take<float>(weights);
    dxt = room.take<float>(n_blocks(most, D) * block_values(most, D));
  }
};

// Scratch memory of an expert's rows and their gradients, as they are and transposed, all paired.
struct RowsRoom {
  half *xt, *x, *dyt, *dy;
  RowsRoom(Room& room, i64 most, i64 D) {
    const i64 values = n_blocks(most, D) * block_values(most, D);
    xt = room.take<half>(values), x = room.take<half>(values);
    dyt = room.take<half>(values), dy = room.take<half>(values);
  }
};

i64 most_rows(const i64* counts, i64 E) { return E ? up_to(*std::max_element(counts, counts + E), ROUNDED) : 0; }

// 1 / (1 + e^-x), to 3e-6. NaN stays NaN.
__m512 sigmoid(__m512 x) {
  __m512 t = _mm512_min_ps(_mm512_set1_ps(126.f), x * -1.44269504f);  // e^-x = 2^t
  __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT);           // t minus its nearest integer
  __m512 p = r * 1.33335581e-3f + 9.61812911e-3f;                      // Taylor of 2^r: |r| is at most 1/2
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.f;
  __m512 d = _mm512_scalef_ps(p, t - r) + 1.f, about = _mm512_rcp14_ps(d);
  return about * (2.f - d * about);
}

// Write hidden, paired, from gate and up [f][n].
void activate(i64 f, i64 n, const ForwardRoom& my) {
  auto hidden = [&](i64 at) {
    __m512 gate = _mm512_loadu_ps(my.gate + at);
    return gate * sigmoid(gate) * _mm512_loadu_ps(my.up + at);
  };
  for (i64 i = 0; i < f; i += 2)
    for (i64 r = 0; r < n; r += 16) {
      i64 at = i * pitch(n) + r;
      Rounded both(hidden(at), hidden(at + pitch(n)));
      both.store_paired(my.hidden + at + r);
    }
}

// Write hidden, dgate and dup [f][n], the last two also paired, from gate, up and dhidden [f][n].
void activate_backward(i64 f, i64 n, const BackwardRoom& my) {
  const i64 ups = f * pitch(n);  // values of up follow those of gate
  for (i64 i = 0; i < f; i += 2)
    for (i64 r = 0; r < n; r += 16) {
      const i64 at = i * pitch(n) + r;
      __m512 hidden[2], dgate[2], dup[2];
      for (i64 k = 0; k < 2; k++) {
        const i64 here = at + k * pitch(n);
        __m512 gate = _mm512_loadu_ps(my.gate_up_out + here), up = _mm512_loadu_ps(my.gate_up_out + ups + here);
        __m512 dhidden = _mm512_loadu_ps(my.dhidden + here), s = sigmoid(gate), silu = gate * s;
        hidden[k] = silu * up;
        dgate[k] = dhidden * up * (s + silu * (1.f - s));
        dup[k] = dhidden * silu;
      }
      Rounded(hidden[0], hidden[1]).store(my.hidden + at, pitch(n));
      Rounded dgates(dgate[0], dgate[1]), dups(dup[0], dup[1]);
      dgates.store(my.dgate_up + at, pitch(n)), dgates.store_paired(my.dgate_up_paired + at + r);
      dups.store(my.dgate_up + ups + at, pitch(n)), dups.store_paired(my.dgate_up_paired + ups + at + r);
    }
}

}  // namespace

extern "C" {

// Return the bytes of scratch memory of forward, or of backward.
i64 forward_bytes(i64 D, i64 F, int threads) {
  Room room{nullptr};
  ForwardRoom(room, D, units_of_block(D, F, threads));
  return threads * room.used;
}

i64 backward_bytes(const i64* counts, i64 E, i64 D, i64 F, int threads) {
  Room shared{nullptr}, own{nullptr};
  RowsRoom(shared, most_rows(counts, E), D);
  BackwardRoom(own, most_rows(counts, E), D, units_of_block(D, F, threads));
  return shared.used + threads * own.used;
}

// Compute y from x. x and y are sorted rows [R][D] with counts [E] of them; gate and up are [E][F][D], and down is
// [E][D][F]. D and F are even.
void forward(const half* x, const half* gate, const half* up, const half* down, half* y, char* work, const i64* counts,
             i64 E, i64 D, i64 F, int threads) {
  struct Block {
    i64 expert, start, rows;
  };
  std::vector<Block> blocks;
  for (i64 e = 0, start = 0; e < E; start += counts[e++])
    for (i64 at = 0; at < counts[e]; at += FORWARD_ROWS)
      blocks.push_back({e, start + at, std::min(FORWARD_ROWS, counts[e] - at)});
  const i64 step = units_of_block(D, F, threads), each = forward_bytes(D, F, threads) / threads, number = blocks.size();
#pragma omp parallel num_threads(threads)
  {
    Room room{work + omp_get_thread_num() * each};
    ForwardRoom my(room, D, step);
#pragma omp for schedule(dynamic)
    for (i64 b = 0; b < number; b++) {
      auto [e, start, rows] = blocks[b];
      const half *gate_e = gate + e * F * D, *up_e = up + e * F * D, *down_e = down + e * D * F;
      i64 n = up_to(rows, ROUNDED);
      turn_paired(x + start * D, rows, n, D, my.xt, pitch(n));
      for (i64 at = 0; at < F; at += step) {
        i64 f = std::min(step, F - at);
        multiply(f, n, D, gate_e + at * D, D, my.xt, my.gate, false);
        multiply(f, n, D, up_e + at * D, D, my.xt, my.up, false);
        activate(f, n, my);
        multiply(D, n, f, down_e + at, F, my.hidden, my.yt, at > 0);
      }
      turn_rounded(my.yt, D, rows, pitch(n), y + start * D, D);
    }
    at::native::cpublas::brgemm_release();
  }
}

// Compute the gradients of x and of the weights from dy. Gradients of experts without rows are zero.
void backward(const half* x, const half* gate, const half* up, const half* down, const half* dy, half* dx, half* dgate,
              half* dup, half* ddown, char* work, const i64* counts, i64 E, i64 D, i64 F, int threads) {
  const i64 most = most_rows(counts, E), step = units_of_block(D, F, threads), n_steps = (F + step - 1) / step;
  const i64 most_of_block = rows_of_block(D), apart = block_values(most, D);
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
      const i64 R = counts[e], blocks = n_blocks(R, D), weights = e * F * D;
      has_dx[me] = false;
#pragma omp for schedule(static)
      for (i64 b = 0; b < blocks; b++) {
        i64 rows = std::min(most_of_block, R - b * most_of_block), n = up_to(rows, ROUNDED), at = b * apart;
        i64 from = (start + b * most_of_block) * D;
        turn_paired(x + from, rows, n, D, rows_of.xt + at, pitch(n));
        pair_rows(x + from, rows, n, D, rows_of.x + at, pitch(D));
        turn_paired(dy + from, rows, n, D, rows_of.dyt + at, pitch(n));
        pair_rows(dy + from, rows, n, D, rows_of.dy + at, pitch(D));
      }
#pragma omp for schedule(static)
      for (i64 s = 0; s < n_steps; s++) {
        i64 first = s * step, f = std::min(step, F - first), here = weights + first * D;
        if (R == 0) {
          for (half* gradient : {dgate, dup}) std::fill_n(gradient + here, f * D, 0);
          for (i64 d = 0; d < D; d++) std::fill_n(ddown + weights + d * F + first, f, 0);
          continue;
        }
        copy(gate + here, f, D, my.gate_up, pitch(D));
        copy(up + here, f, D, my.gate_up + f * pitch(D), pitch(D));
        turn(my.gate_up, 2 * f, D, pitch(D), my.gate_up_t, pitch(2 * f));
        turn(down + weights + first, D, f, F, my.down_t, pitch(D));
        for (i64 b = 0; b < blocks; b++) {
          i64 n = up_to(std::min(most_of_block, R - b * most_of_block), ROUNDED), at = b * apart;
          multiply(2 * f, n, D, my.gate_up, pitch(D), rows_of.xt + at, my.gate_up_out, false);
          multiply(f, n, D, my.down_t, pitch(D), rows_of.dyt + at, my.dhidden, false);
          activate_backward(f, n, my);
          multiply(2 * f, D, n, my.dgate_up, pitch(n), rows_of.x + at, my.dgate_up_sum, b > 0);
          multiply(f, D, n, my.hidden, pitch(n), rows_of.dy + at, my.ddown_sum, b > 0);
          multiply(D, n, 2 * f, my.gate_up_t, pitch(2 * f), my.dgate_up_paired, my.dxt + at, has_dx[me]);
        }
        has_dx[me] = true;
        round_all(my.dgate_up_sum, f, D, pitch(D), dgate + here);
        round_all(my.dgate_up_sum + f * pitch(D), f, D, pitch(D), dup + here);
        turn_rounded(my.ddown_sum, f, D, pitch(D), ddown + weights + first, F);
      }
#pragma omp for schedule(static)
      for (i64 b = 0; b < blocks; b++) {
        i64 rows = std::min(most_of_block, R - b * most_of_block), n = up_to(rows, ROUNDED), at = b * apart;
        // A static schedule gives thread 0 the first hidden units, so its sum always has values.
        float* sum = of[0].dxt + at;
        for (int t = 1; t < threads; t++)
          if (has_dx[t])
            for (i64 i = 0; i < D * pitch(n); i++) sum[i] += of[t].dxt[at + i];
        turn_rounded(sum, D, rows, pitch(n), dx + (start + b * most_of_block) * D, D);
      }
    }
    at::native::cpublas::brgemm_release();
  }
}
}
