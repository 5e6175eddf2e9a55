import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.stream import StreamLayout


@given(world=st.integers(1, 6), b=st.integers(1, 4), n=st.integers(1, 5), rounds=st.integers(1, 4))
def test_stream_layout_gives_each_rank_its_micro_batches_in_order(world, b, n, rounds):
    layout = StreamLayout(world, b, n)
    rows = np.arange(rounds * world * layout.block_rows)
    blocks = layout.positions(rows).reshape(-1, layout.block_rows)
    micro_batches = np.arange(len(rows)).reshape(-1, b)
    for rank in range(world):
        assert np.array_equal(np.concatenate(blocks[rank::world]).reshape(-1, b), micro_batches[rank::world])
