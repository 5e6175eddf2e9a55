"""Tests of decompression against the libraries' own decoders."""

import gzip
import io
import json
import tracemalloc
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mhmoe_ray.data.sources import Reason, compression
from mhmoe_ray.data.sources.compression import decompress, decompress_at_once
from mhmoe_ray.data.sources.items import DamageError
from tests.data.sources.read import bad_lines, document_texts, read_source
from tests.data.texts import make_documents

pytestmark = pytest.mark.long

TEXTS = make_documents("long", 6000, words=90)
LINES = [json.dumps({"text": t}).encode() + b"\n" for t in TEXTS]
CONTENT = b"".join(LINES)

ZSTD = zstandard.ZstdCompressor(level=1, write_checksum=True).compress
SKIPPABLE = b"\x57\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"


def decompress_zstd_prefix(data: bytes) -> bytes:
    """Return the bytes that the zstandard library decodes from the beginning of a frame."""
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def decompress_gzip_prefix(data: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(data)


# This is the window of `zstd --long=31`. The tables are small to save memory.
LONG_WINDOW = zstandard.ZstdCompressionParameters(window_log=31, hash_log=15, chain_log=15)


def compress_in_two_blocks(data: bytes, parameters: zstandard.ZstdCompressionParameters | None = None) -> bytes:
    """Return a zstd frame that does not record its length and is flushed in the middle."""
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    half = len(data) // 2
    return (
        compressor.compress(data[:half])
        + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        + compressor.compress(data[half:])
        + compressor.flush()
    )


HALF = len(CONTENT) // 2 + 11  # an offset within a line, so that a cut there splits the line
COMPRESSED_FORMS = {
    "one frame": ZSTD(CONTENT),
    "streamed": compress_in_two_blocks(CONTENT),
    "a window of 2 GB": compress_in_two_blocks(CONTENT, LONG_WINDOW),
    "many frames": b"".join(ZSTD(line) for line in LINES[:300]) + ZSTD(b"".join(LINES[300:])),
    "a line over two frames": ZSTD(CONTENT[:HALF]) + ZSTD(CONTENT[HALF:]),
    "skippable": SKIPPABLE + ZSTD(CONTENT[:HALF]) + SKIPPABLE * 2 + ZSTD(CONTENT[HALF:]) + SKIPPABLE,
    "empty frames": ZSTD(b"") + ZSTD(CONTENT) + ZSTD(b""),
    "uncompressible": zstandard.ZstdCompressor(level=-100).compress(CONTENT),
    "member": gzip.compress(CONTENT),
    "members": b"".join(gzip.compress(line) for line in LINES[:300]) + gzip.compress(b"".join(LINES[300:]), 1),
    "a line over two members": gzip.compress(CONTENT[:HALF]) + gzip.compress(CONTENT[HALF:]),
    "padded members": gzip.compress(CONTENT[:HALF]) + b"\0" * 700 + gzip.compress(CONTENT[HALF:]) + b"\0" * 512,
    "plain": CONTENT,
}


@pytest.mark.parametrize("name", ["lies.jsonl", "lies.jsonl.gz", "en_head_0000.json.gz.dedup.classifier.jsonl.zst"])
@pytest.mark.parametrize("form", COMPRESSED_FORMS)
def test_compression_is_detected_by_content(tmp_path, form, name):
    (tmp_path / name).write_bytes(COMPRESSED_FORMS[form])
    assert document_texts(read_source(tmp_path)[0]) == TEXTS


@pytest.mark.parametrize("form", ["one frame", "member"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.6, 0.999])
def test_truncated_file_yields_its_complete_lines(tmp_path, form, part):
    data = COMPRESSED_FORMS[form]
    truncated_data = data[: max(4, int(part * len(data)), len(data) - 3 if part > 0.99 else 0)]
    (tmp_path / "f.jsonl").write_bytes(truncated_data)
    line_count = (decompress_zstd_prefix if form == "one frame" else decompress_gzip_prefix)(truncated_data).count(
        b"\n"
    )
    items, tally = read_source(tmp_path)
    assert document_texts(items) == TEXTS[:line_count]
    assert bad_lines(items) == [(line_count + 1, Reason.PART_LOST)]
    assert "cut off" in items[-1].detail
    assert tally.damaged == 1
    if part > 0.99:
        assert line_count == len(TEXTS), "only the checksum is missing"


@pytest.mark.parametrize("compress", [ZSTD, gzip.compress])
def test_last_line_without_newline_is_read_without_the_checksum(tmp_path, compress):
    (tmp_path / "f.jsonl").write_bytes(compress(CONTENT[:-1])[:-3])
    items, _ = read_source(tmp_path)
    assert document_texts(items) == TEXTS
    assert bad_lines(items) == [(len(TEXTS) + 1, Reason.PART_LOST)]


@pytest.mark.parametrize("form", ["one frame", "member"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_lines_before_damage_are_read(tmp_path, form, part):
    data = bytearray(COMPRESSED_FORMS[form])
    offset = int(part * len(data))
    data[offset : offset + 40] = bytes(40)
    (tmp_path / "f.jsonl").write_bytes(data)
    line_count = (decompress_zstd_prefix if form == "one frame" else decompress_gzip_prefix)(
        bytes(data[:offset])
    ).count(b"\n")
    assert 0 < line_count < len(TEXTS)
    items, _ = read_source(tmp_path)
    assert document_texts(items)[:line_count] == TEXTS[:line_count]
    assert items[-1].reason is Reason.PART_LOST


@pytest.mark.parametrize("form", ["one frame", "member"])
def test_wrong_checksum_is_reported(tmp_path, form):
    data = bytearray(COMPRESSED_FORMS[form])
    data[-1 if form == "one frame" else -6] ^= 1
    (tmp_path / "f.jsonl").write_bytes(data)
    items, _ = read_source(tmp_path)
    assert document_texts(items) == TEXTS
    assert bad_lines(items) == [(len(TEXTS) + 1, Reason.PART_LOST)]


@pytest.mark.parametrize("form", ["one frame", "member"])
def test_bytes_after_the_end_are_reported(tmp_path, form):
    (tmp_path / "f.jsonl").write_bytes(COMPRESSED_FORMS[form] + b"garbage")
    items, _ = read_source(tmp_path)
    assert document_texts(items) == TEXTS
    assert "is followed by other bytes" in items[-1].detail


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("f.jsonl.zst", b"\x29" + COMPRESSED_FORMS["one frame"][1:], "name ends in .zst"),
        ("f.json.gz", b"\x00" + COMPRESSED_FORMS["member"][1:], "name ends in .gz"),
        ("f.json.gz", b"", "name ends in .gz"),
        ("f.jsonl", b"BZh91AY&SY", "it is bzip2"),
        ("f.jsonl.zst", b"\xfd7zXZ\0", "it is xz"),
        ("f.jsonl", b"PAR1\x15\x00", "it is Parquet"),
    ],
)
def test_unknown_compression_or_damaged_header_is_one_bad_file(tmp_path, name, content, detail):
    (tmp_path / name).write_bytes(content)
    [bad_line], tally = read_source(tmp_path)
    assert (bad_line.line, bad_line.reason, tally.damaged) == (1, Reason.PART_LOST, 1)
    assert detail in bad_line.detail


@pytest.mark.parametrize("text", ["PAR1 is a code", "PAR1\n", "BZh9 is another", "BZh"])
def test_text_that_looks_like_a_magic_number_is_read(tmp_path, text):
    (tmp_path / "f.txt").write_text(text)
    assert document_texts(read_source(tmp_path)[0]) == [text.strip()]


@pytest.mark.parametrize("groups", [1, 0])
def test_parquet_file_with_another_suffix_is_reported(tmp_path, groups):
    rows = pa.table({"text": ["a text"]})
    with pq.ParquetWriter(tmp_path / "f.jsonl", rows.schema) as out:
        for _ in range(groups):
            out.write_table(rows)
    [bad_line], _ = read_source(tmp_path)
    assert "it is Parquet" in bad_line.detail


@pytest.mark.parametrize("compress", [ZSTD, gzip.compress])
def test_decompress_yields_small_pieces_of_a_zip_bomb(compress):
    data = compress(bytes(100_000_000))
    assert len(data) < 200_000
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in decompress(iter([data]), "f"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == 100_000_000
    assert peak < 6e6


@pytest.mark.parametrize("form", ["skippable", "padded members", "streamed", "plain"])
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_decompress_is_independent_of_the_chunk_size(form, size):
    source = io.BytesIO(COMPRESSED_FORMS[form][: size * 4000])
    output = b""
    try:
        for piece in decompress(iter(lambda: source.read(size), b""), "f"):
            output += piece
    except DamageError:
        assert len(COMPRESSED_FORMS[form]) > size * 4000
    assert CONTENT.startswith(output)
    assert len(COMPRESSED_FORMS[form]) > size * 4000 or output == CONTENT


@pytest.mark.parametrize("compress", [ZSTD, gzip.compress])
def test_content_far_larger_than_its_file_is_refused(monkeypatch, compress):
    monkeypatch.setattr(compression, "MIN_CONTENT_LIMIT", 1_000_000)
    content = bytes(200_000_000)
    packed_content = compress(content)
    tracemalloc.start()
    with pytest.raises(DamageError, match="it unpacks to more than"):
        decompress_at_once(iter([packed_content]), "a.json.gz", len(packed_content))
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()
    assert decompress_at_once(iter([compress(CONTENT)]), "a.json.gz", len(CONTENT)) == CONTENT
