"""KV-cache blocks: reference counts, a free list in LRU order, and prefix caching by block hash.

A block has room for `BLOCK` tokens. A full block of a prompt is identified by the hash of all tokens up to its last, so
that a request which starts with the same tokens reuses the block instead of computing it again. A freed block keeps its
contents until it is reallocated; the block that has been free for longest is reallocated first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16


class BlockPool:
    def __init__(self, blocks: int) -> None:
        """Create a pool of free blocks.

        Args:
            blocks: number of blocks; their ids count from 0.
        """
        self.size = blocks
        self._holders = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._name: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def known(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of cached blocks that match the start of these tokens. Does not take references."""
        found = []
        for name in names(ids):
            block = self._known.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block; free ones are taken off the free list."""
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference, evicting what they cached. So many must be free."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            if name := self._name.pop(block, None):
                del self._known[name]
        return taken

    def drop(self, blocks: Sequence[int]) -> None:
        """Drop one reference per block and free those without any.

        Later blocks of a sequence are evicted before earlier ones, because prefixes are shared most; a block without
        cached contents is evicted first.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._name:
                    self._free.move_to_end(block, last=False)

    def remember(self, name: bytes, block: int) -> None:
        """Register a full block under its hash, so that later prompts can match it.

        Nothing happens if the hash or the block is registered already.
        """
        if name not in self._known and block not in self._name:
            self._known[name] = block
            self._name[block] = name


def names(ids: Sequence[int]) -> list[bytes]:
    """Return the hash of each full block of these tokens."""
    found, before = [], b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        before = name_after(before, ids[start : start + BLOCK])
        found.append(before)
    return found


def name_after(before: bytes, ids: Sequence[int]) -> bytes:
    """Return the hash of a full block, from the hash of the block before it (empty for the first one) and its own
    tokens."""
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)
