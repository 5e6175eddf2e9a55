import gzip

import pytest

from mhmoe_ray.data.sources import Document, Reason
from tests.data.sources.read import bad, read, texts


def test_a_file_is_a_document(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "en" / "b.txt.gz").write_bytes(gzip.compress("größer".encode()))
    items, _ = read(tmp_path)
    assert items == [Document("one\n\ntwo", 1), Document("größer", 1)]


@pytest.mark.parametrize(
    ("delimiter", "content"),
    [
        ("", b"one\nmore\n\n\n\ntwo\r\n\r\nthree"),
        ("<|endoftext|>", b"one\nmore\n<|endoftext|>\n\n\n<|endoftext|>\r\ntwo\n<|endoftext|>\nthree\n<|endoftext|>"),
    ],
)
def test_a_delimiter_line_ends_a_document(tmp_path, delimiter, content):
    (tmp_path / "all.txt").write_bytes(content)
    items, tally = read(tmp_path, delimiter=delimiter)
    assert [t.strip() for t in texts(items)] == ["one\nmore", "two", "three"]
    assert items[0].line == 1
    assert tally.lines == 3


def test_bad_parts_are_told_and_the_others_read(tmp_path):
    parts = [b"good", b"bad \xff", b"also\n\x00bad", b"long " * 300, b"good"]
    (tmp_path / "all.txt").write_bytes(b"\n---\n".join(parts))
    items, _ = read(tmp_path, delimiter="---", max_document_mb=1e-3)
    assert texts(items) == ["good", "good"]
    assert bad(items) == [(3, Reason.NOT_UTF8), (5, Reason.NUL_BYTES), (8, Reason.TOO_LONG)]
    (tmp_path / "all.txt").write_bytes(b"some\nlines\n" * 200)
    assert bad(read(tmp_path, max_document_mb=1e-3)[0]) == [(1, Reason.TOO_LONG)]
    (tmp_path / "all.txt").write_bytes(b" \n\n")
    assert bad(read(tmp_path)[0]) == [(1, Reason.EMPTY)]


def test_a_document_that_is_cut_off_is_not_taken_for_whole(tmp_path):
    whole = gzip.compress(b"first\n\nsecond")
    (tmp_path / "all.txt.gz").write_bytes(whole[:-9])
    items, _ = read(tmp_path, delimiter="")
    assert (texts(items), bad(items)) == (["first"], [(3, Reason.LOST)])
    assert bad(read(tmp_path)[0]) == [(1, Reason.LOST)]
