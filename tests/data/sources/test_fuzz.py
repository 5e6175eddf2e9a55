"""Tests of reading damaged files of every format.

Reading never crashes, never hangs, and yields every document before the damage. In plain files it also yields every
untouched document after the damage. `make explore` draws many more examples.
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
from tests.data.sources.damage import Edit, apply_edits, edit_lists, is_untouched
from tests.data.sources.read import document_texts, read_source

pytestmark = pytest.mark.long

EXAMPLES = 2000 if hypothesis.settings.get_current_profile_name() == "explore" else 150
LIMIT = 3000  # the reader's limit of the bytes of a document
MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"PK\x03\x04", b"\x04\x22\x4d\x18")
"""First bytes of compressed files; a damaged plain file that begins with them counts as compressed."""

ALPHABETS = st.sampled_from(["ab \n", "aé漢🙂\u2028\0", '"\\{}[]:,', "\t\r x"])
BODIES = ALPHABETS.flatmap(lambda a: st.text(a, max_size=30))
CORPORA = st.lists(st.tuples(BODIES, st.integers(1, 60)), min_size=1, max_size=25).map(
    lambda bodies_and_counts: [
        f"document {i} {body * repetitions}" for i, (body, repetitions) in enumerate(bodies_and_counts)
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read_and_check(folder, name: str, content: bytes, **keys) -> list[Document | BadLine]:
    """Write the only file of `folder`, and return the items that are read from it.

    Assert what holds for any content: line numbers ascend from 1, and documents are valid and not empty.
    """
    for previous_path in folder.iterdir():
        previous_path.unlink()
    (folder / name).write_bytes(content)
    if keys.get("format") == "huggingface":
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    items, _ = read_source(folder, max_document_mb=LIMIT / 1e6, **keys)
    lines = [item.line for item in items]
    assert lines == sorted(lines)
    assert min(lines, default=1) >= 1
    for item in items:
        if isinstance(item, Document):
            assert item.text.strip()
            item.text.encode()
    return items


def json_lines(corpus: list[str], ascii: bool, newline: bytes = b"\n") -> list[bytes]:
    return [json.dumps({"text": t, "meta": {"n": 1.5}}, ensure_ascii=ascii).encode() + newline for t in corpus]


def assert_untouched_documents_are_read(
    corpus: list[str], pieces: list[bytes], end: bytes, edits: list[Edit], items
) -> None:
    """Assert that every document whose piece of the file is untouched has been read, in order.

    Each piece ends with the delimiter `end`. Documents longer than `LIMIT` do not count.
    """
    start, untouched_texts = 0, []
    for text, piece in zip(corpus, pieces, strict=True):
        if is_untouched(start - len(end) + 1, start + len(piece) - 1, edits) and len(piece) - len(end) <= LIMIT:
            untouched_texts.append(text)
        start += len(piece)
    expected_texts = set(untouched_texts)
    assert [t for t in document_texts(items) if t in expected_texts] == untouched_texts


@settings(max_examples=EXAMPLES)
@given(corpus=CORPORA, ascii=st.booleans(), data=st.data())
def test_reader_survives_damaged_json_lines(folder, corpus, ascii, data):
    pieces = json_lines(corpus, ascii, data.draw(st.sampled_from([b"\n", b"\r\n"])))
    content = b"".join(pieces)
    drawn_edits = data.draw(edit_lists(len(content)))
    damaged_content = apply_edits(content, drawn_edits)
    assume(not damaged_content.startswith(MAGIC))
    items = read_and_check(folder, "f.jsonl", damaged_content)
    assert_untouched_documents_are_read(corpus, pieces, b"\n", drawn_edits, items)
    lines = [line.removeprefix(b"\xef\xbb\xbf") for line in damaged_content.split(b"\n")]
    assert [i.line for i in items] == [n for n, line in enumerate(lines, start=1) if line.strip() or len(line) > LIMIT]


@settings(max_examples=EXAMPLES)
@given(corpus=CORPORA, data=st.data())
def test_reader_survives_damaged_text(folder, corpus, data):
    corpus = [" ".join(text.split()).replace("\0", "") for text in corpus]
    end = b"\n---\n"
    pieces = [text.encode() + end for text in corpus]
    content = b"".join(pieces)
    drawn_edits = data.draw(edit_lists(len(content)))
    damaged_content = apply_edits(content, drawn_edits)
    assume(not damaged_content.startswith(MAGIC))
    items = read_and_check(folder, "f.txt", damaged_content, delimiter="---", format="text")
    assert_untouched_documents_are_read(corpus, pieces, end, drawn_edits, items)


def compress_zstd(content: bytes, draw) -> bytes:
    """Compress with a drawn level, checksum and block size."""
    level, checksum = draw(st.sampled_from([-50, 1, 3])), draw(st.booleans())
    if draw(st.booleans()):
        return zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(content)
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compressobj()
    step = draw(st.integers(50, 2000))  # blocks are small, so that some are complete before the damage
    flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
    parts = [compressor.compress(content[i : i + step]) + compressor.flush(flush) for i in range(0, len(content), step)]
    return b"".join(parts) + compressor.flush()


def compress_gzip(content: bytes, draw) -> bytes:
    return gzip.compress(content, draw(st.sampled_from([0, 1, 9])), mtime=0)


def decompress_zstd(data: bytes) -> tuple[bytes, bool]:
    """Return the bytes that the zstandard library decodes, fed byte by byte, and whether all frames are complete."""
    output, position = b"", 0
    while position < len(data):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if position == len(data):
                return output, False
            position += 1
            try:
                output += frame.decompress(data[position - 1 : position])
            except zstandard.ZstdError:
                return output, False
    return output, True


def decompress_gzip(data: bytes) -> tuple[bytes, bool]:
    """Return the bytes that zlib decodes, fed byte by byte, and whether all members are complete."""
    output = b""
    while data:
        member = zlib.decompressobj(wbits=31)
        for position in range(1, len(data) + 1):
            try:
                output += member.decompress(data[position - 1 : position])
            except zlib.error:
                return output, False
            if member.eof:
                break
        if not member.eof:
            return output, False
        data = data[position:].lstrip(b"\0")
    return output, True


FORMS = {"f.jsonl.zst": (compress_zstd, decompress_zstd), "f.jsonl.gz": (compress_gzip, decompress_gzip)}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=EXAMPLES)
@given(corpus=CORPORA, data=st.data())
def test_reader_survives_damaged_compressed_json_lines(folder, name, corpus, data):
    compress, reference = FORMS[name]
    content = b"".join(json_lines(corpus, ascii=False))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=3)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    stored = b"".join(compress(part, data.draw) for part in parts)
    assert document_texts(read_and_check(folder, name, stored)) == [
        t for t, line in zip(corpus, json_lines(corpus, False), strict=True) if len(line) <= LIMIT + 1
    ]

    drawn_edits = data.draw(edit_lists(len(stored)))
    damaged_content = apply_edits(stored, drawn_edits)
    intact_content, _ = reference(stored[: drawn_edits[0].offset])
    items = read_and_check(folder, name, damaged_content)
    expected = [
        t
        for t, line in zip(corpus[: intact_content.count(b"\n")], json_lines(corpus, False), strict=False)
        if len(line) <= LIMIT + 1
    ]
    assert document_texts(items)[: len(expected)] == expected
    decompressed, is_complete = reference(damaged_content)
    if damaged_content[:4] == stored[:4] and not any(
        isinstance(i, BadLine) and i.reason is Reason.PART_LOST for i in items
    ):
        assert is_complete, "an incomplete file was read without an error"
        assert decompressed.count(b"\n") >= len(items) - 1


@settings(max_examples=EXAMPLES)
@given(corpus=CORPORA, data=st.data())
def test_reader_survives_damaged_parquet(folder, corpus, data):
    output = io.BytesIO()
    table = pa.table({"text": corpus, "id": list(range(len(corpus)))})
    rows, compression = data.draw(st.integers(1, 10)), data.draw(st.sampled_from(["none", "snappy", "zstd"]))
    pq.write_table(
        table, output, row_group_size=rows, compression=compression, write_page_checksum=data.draw(st.booleans())
    )
    content = output.getvalue()
    groups = pq.read_metadata(io.BytesIO(content))
    ends = [_end_of_row_group(groups.row_group(g)) for g in range(groups.num_row_groups)]
    drawn_edits = data.draw(edit_lists(len(content)))
    items = read_and_check(folder, "f.parquet", apply_edits(content, drawn_edits))
    if all(len(e.inserted) == e.removed_count and e.offset + e.removed_count <= ends[-1] for e in drawn_edits):
        # The edits have moved no byte and left the metadata at the end of the file untouched, so the texts of all
        # untouched row groups must be read.
        starts = [4, *ends[:-1]]
        untouched_texts = [
            text
            for group, (start, end) in enumerate(zip(starts, ends, strict=True))
            if is_untouched(start, end, drawn_edits)
            for text in corpus[group * rows : (group + 1) * rows]
            if len(text.encode()) <= LIMIT
        ]
        expected_texts = set(untouched_texts)
        assert [t for t in document_texts(items) if t in expected_texts] == untouched_texts


def _end_of_row_group(group: pq.RowGroupMetaData) -> int:
    last_column = group.column(group.num_columns - 1)
    start = last_column.dictionary_page_offset or last_column.data_page_offset
    return start + last_column.total_compressed_size


@settings(max_examples=EXAMPLES)
@given(corpus=CORPORA, data=st.data())
def test_reader_survives_damaged_arrow_streams(folder, corpus, data):
    output = io.BytesIO()
    table = pa.table({"text": corpus, "id": list(range(len(corpus)))})
    rows, ends = data.draw(st.integers(1, 10)), []
    with pa.ipc.new_stream(output, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=rows):
            stream.write_batch(batch)
            ends.append(output.tell())
    content = output.getvalue()
    drawn_edits = data.draw(edit_lists(len(content)))
    items = read_and_check(folder, "f.arrow", apply_edits(content, drawn_edits), format="huggingface")
    row_count = sum(end < drawn_edits[0].offset for end in ends) * rows
    expected = [t for t in corpus[:row_count] if len(t.encode()) <= LIMIT]
    assert document_texts(items)[: len(expected)] == expected


@settings(max_examples=EXAMPLES)
@given(corpus=CORPORA, data=st.data())
def test_reader_survives_damaged_conversations(folder, corpus, data):
    """Columns of lists of messages have offsets within offsets, any of which may be damaged."""
    output = io.BytesIO()
    message_type = pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.string())])
    conversations = [
        [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": f"{text}."}] for text in corpus
    ]
    table = pa.table({"messages": pa.array(conversations, pa.list_(message_type))})
    rows, compression = data.draw(st.integers(1, 10)), data.draw(st.sampled_from(["none", "snappy"]))
    pq.write_table(table, output, row_group_size=rows, compression=compression)
    content = output.getvalue()
    drawn_edits = data.draw(edit_lists(len(content)))
    items = read_and_check(folder, "f.parquet", apply_edits(content, drawn_edits), format="chat")
    for item in items:
        if isinstance(item, Document):
            assert item.conversation is not None
            assert item.conversation.spans
