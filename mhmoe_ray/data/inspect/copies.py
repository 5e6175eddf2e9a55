"""Duplicate detection: texts that occur more than once, compared exactly except for white space.

An entry of 20 bytes represents a document: 64 bits of a hash of its text, its location, and its size. Entries are
partitioned by hash, so partitions can be counted separately. Among a hundred million texts, two different ones have the
same hash with a probability of 3 in 10,000.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from mhmoe_ray.data.inspect.figures import EXAMPLES, TextLocation

# The byte order of each field is fixed, because tasks pass entries to each other as bytes.
ENTRY_DTYPE = np.dtype([("hash", "<u8"), ("file", "<u4"), ("line", "<u4"), ("bytes", "<u4")])


def text_hash(words: Iterable[str]) -> int:
    """Return a 64-bit hash of a text's words."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def partition_entries(entries: np.ndarray, partitions: int) -> list[tuple[int, np.ndarray]]:
    """Partition entries by hash; return the number and the entries of each non-empty partition."""
    partition_of_entry = entries["hash"] % np.uint64(partitions)
    return [(int(p), entries[partition_of_entry == p]) for p in np.unique(partition_of_entry)]


@dataclass
class DomainCopies:
    """Counts of duplicates in one domain."""

    distinct: int = 0
    extra: int = 0
    """Documents beyond one for each text."""
    extra_bytes: int = 0
    """Bytes of the extra documents if the longest copy of each text is kept (copies may differ in white space)."""
    shared_texts: int = 0
    """Different texts that also occur in another domain."""

    def __iadd__(self, addend: "DomainCopies") -> "DomainCopies":
        self.distinct += addend.distinct
        self.extra += addend.extra
        self.extra_bytes += addend.extra_bytes
        self.shared_texts += addend.shared_texts
        return self


@dataclass
class Copies:
    """Counts of duplicates in partitions, which `+=` adds up; `distinct` and `extra` are over all domains."""

    distinct: int = 0
    extra: int = 0
    extra_bytes: int = 0
    domains: dict[str, DomainCopies] = field(default_factory=dict)
    pairs: Counter[str] = field(default_factory=Counter)
    """Different texts that two domains share, by their sorted names, joined by ", "."""
    most_copied: list[tuple[int, TextLocation, TextLocation]] = field(default_factory=list)
    """Number of copies of the most copied texts, with the locations of the first and the second copy."""

    def __iadd__(self, addend: "Copies") -> "Copies":
        self.distinct += addend.distinct
        self.extra += addend.extra
        self.extra_bytes += addend.extra_bytes
        for name, copies in addend.domains.items():
            self.domains.setdefault(name, DomainCopies())
            self.domains[name] += copies
        self.pairs += addend.pairs
        self.most_copied = sorted([*self.most_copied, *addend.most_copied], key=lambda m: (-m[0], *m[1:]))[:EXAMPLES]
        return self


def count_copies(entries: np.ndarray, domains: Sequence[str], paths: Sequence[str]) -> Copies:
    """Count the duplicate texts in one partition.

    `entries` is an array (documents,) of dtype `ENTRY_DTYPE`, in any order. `domains` and `paths` are indexed by file
    number.
    """
    names, domain_of_file = np.unique(np.array(domains), return_inverse=True)
    # Sorting puts copies side by side, and makes the result independent of the order of the entries.
    entries = entries[np.lexsort((entries["line"], entries["file"], entries["hash"]))]
    entry_domain = domain_of_file[entries["file"]]
    result = Copies()
    # The prepended value differs from the first hash, so that the first entry counts as a new text too.
    is_new_text = np.diff(entries["hash"], prepend=entries["hash"][:1] + np.uint64(1)) != 0
    sizes = entries["bytes"].astype(np.int64)
    result.distinct, result.extra = int(is_new_text.sum()), int((~is_new_text).sum())
    text_starts = np.flatnonzero(is_new_text)
    result.extra_bytes = int(sizes.sum() - np.maximum.reduceat(sizes, text_starts).sum()) if len(sizes) else 0

    text_of_entry = np.cumsum(is_new_text) - 1
    text_domain_key = text_of_entry * len(names) + entry_domain
    # In each domain the longest copy of a text counts as the one that is kept, and all other copies are surplus.
    longest_first = np.lexsort((-sizes, text_domain_key))
    longest_copies = longest_first[np.unique(text_domain_key[longest_first], return_index=True)[1]]
    is_surplus = np.ones(len(entries), bool)
    is_surplus[longest_copies] = False
    domains_of_text = np.bincount(text_of_entry[longest_copies], minlength=result.distinct)
    is_shared = domains_of_text[text_of_entry[longest_copies]] > 1
    for d in np.unique(entry_domain):
        is_extra = is_surplus & (entry_domain == d)
        is_in_domain = entry_domain[longest_copies] == d
        result.domains[str(names[d])] = DomainCopies(
            int(is_in_domain.sum()),
            int(is_extra.sum()),
            int(sizes[is_extra].sum()),
            int((is_in_domain & is_shared).sum()),
        )
    for group in np.split(
        entry_domain[longest_copies][is_shared], np.flatnonzero(np.diff(text_of_entry[longest_copies][is_shared])) + 1
    ):
        result.pairs.update(f"{names[a]}, {names[b]}" for a, b in combinations(sorted(group), 2))

    copy_counts = np.diff(text_starts, append=len(entries))
    path_rank = np.argsort(np.argsort(np.array(paths), kind="stable"))[entries["file"][text_starts]]
    for t in np.lexsort((entries["line"][text_starts], path_rank, -copy_counts))[:EXAMPLES]:
        if copy_counts[t] > 1:
            first_location, second_location = (
                TextLocation(paths[e["file"]], int(e["line"])) for e in entries[text_starts[t] : text_starts[t] + 2]
            )
            result.most_copied.append((int(copy_counts[t]), first_location, second_location))
    return result
