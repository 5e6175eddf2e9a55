import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.stream import BLOCK_BYTES, BLOCKS_PER_TASK, MAX_TABLES, StreamLayout, task_blocks


@given(world=st.integers(1, 6), b=st.integers(1, 4), n=st.integers(1, 5), rounds=st.integers(1, 4))
def test_stream_layout_gives_each_rank_its_micro_batches_in_order(world, b, n, rounds):
    layout = StreamLayout(world, b, n)
    rows = np.arange(rounds * world * layout.block_rows)
    blocks = layout.positions(rows).reshape(-1, layout.block_rows)
    micro_batches = np.arange(len(rows)).reshape(-1, b)
    for rank in range(world):
        assert np.array_equal(np.concatenate(blocks[rank::world]).reshape(-1, b), micro_batches[rank::world])


def test_stream_layout_numbers_the_rows_of_blocks():
    layout = StreamLayout(world_size=2, micro_batch_size=3, micro_batches=2)
    assert layout.rows(np.array([0, 4])).tolist() == [*range(6), *range(24, 30)]


def test_tasks_of_long_runs_are_longer_but_their_blocks_stay_below_half_a_gigabyte():
    assert task_blocks(100, BLOCK_BYTES) == BLOCKS_PER_TASK
    assert task_blocks(64 * MAX_TABLES, BLOCK_BYTES) == 64
    assert task_blocks(10**9, BLOCK_BYTES) == 512
    assert task_blocks(10**9, 10 * BLOCK_BYTES) == 51
    assert task_blocks(10**9, 100 * BLOCK_BYTES) == 5
    assert task_blocks(10**9, 10**9) == 1
