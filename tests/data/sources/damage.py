"""Random damage to bytes, and a check whether it leaves a part of them untouched."""

from typing import NamedTuple

from hypothesis import strategies as st


class Edit(NamedTuple):
    """A replacement of `removed_count` bytes by `inserted` at an offset of the original bytes."""

    offset: int
    removed_count: int
    inserted: bytes


def edit_lists(size: int) -> st.SearchStrategy[list[Edit]]:
    """Return a strategy for lists of edits of `size` bytes, in ascending order and without overlap.

    The edits are changes, deletions, insertions and truncations.
    """
    inserted_bytes = st.one_of(
        st.binary(max_size=12), st.sampled_from([b"\n", b'"', b"\0" * 64, b"\xff", b"\xef\xbb\xbf", b"\r\n", b"}{"])
    )
    offsets_near_end = st.integers(0, min(64, size)).map(lambda distance: size - distance)
    edit = st.builds(
        Edit,
        offset=st.one_of(st.integers(0, size), offsets_near_end),
        removed_count=st.sampled_from([0, 1, 1, 2, 7, 50, size]),
        inserted=inserted_bytes,
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda drawn_edits: _drop_overlaps(sorted(drawn_edits), size))


def _drop_overlaps(sorted_edits: list[Edit], size: int) -> list[Edit]:
    """Drop edits that overlap or touch an earlier one, and shorten removals that go beyond the end of the data."""
    separate_edits: list[Edit] = []
    for edit in sorted_edits:
        removed_count = min(edit.removed_count, size - edit.offset)
        if separate_edits and edit.offset <= separate_edits[-1].offset + separate_edits[-1].removed_count:
            continue
        separate_edits.append(edit._replace(removed_count=removed_count))
    return separate_edits


def apply_edits(data: bytes, edits: list[Edit]) -> bytes:
    for edit in reversed(edits):
        data = data[: edit.offset] + edit.inserted + data[edit.offset + edit.removed_count :]
    return data


def is_untouched(start: int, end: int, edits: list[Edit]) -> bool:
    """Return whether no edit touches the bytes start .. end - 1 or the edges of this range."""
    return all(edit.offset + edit.removed_count < start or edit.offset > end for edit in edits)


def flip_bit(content: bytes, offset: int) -> bytes:
    """Return a copy of `content` in which the lowest bit of the byte at `offset` is flipped."""
    return content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :]
