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
constexpr i64 ROW_MULTIPLE = 32;
// Rows of a block in the forward. More blocks give more threads work.
constexpr i64 FORWARD_BLOCK_ROWS = 256;

i64 round_up(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// Largest numbers of rows and of hidden units of a block in the backward: the fastest of 35 pairs at D 128, 256 and 512,
// on cores with 2 MB of cache. The units are shared out among the threads.
i64 backward_block_rows(i64 D) { return D < 384 ? 256 : 512; }
i64 block_units(i64 D, i64 F, int threads) {
  i64 best = D < 384 ? 192 : 256;
  return std::max<i64>(2, std::min(best, round_up((F + threads - 1) / threads, 2)));
}

// Distance from one row to the next in scratch memory. With a power of two, all rows would map to a few sets of the
// cache, which made products with D 256 take 1.7 times as long.
i64 pitch(i64 n) { return n + 32; }

// c [m][n] (+)= a [m][k] b [k][n]
void multiply(i64 m, i64 n, i64 k, const bf16* a, i64 pitch_a, const bf16* b, float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, pitch_a, pitch(n), pitch(n), add, reinterpret_cast<const Bf16*>(a),
                              reinterpret_cast<const Bf16*>(b), c);
}

// Number of values of a block of an expert's rows, with the pitch of both layouts.
i64 block_values(i64 max_rows, i64 D) { return pitch(std::min(backward_block_rows(D), max_rows)) * pitch(D); }
i64 row_blocks(i64 rows, i64 D) { return (rows + backward_block_rows(D) - 1) / backward_block_rows(D); }

// Allocator that hands out parts of the scratch memory. Without memory it only counts bytes.
struct Arena {
  char* start;
  i64 used = 0;
  template <class T>
  T* allocate(i64 n) {
    i64 offset = used;
    used += round_up(n * sizeof(T), 64);
    return start ? reinterpret_cast<T*>(start + offset) : nullptr;
  }
};

// Scratch memory of a thread in the forward; the table above has the shapes.
struct ForwardScratch {
  bf16 *xt, *hidden;
  float *gate, *up, *yt;
  ForwardScratch(Arena& arena, i64 D, i64 units) {
    const i64 rows = D * pitch(FORWARD_BLOCK_ROWS), hidden_rows = units * pitch(FORWARD_BLOCK_ROWS);
    xt = arena.allocate<bf16>(rows), hidden = arena.allocate<bf16>(hidden_rows);
    gate = arena.allocate<float>(hidden_rows), up = arena.allocate<float>(hidden_rows);
    yt = arena.allocate<float>(rows);
  }
};

// Scratch memory of a thread in the backward.
struct BackwardScratch {
  bf16 *gate_up, *down_t, *gate_up_t;          // weights of a block of hidden units
  float *gate_up_out, *dhidden;                // outputs of products for a block of rows
  bf16 *hidden, *dgate_up, *dgate_up_paired;   // operands of the next products
  float *dgate_up_sum, *ddown_sum, *dxt;       // gradients; dxt is that of all rows of an expert
  BackwardScratch(Arena& arena, i64 max_rows, i64 D, i64 units) {
    const i64 weights = units * pitch(D), rows = units * pitch(std::min(backward_block_rows(D), max_rows));
    gate_up = arena.allocate<bf16>(2 * weights), down_t = arena.allocate<bf16>(weights);
    gate_up_t = arena.allocate<bf16>(D * pitch(2 * units));
    gate_up_out = arena.allocate<float>(2 * rows), dhidden = arena.allocate<float>(rows);
    hidden = arena.allocate<bf16>(rows);
    dgate_up = arena.allocate<bf16>(2 * rows), dgate_up_paired = arena.allocate<bf16>(2 * rows);
    dgate_up_sum = arena.allocate<float>(2 * weights), ddown_sum = arena.allocate<float>(weights);
    dxt = arena.allocate<float>(row_blocks(max_rows, D) * block_values(max_rows, D));
  }
};

// Scratch memory of an expert's rows and their gradients, as they are and transposed, all paired.
struct RowsScratch {
  bf16 *xt, *x, *dyt, *dy;
  RowsScratch(Arena& arena, i64 max_rows, i64 D) {
    const i64 values = row_blocks(max_rows, D) * block_values(max_rows, D);
    xt = arena.allocate<bf16>(values), x = arena.allocate<bf16>(values);
    dyt = arena.allocate<bf16>(values), dy = arena.allocate<bf16>(values);
  }
};

i64 max_expert_rows(const i64* counts, i64 E) {
  return E ? round_up(*std::max_element(counts, counts + E), ROW_MULTIPLE) : 0;
}

// 1 / (1 + e^-x), to 3e-6. NaN stays NaN.
__m512 sigmoid(__m512 x) {
  __m512 t = _mm512_min_ps(_mm512_set1_ps(126.f), x * -1.44269504f);  // e^-x = 2^t
  __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT);           // t minus its nearest integer
  __m512 p = r * 1.33335581e-3f + 9.61812911e-3f;                      // Taylor of 2^r: |r| is at most 1/2
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.f;
  __m512 d = _mm512_scalef_ps(p, t - r) + 1.f, reciprocal = _mm512_rcp14_ps(d);
  return reciprocal * (2.f - d * reciprocal);
}

// Write hidden, paired, from gate and up [f][n].
void activate(i64 f, i64 n, const ForwardScratch& scratch) {
  auto hidden = [&](i64 offset) {
    __m512 gate = _mm512_loadu_ps(scratch.gate + offset);
    return gate * sigmoid(gate) * _mm512_loadu_ps(scratch.up + offset);
  };
  for (i64 i = 0; i < f; i += 2)
    for (i64 r = 0; r < n; r += 16) {
      i64 offset = i * pitch(n) + r;
      Rounded rows(hidden(offset), hidden(offset + pitch(n)));
      rows.store_paired(scratch.hidden + offset + r);
    }
}

// Write hidden, dgate and dup [f][n], the last two also paired, from gate, up and dhidden [f][n].
void activate_backward(i64 f, i64 n, const BackwardScratch& scratch) {
  const i64 ups = f * pitch(n);  // values of up follow those of gate
  for (i64 i = 0; i < f; i += 2)
    for (i64 r = 0; r < n; r += 16) {
      const i64 offset = i * pitch(n) + r;
      __m512 hidden[2], dgate[2], dup[2];
      for (i64 k = 0; k < 2; k++) {
        const i64 value = offset + k * pitch(n);
        __m512 gate = _mm512_loadu_ps(scratch.gate_up_out + value);
        __m512 up = _mm512_loadu_ps(scratch.gate_up_out + ups + value);
        __m512 dhidden = _mm512_loadu_ps(scratch.dhidden + value), s = sigmoid(gate), silu = gate * s;
        hidden[k] = silu * up;
        dgate[k] = dhidden * up * (s + silu * (1.f - s));
        dup[k] = dhidden * silu;
      }
      Rounded(hidden[0], hidden[1]).store(scratch.hidden + offset, pitch(n));
      Rounded dgates(dgate[0], dgate[1]), dups(dup[0], dup[1]);
      dgates.store(scratch.dgate_up + offset, pitch(n)), dgates.store_paired(scratch.dgate_up_paired + offset + r);
      dups.store(scratch.dgate_up + ups + offset, pitch(n));
      dups.store_paired(scratch.dgate_up_paired + ups + offset + r);
    }
}

}  // namespace

extern "C" {

// Return the bytes of scratch memory of forward, or of backward.
i64 forward_bytes(i64 D, i64 F, int threads) {
  Arena arena{nullptr};
  ForwardScratch(arena, D, block_units(D, F, threads));
  return threads * arena.used;
}

i64 backward_bytes(const i64* counts, i64 E, i64 D, i64 F, int threads) {
  Arena shared{nullptr}, own{nullptr};
  RowsScratch(shared, max_expert_rows(counts, E), D);
  BackwardScratch(own, max_expert_rows(counts, E), D, block_units(D, F, threads));
  return shared.used + threads * own.used;
}

// Compute y from x. x and y are sorted rows [R][D] with counts [E] of them; gate and up are [E][F][D], and down is
// [E][D][F]. D and F are even.
void forward(const bf16* x, const bf16* gate, const bf16* up, const bf16* down, bf16* y, char* memory,
             const i64* counts, i64 E, i64 D, i64 F, int threads) {
  struct Block {
    i64 expert, start, rows;
  };
  std::vector<Block> blocks;
  for (i64 e = 0, start = 0; e < E; start += counts[e++])
    for (i64 offset = 0; offset < counts[e]; offset += FORWARD_BLOCK_ROWS)
      blocks.push_back({e, start + offset, std::min(FORWARD_BLOCK_ROWS, counts[e] - offset)});
  const i64 step = block_units(D, F, threads), thread_bytes = forward_bytes(D, F, threads) / threads;
  const i64 block_count = blocks.size();
#pragma omp parallel num_threads(threads)
  {
    Arena arena{memory + omp_get_thread_num() * thread_bytes};
    ForwardScratch scratch(arena, D, step);
#pragma omp for schedule(dynamic)
    for (i64 b = 0; b < block_count; b++) {
      auto [e, start, rows] = blocks[b];
      const bf16 *gate_e = gate + e * F * D, *up_e = up + e * F * D, *down_e = down + e * D * F;
      i64 n = round_up(rows, ROW_MULTIPLE);
      transpose_paired(x + start * D, rows, n, D, scratch.xt, pitch(n));
      for (i64 offset = 0; offset < F; offset += step) {
        i64 f = std::min(step, F - offset);
        multiply(f, n, D, gate_e + offset * D, D, scratch.xt, scratch.gate, false);
        multiply(f, n, D, up_e + offset * D, D, scratch.xt, scratch.up, false);
        activate(f, n, scratch);
        multiply(D, n, f, down_e + offset, F, scratch.hidden, scratch.yt, offset > 0);
      }
      transpose_rounded(scratch.yt, D, rows, pitch(n), y + start * D, D);
    }
    at::native::cpublas::brgemm_release();
  }
}

// Compute the gradients of x and of the weights from dy. Gradients of experts without rows are zero.
void backward(const bf16* x, const bf16* gate, const bf16* up, const bf16* down, const bf16* dy, bf16* dx, bf16* dgate,
              bf16* dup, bf16* ddown, char* memory, const i64* counts, i64 E, i64 D, i64 F, int threads) {
  const i64 max_rows = max_expert_rows(counts, E);
  const i64 step = block_units(D, F, threads), unit_blocks = (F + step - 1) / step;
  const i64 max_block_rows = backward_block_rows(D), block_stride = block_values(max_rows, D);
  Arena arena{memory};
  RowsScratch rows_scratch(arena, max_rows, D);
  std::vector<BackwardScratch> thread_scratch;
  for (int t = 0; t < threads; t++) thread_scratch.emplace_back(arena, max_rows, D, step);
  std::vector<char> has_dx(threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const BackwardScratch& scratch = thread_scratch[thread];
    for (i64 e = 0, start = 0; e < E; start += counts[e++]) {
      const i64 R = counts[e], blocks = row_blocks(R, D), weights = e * F * D;
      has_dx[thread] = false;
#pragma omp for schedule(static)
      for (i64 b = 0; b < blocks; b++) {
        i64 rows = std::min(max_block_rows, R - b * max_block_rows), n = round_up(rows, ROW_MULTIPLE);
        i64 offset = b * block_stride;
        i64 from = (start + b * max_block_rows) * D;
        transpose_paired(x + from, rows, n, D, rows_scratch.xt + offset, pitch(n));
        pair_rows(x + from, rows, n, D, rows_scratch.x + offset, pitch(D));
        transpose_paired(dy + from, rows, n, D, rows_scratch.dyt + offset, pitch(n));
        pair_rows(dy + from, rows, n, D, rows_scratch.dy + offset, pitch(D));
      }
#pragma omp for schedule(static)
      for (i64 s = 0; s < unit_blocks; s++) {
        i64 first = s * step, f = std::min(step, F - first), first_weight = weights + first * D;
        if (R == 0) {
          for (bf16* gradient : {dgate, dup}) std::fill_n(gradient + first_weight, f * D, 0);
          for (i64 d = 0; d < D; d++) std::fill_n(ddown + weights + d * F + first, f, 0);
          continue;
        }
        copy(gate + first_weight, f, D, scratch.gate_up, pitch(D));
        copy(up + first_weight, f, D, scratch.gate_up + f * pitch(D), pitch(D));
        transpose(scratch.gate_up, 2 * f, D, pitch(D), scratch.gate_up_t, pitch(2 * f));
        transpose(down + weights + first, D, f, F, scratch.down_t, pitch(D));
        for (i64 b = 0; b < blocks; b++) {
          i64 n = round_up(std::min(max_block_rows, R - b * max_block_rows), ROW_MULTIPLE), offset = b * block_stride;
          multiply(2 * f, n, D, scratch.gate_up, pitch(D), rows_scratch.xt + offset, scratch.gate_up_out, false);
          multiply(f, n, D, scratch.down_t, pitch(D), rows_scratch.dyt + offset, scratch.dhidden, false);
          activate_backward(f, n, scratch);
          multiply(2 * f, D, n, scratch.dgate_up, pitch(n), rows_scratch.x + offset, scratch.dgate_up_sum, b > 0);
          multiply(f, D, n, scratch.hidden, pitch(n), rows_scratch.dy + offset, scratch.ddown_sum, b > 0);
          multiply(D, n, 2 * f, scratch.gate_up_t, pitch(2 * f), scratch.dgate_up_paired, scratch.dxt + offset,
                   has_dx[thread]);
        }
        has_dx[thread] = true;
        round_all(scratch.dgate_up_sum, f, D, pitch(D), dgate + first_weight);
        round_all(scratch.dgate_up_sum + f * pitch(D), f, D, pitch(D), dup + first_weight);
        transpose_rounded(scratch.ddown_sum, f, D, pitch(D), ddown + weights + first, F);
      }
#pragma omp for schedule(static)
      for (i64 b = 0; b < blocks; b++) {
        i64 rows = std::min(max_block_rows, R - b * max_block_rows), n = round_up(rows, ROW_MULTIPLE);
        i64 offset = b * block_stride;
        // A static schedule gives thread 0 the first hidden units, so its sum always has values.
        float* sum = thread_scratch[0].dxt + offset;
        for (int t = 1; t < threads; t++)
          if (has_dx[t])
            for (i64 i = 0; i < D * pitch(n); i++) sum[i] += thread_scratch[t].dxt[offset + i];
        transpose_rounded(sum, D, rows, pitch(n), dx + (start + b * max_block_rows) * D, D);
      }
    }
    at::native::cpublas::brgemm_release();
  }
}
}
