"""Duplicate detection: texts that occur more than once, compared exactly except for white space.

A document is represented by an entry of 20 bytes: 64 bits of a hash of its text, its place, and its size. Entries are
partitioned by their hash, so that all copies of a text are in the same partition and each partition can be counted by
itself. Among a hundred million texts, two different ones have the same hash with a probability of 3 in 10,000.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from mhmoe_ray.data.inspect.figures import EXAMPLES, Place

ENTRY = np.dtype([("hash", "<u8"), ("file", "<u4"), ("line", "<u4"), ("bytes", "<u4")])


def hash_of(words: Iterable[str]) -> int:
    """Return a 64-bit hash of a text, computed from its words only, so that white space does not matter."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def deal(entries: np.ndarray, partitions: int) -> list[tuple[int, np.ndarray]]:
    """Partition entries by hash; return pairs of a partition's number and its entries, without empty partitions."""
    number = entries["hash"] % np.uint64(partitions)
    return [(int(p), entries[number == p]) for p in np.unique(number)]


@dataclass
class DomainCopies:
    distinct: int = 0
    """Number of different texts in the domain."""
    extra: int = 0
    """Number of surplus documents: without them, each text would occur once in the domain."""
    extra_bytes: int = 0
    """Bytes of the surplus documents, if the longest copy of each text is kept (copies may differ in white space)."""
    elsewhere: int = 0
    """Number of different texts of this domain that another domain has too."""

    def __iadd__(self, other: "DomainCopies") -> "DomainCopies":
        self.distinct += other.distinct
        self.extra += other.extra
        self.extra_bytes += other.extra_bytes
        self.elsewhere += other.elsewhere
        return self


@dataclass
class Copies:
    """Counts of duplicates in one or more partitions. Counts of different partitions add up with `+=`."""

    distinct: int = 0
    """Number of different texts in all domains together."""
    extra: int = 0
    extra_bytes: int = 0
    domains: dict[str, DomainCopies] = field(default_factory=dict)
    pairs: Counter[str] = field(default_factory=Counter)
    """Number of different texts that two domains share, by "one domain, other domain"."""
    most: list[tuple[int, Place, Place]] = field(default_factory=list)
    """The texts with most copies: the number of copies, the place of the first one and the place of the second."""

    def __iadd__(self, other: "Copies") -> "Copies":
        self.distinct += other.distinct
        self.extra += other.extra
        self.extra_bytes += other.extra_bytes
        for name, copies in other.domains.items():
            self.domains.setdefault(name, DomainCopies())
            self.domains[name] += copies
        self.pairs += other.pairs
        self.most = sorted([*self.most, *other.most], key=lambda m: (-m[0], *m[1:]))[:EXAMPLES]
        return self


def count_copies(entries: np.ndarray, domains: Sequence[str], paths: Sequence[str]) -> Copies:
    """Count the duplicates in one partition.

    Args:
        entries: array (documents,) of dtype `ENTRY`, in any order.
        domains: the domain of each file, by file number.
        paths: the path of each file, by file number.
    """
    names, domain_of_file = np.unique(np.array(domains), return_inverse=True)
    entries = entries[np.lexsort((entries["line"], entries["file"], entries["hash"]))]
    domain = domain_of_file[entries["file"]]
    result = Copies()
    new_text = np.diff(entries["hash"], prepend=entries["hash"][:1] + np.uint64(1)) != 0
    size = entries["bytes"].astype(np.int64)
    result.distinct, result.extra = int(new_text.sum()), int((~new_text).sum())
    begin = np.flatnonzero(new_text)
    result.extra_bytes = int(size.sum() - np.maximum.reduceat(size, begin).sum()) if len(size) else 0

    text = np.cumsum(new_text) - 1
    pair = text * len(names) + domain
    longest_first = np.lexsort((-size, pair))
    first = longest_first[np.unique(pair[longest_first], return_index=True)[1]]
    again = np.ones(len(entries), bool)
    again[first] = False
    domains_of_text = np.bincount(text[first], minlength=result.distinct)
    shared = domains_of_text[text[first]] > 1
    for d in np.unique(domain):
        extra = again & (domain == d)
        mine = domain[first] == d
        result.domains[str(names[d])] = DomainCopies(
            int(mine.sum()), int(extra.sum()), int(size[extra].sum()), int((mine & shared).sum())
        )
    for group in np.split(domain[first][shared], np.flatnonzero(np.diff(text[first][shared])) + 1):
        result.pairs.update(f"{names[a]}, {names[b]}" for a, b in combinations(sorted(group), 2))

    count = np.diff(begin, append=len(entries))
    by_path = np.argsort(np.argsort(np.array(paths), kind="stable"))[entries["file"][begin]]
    for t in np.lexsort((entries["line"][begin], by_path, -count))[:EXAMPLES]:
        if count[t] > 1:
            one, other = (Place(paths[e["file"]], int(e["line"])) for e in entries[begin[t] : begin[t] + 2])
            result.most.append((int(count[t]), one, other))
    return result
