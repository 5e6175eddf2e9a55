"""KV-cache blocks: reference counts, a free list in LRU order, and prefix caching by block hash.

The block hash of a full block of `BLOCK_SIZE` tokens is the hash of all tokens up to its end, so a request that starts
with the same tokens reuses the block. The reference count of a block is the number of requests that use it. A block
with reference count 0 is free, but keeps its contents until it is allocated again: first the blocks without a block
hash, then the one that has been free for longest.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16


class BlockPool:
    """Reference counts and block hashes of all blocks of a KV cache; the keys and values are in `PagedCache`."""

    def __init__(self, block_count: int) -> None:
        """Create a pool of free blocks, whose ids count from 0."""
        self.size = block_count
        self._reference_counts = [0] * block_count
        # The free list is an ordered dictionary, so that a cache hit can remove a block from its middle in constant
        # time.
        self._free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(block_count))
        self._hash_by_block: dict[int, bytes] = {}
        self._block_by_hash: dict[bytes, int] = {}

    @property
    def free_count(self) -> int:
        """Number of blocks with reference count 0."""
        return len(self._free_blocks)

    def match_prefix(self, token_ids: Sequence[int], root_hash: bytes = b"") -> list[int]:
        """Return the ids of cached blocks that match the start of `token_ids`, without adding references to them.

        `root_hash` stands in place of the first block's parent; requests with different ones share no blocks.
        """
        matching_blocks = []
        for block_hash in block_hashes(token_ids, root_hash):
            block_id = self._block_by_hash.get(block_hash)
            if block_id is None:
                break
            matching_blocks.append(block_id)
        return matching_blocks

    def add_reference(self, block_ids: Sequence[int]) -> None:
        """Add one to the reference count of each block, which then is no longer free."""
        for block_id in block_ids:
            self._free_blocks.pop(block_id, None)
            self._reference_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks, which must exist, with reference count 1, and evict their cached contents."""
        block_ids = [self._free_blocks.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._reference_counts[block_id] = 1
            if block_hash := self._hash_by_block.pop(block_id, None):
                del self._block_by_hash[block_hash]
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Subtract one from the reference count of each block of a sequence, in the order of its tokens."""
        # The order is reversed, so that the end of a sequence is evicted before its start: requests share their starts
        # most often.
        for block_id in reversed(block_ids):
            self._reference_counts[block_id] -= 1
            if not self._reference_counts[block_id]:
                self._free_blocks[block_id] = None
                # No prompt can match a block without a block hash, so such a block is allocated first.
                if block_id not in self._hash_by_block:
                    self._free_blocks.move_to_end(block_id, last=False)

    def cache_block(self, block_hash: bytes, block_id: int) -> None:
        """Register a full block under its block hash for later prompts, unless hash or block is registered."""
        # Two requests with the same prompt may compute the same block at the same time; the first one is kept.
        if block_hash not in self._block_by_hash and block_id not in self._hash_by_block:
            self._block_by_hash[block_hash] = block_id
            self._hash_by_block[block_id] = block_hash


def block_hashes(token_ids: Sequence[int], root_hash: bytes = b"") -> list[bytes]:
    """Return the block hash of each full block of `token_ids`."""
    hashes, parent_hash = [], root_hash
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        parent_hash = next_block_hash(parent_hash, token_ids[start : start + BLOCK_SIZE])
        hashes.append(parent_hash)
    return hashes


def next_block_hash(parent_hash: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the block hash of a full block, whose parent's is the root hash for the first block."""
    # A collision would give one request the keys and values of another: 128 bits make it practically impossible.
    return hashlib.blake2b(parent_hash + array("q", token_ids).tobytes(), digest_size=16).digest()


def count_blocks(token_count: int) -> int:
    """Return the number of blocks that hold `token_count` tokens."""
    return -(-token_count // BLOCK_SIZE)
