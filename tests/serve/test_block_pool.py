"""The block pool against a simple account of its blocks."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mhmoe_ray.serve.engine.block_pool import BLOCK, BlockPool, blocks_for, names

SIZE = 6


class Account(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """Hash of the tokens that were written last into each block."""

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def begin(self, letters):
        """Begin a sequence whose blocks are all of one letter each, so that many sequences begin alike."""
        ids = [letter for letter in letters for _ in range(BLOCK)]
        wanted, known = names(ids), self.pool.known(ids)
        for name, block in zip(wanted, known, strict=False):
            assert self.content[block] == name
        self.pool.hold(known)
        needed = blocks_for(len(ids)) - len(known)
        if needed > self.pool.free:
            self.pool.drop(known)
            return
        taken = self.pool.take(needed)
        others = {block for blocks in self.held for block in blocks}
        assert not others & set(taken)
        assert len(set(taken)) == needed
        blocks = [*known, *taken]
        for name, block in list(zip(wanted, blocks, strict=True))[len(known) :]:
            self.content[block] = name
            self.pool.remember(name, block)
        self.held.append(blocks)

    @rule(data=st.data())
    def end(self, data):
        if self.held:
            self.pool.drop(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def none_is_lost(self):
        assert self.pool.free == SIZE - len({block for blocks in self.held for block in blocks})


Account.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestAccount = Account.TestCase


def test_a_start_is_found_again_until_its_block_is_needed():
    pool, ids = BlockPool(3), [*range(2 * BLOCK)]
    blocks = pool.take(2)
    for name, block in zip(names(ids), blocks, strict=True):
        pool.remember(name, block)
    pool.drop(blocks)
    assert pool.known(ids) == blocks
    assert pool.known(ids[: BLOCK + 3]) == blocks[:1]
    assert pool.known([7, *ids[1:]]) == []
    [fresh] = pool.take(1)  # the one that never held anything goes first
    assert fresh not in blocks
    [last] = pool.take(1)  # then the end of a sequence
    assert last == blocks[1]
    assert pool.known(ids) == blocks[:1]


def test_names_depend_on_all_that_came_before():
    a, b = names([1] * BLOCK + [2] * BLOCK), names([3] * BLOCK + [2] * BLOCK)
    assert a[1] != b[1]
    assert names([1] * (BLOCK - 1)) == []
