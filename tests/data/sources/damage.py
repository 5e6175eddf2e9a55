"""Damage to bytes at drawn places, and the parts that are known to be untouched afterwards."""

from typing import NamedTuple

from hypothesis import strategies as st


class Edit(NamedTuple):
    """A replacement of `removed` bytes by `added` at a place of the original."""

    at: int
    removed: int
    added: bytes


def edits(size: int) -> st.SearchStrategy[list[Edit]]:
    """Return a strategy for changes, deletions, insertions and truncations that do not overlap, in ascending order."""
    junk = st.one_of(
        st.binary(max_size=12), st.sampled_from([b"\n", b'"', b"\0" * 64, b"\xff", b"\xef\xbb\xbf", b"\r\n", b"}{"])
    )
    near_the_end = st.integers(0, min(64, size)).map(lambda back: size - back)
    one = st.builds(
        Edit,
        at=st.one_of(st.integers(0, size), near_the_end),
        removed=st.sampled_from([0, 1, 1, 2, 7, 50, size]),
        added=junk,
    )
    return st.lists(one, min_size=1, max_size=4).map(lambda drawn: _apart(sorted(drawn), size))


def _apart(drawn: list[Edit], size: int) -> list[Edit]:
    kept: list[Edit] = []
    for edit in drawn:
        removed = min(edit.removed, size - edit.at)
        if kept and edit.at <= kept[-1].at + kept[-1].removed:
            continue
        kept.append(edit._replace(removed=removed))
    return kept


def damaged(data: bytes, made: list[Edit]) -> bytes:
    for edit in reversed(made):
        data = data[: edit.at] + edit.added + data[edit.at + edit.removed :]
    return data


def untouched(start: int, end: int, made: list[Edit]) -> bool:
    """Return whether the bytes start .. end - 1 and the edges before and after them are as they were."""
    return all(edit.at + edit.removed < start or edit.at > end for edit in made)
