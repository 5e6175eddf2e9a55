"""Kernels of the router: logits, and softmax, top-k, gates, counts and losses in one pass over them, with gradients.

Each program of a pass takes several blocks of rows and keeps its own sums over rows, which `sum_programs` adds. Without
atomic additions, results are bitwise reproducible.
"""

import triton
import triton.language as tl

from mhmoe_kernels.triton.functions import dot


@triton.jit(do_not_specialize=["ROWS", "PART"])
def multiply(
    a_MK, b_KN, c_SMN, ROWS, PART, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute c = a @ b; the one of M and K that is None is ROWS. A transposed operand is stored column by column.

    A program adds PART blocks of terms, and stores its sums in the M x N values that belong to its part.
    """
    m_size, k_size = ROWS if M is None else M, ROWS if K is None else K
    a_row_stride, a_term_stride = (1, M) if A_TRANSPOSED else (K, 1)
    b_term_stride, b_column_stride = (1, K) if B_TRANSPOSED else (N, 1)
    column_blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * PART * BLOCK_K
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block_start in range(start, tl.minimum(start + PART * BLOCK_K, k_size), BLOCK_K):
        term = block_start + tl.arange(0, BLOCK_K)
        wide_row, wide_term = row.to(tl.int64)[:, None], term.to(tl.int64)
        a_mask = (row < m_size)[:, None] & (term < k_size)[None, :]
        a_block = tl.load(a_MK + wide_row * a_row_stride + wide_term[None, :] * a_term_stride, mask=a_mask, other=0.0)
        b_mask = (term < k_size)[:, None] & (column < N)[None, :]
        b_block = tl.load(
            b_KN + wide_term[:, None] * b_term_stride + column[None, :] * b_column_stride, mask=b_mask, other=0.0
        )
        # Three products of tf32 are about as exact as one of float32, and matrix units compute them.
        sums = dot(a_block.to(tl.float32), b_block.to(tl.float32), sums, "tf32x3")
    c_SMN += (tl.program_id(1).to(tl.int64) * m_size + row[:, None]) * N + column[None, :]
    tl.store(c_SMN, sums.to(c_SMN.dtype.element_ty), mask=(row < m_size)[:, None] & (column < N)[None, :])


@triton.jit
def _load_logits(logits_NE, row, N, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load the logits of a block of rows; columns past E are -inf, and rows past N are 0."""
    expert = tl.arange(0, BLOCK_E)
    value_offset = row.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(logits_NE + value_offset, mask=(row < N)[:, None] & (expert < E)[None, :], other=0.0)
    return tl.where((expert < E)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["N"])
def route_rows(
    logits_NE, expert_NK, gate_NK, log_sum_N, probability_PE, first_PE, count_PE, z_P, N, scale,
    E: tl.constexpr, K: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Choose the experts of each row, and store a program's sums over its rows.

    They are each expert's probabilities, first choices and all choices, and the squared log-sum-exp.
    """
    program = tl.program_id(0)
    column, choice = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    probability_sum, z_sum = tl.zeros([BLOCK_E], tl.float32), 0.0
    first_sum, count_sum = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
    for block in range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < N
        logits = _load_logits(logits_NE, row, N, E, BLOCK_E)
        largest = tl.max(logits, 1)
        exponential = tl.exp(logits - largest[:, None])
        total = tl.sum(exponential, 1)
        log_sum = largest + tl.log(total)
        tl.store(log_sum_N + row, log_sum, mask=inside)
        probability = exponential / total[:, None]
        probability_sum += tl.sum(tl.where(inside[:, None], probability, 0.0), 0)
        z_sum += tl.sum(tl.where(inside, log_sum * log_sum, 0.0), 0)
        # A gate is an exponential divided by the sum of the row's chosen exponentials, or of all of the row's
        # exponentials. A row of NaN must still choose experts that exist, so NaN, -inf and logits below -3.4e38
        # rank equally, above the padding columns past the E experts. The gates of such a row are NaN.
        ranks = tl.where((column < E)[None, :], tl.maximum(logits, -3.4e38), float("-inf"))
        remaining, gates = ranks, tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        first_expert = tl.zeros([BLOCK_N], tl.int32)
        # An unrolled loop would take seconds to compile.
        for k in tl.range(K, loop_unroll_factor=1):
            chosen_expert = tl.argmax(remaining, 1)
            is_chosen = column[None, :] == chosen_expert[:, None]
            remaining = tl.where(is_chosen, float("-inf"), remaining)
            gate = tl.sum(tl.where(is_chosen, exponential, 0.0), 1)
            first_expert = tl.where(k == 0, chosen_expert, first_expert)
            gates = tl.where((choice == k)[None, :], gate[:, None], gates)
            tl.store(expert_NK + row.to(tl.int64) * K + k, chosen_expert.to(tl.int64), mask=inside)
        is_chosen = (remaining == float("-inf")) & (column < E)[None, :] & inside[:, None]
        count_sum += tl.sum(is_chosen.to(tl.int32), 0)
        is_first = (column[None, :] == first_expert[:, None]) & inside[:, None]
        first_sum += tl.sum(is_first.to(tl.int32), 0)
        divisor = tl.sum(gates, 1) if NORMALIZED else total
        value_offset = row.to(tl.int64)[:, None] * K + choice[None, :]
        tl.store(gate_NK + value_offset, gates / divisor[:, None] * scale, mask=inside[:, None] & (choice < K)[None, :])
    value_offset, mask = program * E + column, column < E
    tl.store(probability_PE + value_offset, probability_sum, mask=mask)
    tl.store(first_PE + value_offset, first_sum, mask=mask)
    tl.store(count_PE + value_offset, count_sum, mask=mask)
    tl.store(z_P + program, z_sum)


@triton.jit(do_not_specialize=["P", "N"])
def sum_programs(
    probability_PE, first_PE, count_PE, z_P, share_E, count_E, balance, z, P, N,
    E: tl.constexpr, K: tl.constexpr, COUNTS_FIRST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add the sums of all programs; store the counts and shares of experts and the two losses."""
    column = tl.arange(0, BLOCK_E)
    probability_sum, z_sum = tl.zeros([BLOCK_E], tl.float32), 0.0
    first_sum, count_sum = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, P, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        value_offset = program[:, None] * E + column[None, :]
        mask = (program < P)[:, None] & (column < E)[None, :]
        probability_sum += tl.sum(tl.load(probability_PE + value_offset, mask=mask, other=0.0), 0)
        first_sum += tl.sum(tl.load(first_PE + value_offset, mask=mask, other=0), 0)
        count_sum += tl.sum(tl.load(count_PE + value_offset, mask=mask, other=0), 0)
        z_sum += tl.sum(tl.load(z_P + program, mask=program < P, other=0.0), 0)
    share = first_sum / (N * 1.0) if COUNTS_FIRST else count_sum / (N * 1.0 * K)
    tl.store(share_E + column, share, mask=column < E)
    tl.store(count_E + column, count_sum.to(tl.int64), mask=column < E)
    tl.store(balance, E * tl.sum(probability_sum / N * share, 0))
    tl.store(z, z_sum / N)


@triton.jit
def _load_gate_gradient(dgate_NK, kept_NK, value_offset, inside, HAS_DROPS: tl.constexpr):
    """Load the gradients of gates, with 0 for routes that were dropped."""
    mask = inside & tl.load(kept_NK + value_offset, mask=inside, other=0).to(tl.int1) if HAS_DROPS else inside
    return tl.load(dgate_NK + value_offset, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N"])
def route_rows_backward(
    logits_NE, expert_NK, gate_NK, log_sum_N, share_E, dgate_NK, dbalance, dz, kept_NK, dlogits_NE, N,
    scale, E: tl.constexpr, K: tl.constexpr, NORMALIZED: tl.constexpr, HAS_DROPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the logits from those of the gates and the two losses."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, column = row < N, tl.arange(0, BLOCK_E)
    logits = _load_logits(logits_NE, row, N, E, BLOCK_E)
    log_sum = tl.load(log_sum_N + row, mask=inside, other=0.0)
    probability = tl.exp(logits - log_sum[:, None])
    # The gradient of the probabilities comes from the load balancing loss E * sum_e mean_n(p_ne) * share_e, and from
    # the gates, if they are probabilities.
    share = tl.load(share_E + column, mask=column < E, other=0.0)
    dprobability = (tl.load(dbalance) * E / N * share)[None, :] + tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dlogits = (tl.load(dz) * 2 / N * log_sum)[:, None] * probability
    gate_product = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.range(K, loop_unroll_factor=1):
        value_offset = row.to(tl.int64) * K + k
        dgate = _load_gate_gradient(dgate_NK, kept_NK, value_offset, inside, HAS_DROPS)
        if NORMALIZED:
            gate_product += dgate * tl.load(gate_NK + value_offset, mask=inside, other=0.0)
        else:
            is_chosen = column[None, :] == tl.load(expert_NK + value_offset, mask=inside, other=0)[:, None]
            dprobability += tl.where(is_chosen, (dgate * scale)[:, None], 0.0)
    if NORMALIZED:
        # The gates are `scale` times a softmax of the chosen logits.
        for k in tl.range(K, loop_unroll_factor=1):
            value_offset = row.to(tl.int64) * K + k
            is_chosen = column[None, :] == tl.load(expert_NK + value_offset, mask=inside, other=0)[:, None]
            gate = tl.load(gate_NK + value_offset, mask=inside, other=0.0)
            dgate = _load_gate_gradient(dgate_NK, kept_NK, value_offset, inside, HAS_DROPS)
            dlogits += tl.where(is_chosen, (gate * (dgate - gate_product / scale))[:, None], 0.0)
    product = tl.sum(tl.where((column < E)[None, :], probability * dprobability, 0.0), 1)
    dlogits += probability * (dprobability - product[:, None])
    value_offset = row.to(tl.int64)[:, None] * E + column[None, :]
    tl.store(dlogits_NE + value_offset, dlogits, mask=inside[:, None] & (column < E)[None, :])


@triton.jit(do_not_specialize=["N", "capacity"])
def drop_routes(
    expert_NK, gate_NK, slot_KN, offset_E1, kept_gate_NK, kept_NK, count_E, dropped, N, capacity,
    E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Set the gates of routes beyond the expert capacity to 0; the first program also counts the kept routes.

    Routes queue for their expert in the order of slots, in which all first choices come before all second ones.
    """
    route = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = route < N * K
    expert = tl.load(expert_NK + route, mask=inside, other=0)
    slot = tl.load(slot_KN + (route % K) * N + route // K, mask=inside, other=0)
    is_kept = slot - tl.load(offset_E1 + expert, mask=inside, other=0) < capacity
    gate = tl.load(gate_NK + route, mask=inside, other=0.0)
    tl.store(kept_gate_NK + route, tl.where(is_kept, gate, 0.0), mask=inside)
    tl.store(kept_NK + route, is_kept, mask=inside)
    if tl.program_id(0) == 0:
        column = tl.arange(0, BLOCK_E)
        start = tl.load(offset_E1 + column, mask=column < E, other=0)
        count = tl.minimum(tl.load(offset_E1 + column + 1, mask=column < E, other=0) - start, capacity)
        tl.store(count_E + column, count.to(tl.int64), mask=column < E)
        tl.store(dropped, (N * K - tl.sum(count, 0)).to(tl.int64))
