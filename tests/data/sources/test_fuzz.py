"""Damaged files of every form: reading never crashes, never hangs, and gives every document before the damage.

It also gives every document of plain files that was not touched. `make explore` draws many more examples.
"""

import gzip
import io
import json
import zlib

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.sources import BadLine, Document, Reason
from tests.data.sources.damage import Edit, damaged, edits, untouched
from tests.data.sources.read import read, texts

pytestmark = pytest.mark.long

EXAMPLES = 2000 if hypothesis.settings.get_current_profile_name() == "explore" else 150
LIMIT = 3000  # bytes of a document
MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"PK\x03\x04", b"\x04\x22\x4d\x18")
"""First bytes of compressed files; a plain file that comes to begin so is taken for a compressed one."""

alphabets = st.sampled_from(["ab \n", "aé漢🙂\u2028\0", '"\\{}[]:,', "\t\r x"])
bodies = alphabets.flatmap(lambda a: st.text(a, max_size=30))
corpora = st.lists(st.tuples(bodies, st.integers(1, 60)), min_size=1, max_size=25).map(
    lambda drawn: [f"document {i} {body * times}" for i, (body, times) in enumerate(drawn)]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def checked(folder, name: str, content: bytes, **keys) -> list[Document | BadLine]:
    """Write a file, return what is read of it, and assert that this makes sense whatever the file's bytes are."""
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(content)
    if keys.get("format") == "huggingface":
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    items, _ = read(folder, max_document_mb=LIMIT / 1e6, **keys)
    lines = [item.line for item in items]
    assert lines == sorted(lines)
    assert min(lines, default=1) >= 1
    for item in items:
        if isinstance(item, Document):
            assert item.text.strip()
            item.text.encode()
    return items


def jsonl(corpus: list[str], ascii: bool, newline: bytes = b"\n") -> list[bytes]:
    return [json.dumps({"text": t, "meta": {"n": 1.5}}, ensure_ascii=ascii).encode() + newline for t in corpus]


def expect_untouched(corpus: list[str], pieces: list[bytes], end: bytes, made: list[Edit], items) -> None:
    """Assert that the documents whose pieces of the file are as they were have been read, in their order."""
    start, kept = 0, []
    for text, piece in zip(corpus, pieces, strict=True):
        if untouched(start - len(end) + 1, start + len(piece) - 1, made) and len(piece) - len(end) <= LIMIT:
            kept.append(text)
        start += len(piece)
    wanted = set(kept)
    assert [t for t in texts(items) if t in wanted] == kept


@settings(max_examples=EXAMPLES)
@given(corpus=corpora, ascii=st.booleans(), data=st.data())
def test_plain_json_lines(folder, corpus, ascii, data):
    pieces = jsonl(corpus, ascii, data.draw(st.sampled_from([b"\n", b"\r\n"])))
    content = b"".join(pieces)
    made = data.draw(edits(len(content)))
    after = damaged(content, made)
    assume(not after.startswith(MAGIC))
    items = checked(folder, "f.jsonl", after)
    expect_untouched(corpus, pieces, b"\n", made, items)
    lines = [line.removeprefix(b"\xef\xbb\xbf") for line in after.split(b"\n")]
    assert [i.line for i in items] == [n for n, line in enumerate(lines, start=1) if line.strip() or len(line) > LIMIT]


@settings(max_examples=EXAMPLES)
@given(corpus=corpora, data=st.data())
def test_plain_text(folder, corpus, data):
    corpus = [" ".join(text.split()).replace("\0", "") for text in corpus]
    end = b"\n---\n"
    pieces = [text.encode() + end for text in corpus]
    content = b"".join(pieces)
    made = data.draw(edits(len(content)))
    after = damaged(content, made)
    assume(not after.startswith(MAGIC))
    items = checked(folder, "f.txt", after, delimiter="---", format="text")
    expect_untouched(corpus, pieces, end, made, items)


def compress_zstd(content: bytes, draw) -> bytes:
    level, checksum = draw(st.sampled_from([-50, 1, 3])), draw(st.booleans())
    if draw(st.booleans()):
        return zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(content)
    made = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compressobj()
    step = draw(st.integers(50, 2000))  # small blocks, so that there is something before the damage
    flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
    parts = [made.compress(content[i : i + step]) + made.flush(flush) for i in range(0, len(content), step)]
    return b"".join(parts) + made.flush()


def compress_gzip(content: bytes, draw) -> bytes:
    return gzip.compress(content, draw(st.sampled_from([0, 1, 9])), mtime=0)


def unzstd(data: bytes) -> tuple[bytes, bool]:
    """Return what the library decodes of the data, fed byte by byte, and whether the data are complete."""
    out, at = b"", 0
    while at < len(data):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if at == len(data):
                return out, False
            at += 1
            try:
                out += frame.decompress(data[at - 1 : at])
            except zstandard.ZstdError:
                return out, False
    return out, True


def gunzip(data: bytes) -> tuple[bytes, bool]:
    out = b""
    while data:
        member = zlib.decompressobj(wbits=31)
        for at in range(1, len(data) + 1):
            try:
                out += member.decompress(data[at - 1 : at])
            except zlib.error:
                return out, False
            if member.eof:
                break
        if not member.eof:
            return out, False
        data = data[at:].lstrip(b"\0")
    return out, True


FORMS = {"f.jsonl.zst": (compress_zstd, unzstd), "f.jsonl.gz": (compress_gzip, gunzip)}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=EXAMPLES)
@given(corpus=corpora, data=st.data())
def test_compressed_json_lines(folder, name, corpus, data):
    compress, reference = FORMS[name]
    content = b"".join(jsonl(corpus, ascii=False))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=3)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    stored = b"".join(compress(part, data.draw) for part in parts)
    assert texts(checked(folder, name, stored)) == [
        t for t, line in zip(corpus, jsonl(corpus, False), strict=True) if len(line) <= LIMIT + 1
    ]

    made = data.draw(edits(len(stored)))
    after = damaged(stored, made)
    before, _ = reference(stored[: made[0].at])
    items = checked(folder, name, after)
    expected = [
        t
        for t, line in zip(corpus[: before.count(b"\n")], jsonl(corpus, False), strict=False)
        if len(line) <= LIMIT + 1
    ]
    assert texts(items)[: len(expected)] == expected
    whole, is_whole = reference(after)
    if after[:4] == stored[:4] and not any(isinstance(i, BadLine) and i.reason is Reason.LOST for i in items):
        assert is_whole, "a file that is not whole passed for one"
        assert whole.count(b"\n") >= len(items) - 1


@settings(max_examples=EXAMPLES)
@given(corpus=corpora, data=st.data())
def test_parquet(folder, corpus, data):
    out = io.BytesIO()
    table = pa.table({"text": corpus, "id": list(range(len(corpus)))})
    rows, compression = data.draw(st.integers(1, 10)), data.draw(st.sampled_from(["none", "snappy", "zstd"]))
    pq.write_table(
        table, out, row_group_size=rows, compression=compression, write_page_checksum=data.draw(st.booleans())
    )
    content = out.getvalue()
    groups = pq.read_metadata(io.BytesIO(content))
    ends = [_end(groups.row_group(g)) for g in range(groups.num_row_groups)]
    made = data.draw(edits(len(content)))
    items = checked(folder, "f.parquet", damaged(content, made))
    if all(len(e.added) == e.removed and e.at + e.removed <= ends[-1] for e in made):
        # Nothing moved, and what says where things are is as it was.
        starts = [4, *ends[:-1]]
        kept = [
            text
            for group, (start, end) in enumerate(zip(starts, ends, strict=True))
            if untouched(start, end, made)
            for text in corpus[group * rows : (group + 1) * rows]
            if len(text.encode()) <= LIMIT
        ]
        wanted = set(kept)
        assert [t for t in texts(items) if t in wanted] == kept


def _end(group: pq.RowGroupMetaData) -> int:
    last = group.column(group.num_columns - 1)
    start = last.dictionary_page_offset or last.data_page_offset
    return start + last.total_compressed_size


@settings(max_examples=EXAMPLES)
@given(corpus=corpora, data=st.data())
def test_arrow_streams(folder, corpus, data):
    out = io.BytesIO()
    table = pa.table({"text": corpus, "id": list(range(len(corpus)))})
    rows, ends = data.draw(st.integers(1, 10)), []
    with pa.ipc.new_stream(out, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=rows):
            stream.write_batch(batch)
            ends.append(out.tell())
    content = out.getvalue()
    made = data.draw(edits(len(content)))
    items = checked(folder, "f.arrow", damaged(content, made), format="huggingface")
    whole = sum(end < made[0].at for end in ends) * rows
    expected = [t for t in corpus[:whole] if len(t.encode()) <= LIMIT]
    assert texts(items)[: len(expected)] == expected
