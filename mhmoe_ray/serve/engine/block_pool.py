"""Which blocks of the cache hold whose keys and values, and which hold the start of a prompt that came before.

A block has room for `BLOCK` tokens. One that is full of a prompt is known by what led to it, all tokens up to its last,
so that a request which begins alike takes it over instead of computing it again. A free block keeps what it has until
it is needed; the one that has been free for longest goes first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16


class BlockPool:
    def __init__(self, blocks: int) -> None:
        """Args:
        blocks: there are, numbered from 0.
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
        """Blocks that hold the start of these tokens, as far as there are any. Nobody holds them for that."""
        found = []
        for name in names(ids):
            block = self._known.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more of each."""
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """So many free blocks, which there must be, for one holder; what they held is forgotten."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            if name := self._name.pop(block, None):
                del self._known[name]
        return taken

    def drop(self, blocks: Sequence[int]) -> None:
        """One holder less of each. The later a block in its sequence, the sooner it is taken: starts are worth more."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._name:
                    self._free.move_to_end(block, last=False)

    def remember(self, name: bytes, block: int) -> None:
        """That a full block holds what this is the name of."""
        if name not in self._known and block not in self._name:
            self._known[name] = block
            self._name[block] = name


def names(ids: Sequence[int]) -> list[bytes]:
    """Of the full blocks that these tokens fill."""
    found, before = [], b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        before = name_after(before, ids[start : start + BLOCK])
        found.append(before)
    return found


def name_after(before: bytes, ids: Sequence[int]) -> bytes:
    """Of a full block, by the name of the one before it and its own tokens."""
    return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)
