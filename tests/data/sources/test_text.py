import gzip

import pytest

from mhmoe_ray.data.sources import Document, Reason
from tests.data.sources.read import bad_lines, document_texts, read_source


def test_reader_makes_a_document_of_a_text_file(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    (tmp_path / "en" / "b.txt.gz").write_bytes(gzip.compress("größer".encode()))
    items, _ = read_source(tmp_path)
    assert items == [Document("one\n\ntwo", 1, lines=3), Document("größer", 1)]


@pytest.mark.parametrize(
    ("delimiter", "content"),
    [
        ("", b"one\nmore\n\n\n\ntwo\r\n\r\nthree"),
        ("<|endoftext|>", b"one\nmore\n<|endoftext|>\n\n\n<|endoftext|>\r\ntwo\n<|endoftext|>\nthree\n<|endoftext|>"),
    ],
)
def test_reader_splits_text_at_delimiter_lines(tmp_path, delimiter, content):
    (tmp_path / "all.txt").write_bytes(content)
    items, tally = read_source(tmp_path, delimiter=delimiter)
    assert [t.strip() for t in document_texts(items)] == ["one\nmore", "two", "three"]
    assert items[0].line == 1
    assert tally.lines == 3


def test_reader_reports_bad_parts_of_a_text_file(tmp_path):
    documents = [b"good", b"bad \xff", b"also\n\x00bad", b"long " * 300, b"good"]
    (tmp_path / "all.txt").write_bytes(b"\n---\n".join(documents))
    items, _ = read_source(tmp_path, delimiter="---", max_document_mb=1e-3)
    assert document_texts(items) == ["good", "good"]
    assert bad_lines(items) == [(3, Reason.NOT_UTF8), (5, Reason.NUL_BYTES), (8, Reason.TOO_LONG)]
    (tmp_path / "all.txt").write_bytes(b"some\nlines\n" * 200)
    assert bad_lines(read_source(tmp_path, max_document_mb=1e-3)[0]) == [(1, Reason.TOO_LONG)]
    (tmp_path / "all.txt").write_bytes(b" \n\n")
    assert bad_lines(read_source(tmp_path)[0]) == [(1, Reason.EMPTY)]


def test_reader_reports_a_truncated_document(tmp_path):
    content = gzip.compress(b"first\n\nsecond")
    (tmp_path / "all.txt.gz").write_bytes(content[:-9])
    items, _ = read_source(tmp_path, delimiter="")
    assert (document_texts(items), bad_lines(items)) == (["first"], [(3, Reason.PART_LOST)])
    assert bad_lines(read_source(tmp_path)[0]) == [(1, Reason.PART_LOST)]
