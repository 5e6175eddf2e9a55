"""Tests of the block pool against a simple model of its reference counts and block hashes."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mhmoe_ray.serving.engine.block_pool import BLOCK_SIZE, BlockPool, block_hashes, count_blocks

SIZE = 6


class BlockPoolMachine(RuleBasedStateMachine):
    """State machine that starts and ends sequences, and checks which blocks the pool matches, allocates and frees."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.sequences: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """Block hash of the tokens that were last written into each block."""

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def start_sequence(self, letters):
        """Start a sequence; each of its blocks repeats one letter, so many sequences start with the same blocks."""
        token_ids = [letter for letter in letters for _ in range(BLOCK_SIZE)]
        hashes, matching_blocks = block_hashes(token_ids), self.pool.match_prefix(token_ids)
        for block_hash, block_id in zip(hashes, matching_blocks, strict=False):
            assert self.content[block_id] == block_hash
        self.pool.add_reference(matching_blocks)
        new_count = count_blocks(len(token_ids)) - len(matching_blocks)
        if new_count > self.pool.free_count:
            self.pool.release(matching_blocks)
            return
        new_blocks = self.pool.allocate(new_count)
        used_blocks = {block for blocks in self.sequences for block in blocks}
        assert not used_blocks & set(new_blocks)
        assert len(set(new_blocks)) == new_count
        blocks = [*matching_blocks, *new_blocks]
        for block_hash, block_id in list(zip(hashes, blocks, strict=True))[len(matching_blocks) :]:
            self.content[block_id] = block_hash
            self.pool.cache_block(block_hash, block_id)
        self.sequences.append(blocks)

    @rule(data=st.data())
    def end_sequence(self, data):
        if self.sequences:
            self.pool.release(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))))

    @invariant()
    def free_count_is_exact(self):
        assert self.pool.free_count == SIZE - len({block for blocks in self.sequences for block in blocks})


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestBlockPoolMachine = BlockPoolMachine.TestCase


def test_cached_prefix_matches_until_its_block_is_reallocated():
    pool, token_ids = BlockPool(3), [*range(2 * BLOCK_SIZE)]
    blocks = pool.allocate(2)
    for block_hash, block_id in zip(block_hashes(token_ids), blocks, strict=True):
        pool.cache_block(block_hash, block_id)
    pool.release(blocks)
    assert pool.match_prefix(token_ids) == blocks
    assert pool.match_prefix(token_ids[: BLOCK_SIZE + 3]) == blocks[:1]
    assert pool.match_prefix([7, *token_ids[1:]]) == []
    [empty_block] = pool.allocate(1)  # a block without cached contents is evicted first
    assert empty_block not in blocks
    [tail_block] = pool.allocate(1)  # of cached blocks, the end of the sequence is evicted first
    assert tail_block == blocks[1]
    assert pool.match_prefix(token_ids) == blocks[:1]


def test_block_hash_depends_on_all_earlier_tokens():
    first_hashes, second_hashes = (
        block_hashes([1] * BLOCK_SIZE + [2] * BLOCK_SIZE),
        block_hashes([3] * BLOCK_SIZE + [2] * BLOCK_SIZE),
    )
    assert first_hashes[1] != second_hashes[1]
    assert block_hashes([1] * (BLOCK_SIZE - 1)) == []
