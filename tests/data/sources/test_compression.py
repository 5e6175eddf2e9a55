"""Decompression against the libraries' own decoders."""

import gzip
import io
import json
import tracemalloc
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mhmoe_ray.data.sources import Reason
from mhmoe_ray.data.sources.compression import decompressed
from mhmoe_ray.data.sources.items import DamageError
from tests.data.sources.read import bad, read, texts
from tests.data.texts import documents

TEXTS = documents("long", 6000, words=90)
LINES = [json.dumps({"text": t}).encode() + b"\n" for t in TEXTS]
CONTENT = b"".join(LINES)

ZSTD = zstandard.ZstdCompressor(level=1, write_checksum=True).compress
SKIPPABLE = b"\x57\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"


def unzstd_prefix(data: bytes) -> bytes:
    """Return what the library decodes of the beginning of a frame."""
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def gunzip_prefix(data: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(data)


# As `zstd --long=31`, with small tables, since what it finds is nothing here.
LONG = zstandard.ZstdCompressionParameters(window_log=31, hash_log=15, chain_log=15)


def streamed(data: bytes, parameters: zstandard.ZstdCompressionParameters | None = None) -> bytes:
    """Return a frame that does not record its length and is flushed in the middle."""
    made = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    half = len(data) // 2
    return (
        made.compress(data[:half])
        + made.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        + made.compress(data[half:])
        + made.flush()
    )


HALF = len(CONTENT) // 2 + 11  # not at the end of a line
WHOLE = {
    "one frame": ZSTD(CONTENT),
    "streamed": streamed(CONTENT),
    "a window of 2 GB": streamed(CONTENT, LONG),
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
@pytest.mark.parametrize("form", WHOLE)
def test_content_alone_says_how_a_file_is_compressed(tmp_path, form, name):
    (tmp_path / name).write_bytes(WHOLE[form])
    assert texts(read(tmp_path)[0]) == TEXTS


@pytest.mark.parametrize("form", ["one frame", "member"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.6, 0.999])
def test_a_truncated_file_gives_all_that_can_be_decompressed_and_says_that_it_is_cut(tmp_path, form, part):
    data = WHOLE[form]
    cut = data[: max(4, int(part * len(data)), len(data) - 3 if part > 0.99 else 0)]
    (tmp_path / "f.jsonl").write_bytes(cut)
    there = (unzstd_prefix if form == "one frame" else gunzip_prefix)(cut).count(b"\n")
    items, tally = read(tmp_path)
    assert texts(items) == TEXTS[:there]
    assert bad(items) == [(there + 1, Reason.LOST)]
    assert "cut off" in items[-1].detail
    assert tally.damaged == 1
    if part > 0.99:
        assert there == len(TEXTS), "only the checksum is cut off"


@pytest.mark.parametrize("compress", [ZSTD, gzip.compress])
def test_a_last_line_without_its_newline_is_whole_even_if_the_checksum_is_cut(tmp_path, compress):
    (tmp_path / "f.jsonl").write_bytes(compress(CONTENT[:-1])[:-3])
    items, _ = read(tmp_path)
    assert texts(items) == TEXTS
    assert bad(items) == [(len(TEXTS) + 1, Reason.LOST)]


@pytest.mark.parametrize("form", ["one frame", "member"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_all_before_a_damaged_byte_is_read(tmp_path, form, part):
    data = bytearray(WHOLE[form])
    at = int(part * len(data))
    data[at : at + 40] = bytes(40)
    (tmp_path / "f.jsonl").write_bytes(data)
    there = (unzstd_prefix if form == "one frame" else gunzip_prefix)(bytes(data[:at])).count(b"\n")
    assert 0 < there < len(TEXTS)
    items, _ = read(tmp_path)
    assert texts(items)[:there] == TEXTS[:there]
    assert items[-1].reason is Reason.LOST


@pytest.mark.parametrize("form", ["one frame", "member"])
def test_a_checksum_that_does_not_match_is_told(tmp_path, form):
    data = bytearray(WHOLE[form])
    data[-1 if form == "one frame" else -6] ^= 1
    (tmp_path / "f.jsonl").write_bytes(data)
    items, _ = read(tmp_path)
    assert texts(items) == TEXTS
    assert bad(items) == [(len(TEXTS) + 1, Reason.LOST)]


@pytest.mark.parametrize("form", ["one frame", "member"])
def test_what_follows_the_end_is_told(tmp_path, form):
    (tmp_path / "f.jsonl").write_bytes(WHOLE[form] + b"garbage")
    items, _ = read(tmp_path)
    assert texts(items) == TEXTS
    assert "comes something else" in items[-1].detail


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("f.jsonl.zst", b"\x29" + WHOLE["one frame"][1:], "name ends in .zst"),
        ("f.json.gz", b"\x00" + WHOLE["member"][1:], "name ends in .gz"),
        ("f.json.gz", b"", "name ends in .gz"),
        ("f.jsonl", b"BZh91AY&SY", "it is bzip2"),
        ("f.jsonl.zst", b"\xfd7zXZ\0", "it is xz"),
        ("f.jsonl", b"PAR1\x15\x00", "it is Parquet"),
    ],
)
def test_another_compression_or_a_damaged_beginning_is_one_bad_file(tmp_path, name, content, detail):
    (tmp_path / name).write_bytes(content)
    [lost], tally = read(tmp_path)
    assert (lost.line, lost.reason, tally.damaged) == (1, Reason.LOST, 1)
    assert detail in lost.detail


@pytest.mark.parametrize("text", ["PAR1 is a code", "PAR1\n", "BZh9 is another", "BZh"])
def test_text_that_begins_as_the_name_of_a_compression_is_text(tmp_path, text):
    (tmp_path / "f.txt").write_text(text)
    assert texts(read(tmp_path)[0]) == [text.strip()]


@pytest.mark.parametrize("groups", [1, 0])
def test_parquet_by_another_name_is_told_even_without_a_row(tmp_path, groups):
    rows = pa.table({"text": ["a text"]})
    with pq.ParquetWriter(tmp_path / "f.jsonl", rows.schema) as out:
        for _ in range(groups):
            out.write_table(rows)
    [lost], _ = read(tmp_path)
    assert "it is Parquet" in lost.detail


@pytest.mark.parametrize("compress", [ZSTD, gzip.compress])
def test_a_file_that_inflates_a_thousandfold_is_read_in_pieces(compress):
    data = compress(bytes(100_000_000))
    assert len(data) < 200_000
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in decompressed(iter([data]), "f"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == 100_000_000
    assert peak < 6e6


@pytest.mark.parametrize("form", ["skippable", "padded members", "streamed", "plain"])
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_it_does_not_matter_in_what_chunks_a_file_comes(form, size):
    source = io.BytesIO(WHOLE[form][: size * 4000])
    made = b""
    try:
        for piece in decompressed(iter(lambda: source.read(size), b""), "f"):
            made += piece
    except DamageError:
        assert len(WHOLE[form]) > size * 4000
    assert CONTENT.startswith(made)
    assert len(WHOLE[form]) > size * 4000 or made == CONTENT
