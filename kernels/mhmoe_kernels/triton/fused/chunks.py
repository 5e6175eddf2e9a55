"""Tiles of rows of width D, held as chunks whose widths are powers of two.

The sides of Triton's tiles are powers of two. Rounding up widths such as 192 = 768/4 and 384 = 768/2 would cost the
matrix units a third more work. A row is therefore a tuple of chunks: 192 = 128 + 64, 384 = 256 + 128. A product that
sums over D is the sum of the chunks' products; one whose result has width D is one product for each chunk. Sums are
float32.
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.functions import dot

# Largest and smallest width of a chunk of a row: the largest N of Hopper's matrix instruction wgmma, and the smallest K
# of a bfloat16 product.
_MAX_WIDTH, _MIN_WIDTH = 256, 16


def chunk_widths(width: int) -> tuple[int, ...]:
    """Return the widths of a row's chunks: falling powers of two, at most 256.

    They add up to `width`, rounded up to a multiple of 16.
    """
    remaining_width, chunks = -(-width // _MIN_WIDTH) * _MIN_WIDTH, []
    while remaining_width:
        chunks.append(min(_MAX_WIDTH, 1 << remaining_width.bit_length() - 1))
        remaining_width -= chunks[-1]
    return tuple(chunks)


@triton.constexpr_function
def _width(chunks: tuple[int, ...], c: int) -> int:
    return int(chunks[c])


@triton.constexpr_function
def _column_offset(chunks: tuple[int, ...], c: int) -> int:
    return sum(chunks[:c])


@triton.jit
def chunk_columns(CHUNKS: tl.constexpr, c: tl.constexpr) -> tl.tensor:
    """Return the columns of a row that chunk c holds; the last chunk may have columns past D."""
    return _column_offset(CHUNKS, c) + tl.arange(0, _width(CHUNKS, c))


@triton.jit
def load_rows(
    x_ND: tl.tensor, row_B: tl.tensor, inside_B: tl.tensor, D: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tuple:
    """Load rows of a matrix [*, D] as chunks [B, width]; rows where `inside_B` is False become zeros."""
    chunks = ()
    for c in tl.static_range(len(CHUNKS)):
        col = chunk_columns(CHUNKS, c)
        mask = inside_B[:, None] & (col < D)[None, :]
        chunks = chunks + (tl.load(x_ND + row_B[:, None] * D + col[None, :], mask=mask, other=0.0),)
    return chunks


@triton.jit
def load_columns(
    w: tl.tensor, f_B: tl.tensor, F: tl.constexpr, TRANSPOSED: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tuple:
    """Load the columns `f_B` of a matrix [D, F], or rows of [F, D] if TRANSPOSED, as chunks [width, B]."""
    chunks = ()
    for c in tl.static_range(len(CHUNKS)):
        col = chunk_columns(CHUNKS, c)[:, None]
        offset = f_B[None, :] * D + col if TRANSPOSED else col * F + f_B[None, :]
        chunks = chunks + (tl.load(w + offset, mask=(col < D) & (f_B < F)[None, :], other=0.0),)
    return chunks


@triton.jit
def store_rows(
    x_ND: tl.tensor, row_B: tl.tensor, inside_B: tl.tensor, chunks: tl.tuple, D: tl.constexpr, CHUNKS: tl.constexpr
) -> None:
    """Store chunks [B, width] in rows of a matrix [*, D]; rows where `inside_B` is False are skipped."""
    for c in tl.static_range(len(CHUNKS)):
        col = chunk_columns(CHUNKS, c)
        mask = inside_B[:, None] & (col < D)[None, :]
        tl.store(x_ND + row_B[:, None] * D + col[None, :], chunks[c].to(x_ND.dtype.element_ty), mask=mask)


@triton.jit
def store_columns(
    w: tl.tensor, f_B: tl.tensor, F: tl.constexpr, chunks: tl.tuple, TRANSPOSED: tl.constexpr,
    D: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """Store chunks [width, B] in the columns `f_B` of a matrix [D, F], or in rows of [F, D] if TRANSPOSED."""
    for c in tl.static_range(len(CHUNKS)):
        col = chunk_columns(CHUNKS, c)[:, None]
        mask = (col < D) & (f_B < F)[None, :]
        offset = f_B[None, :] * D + col if TRANSPOSED else col * F + f_B[None, :]
        tl.store(w + offset, chunks[c].to(w.dtype.element_ty), mask=mask)


@triton.jit
def zeros_rows(B: tl.constexpr, CHUNKS: tl.constexpr) -> tl.tuple:
    """Return chunks [B, width] of float32 zeros."""
    chunks = ()
    for c in tl.static_range(len(CHUNKS)):
        chunks = chunks + (tl.zeros([B, _width(CHUNKS, c)], tl.float32),)
    return chunks


@triton.jit
def zeros_columns(B: tl.constexpr, CHUNKS: tl.constexpr) -> tl.tuple:
    """Return chunks [width, B] of float32 zeros."""
    chunks = ()
    for c in tl.static_range(len(CHUNKS)):
        chunks = chunks + (tl.zeros([_width(CHUNKS, c), B], tl.float32),)
    return chunks


@triton.jit
def scale_rows(chunks: tl.tuple, scale_B1: tl.tensor) -> tl.tuple:
    """Return chunks [B, width] with each row multiplied by its scale."""
    scaled = ()
    for c in tl.static_range(len(chunks)):
        scaled = scaled + (chunks[c] * scale_B1,)
    return scaled


@triton.jit
def matmul(rows: tl.tuple, w: tl.tuple, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """Return rows [B, D] @ w [D, F], as [B, F]; if TRANSPOSED, w is chunks of [F, D]."""
    F: tl.constexpr = w[0].shape[0 if TRANSPOSED else 1]
    out = tl.zeros([rows[0].shape[0], F], tl.float32)
    for c in tl.static_range(len(rows)):
        out = dot(rows[c], w[c].T if TRANSPOSED else w[c], out)
    return out


@triton.jit
def add_matmul(sums: tl.tuple, h: tl.tensor, w: tl.tuple, TRANSPOSED: tl.constexpr) -> tl.tuple:
    """Return sums [B, D] + h [B, F] @ w [F, D], with h rounded to w's dtype; if TRANSPOSED, w is chunks of [D, F]."""
    chunks = ()
    for c in tl.static_range(len(sums)):
        chunks = chunks + (dot(h.to(w[c].dtype), w[c].T if TRANSPOSED else w[c], sums[c]),)
    return chunks


@triton.jit
def add_outer(sums: tl.tuple, rows: tl.tuple, h: tl.tensor) -> tl.tuple:
    """Return sums [D, F] + rows [B, D] transposed @ h [B, F], with h rounded to the rows' dtype."""
    chunks = ()
    for c in tl.static_range(len(sums)):
        chunks = chunks + (dot(rows[c].T, h.to(rows[c].dtype), sums[c]),)
    return chunks
