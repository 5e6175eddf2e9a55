import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.stream import Deal


@given(world=st.integers(1, 6), b=st.integers(1, 4), n=st.integers(1, 5), rounds=st.integers(1, 4))
def test_blocks_dealt_in_turn_give_each_rank_its_micro_batches_in_order(world, b, n, rounds):
    deal = Deal(world, b, n)
    rows = np.arange(rounds * world * deal.block_rows)
    blocks = deal.position(rows).reshape(-1, deal.block_rows)
    every = np.arange(len(rows)).reshape(-1, b)
    for rank in range(world):
        assert np.array_equal(np.concatenate(blocks[rank::world]).reshape(-1, b), every[rank::world])
