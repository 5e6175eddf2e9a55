import json
import secrets
import tracemalloc

import pytest

from mhmoe_ray.data.sources import Document, FileReader, Reason, find_files
from tests.data.sources.read import bad_lines, data_spec, document_texts, read_source
from tests.data.texts import make_documents, write_documents, write_lines

GOOD = json.dumps({"text": "fine"}).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson"])
def test_reader_yields_texts_of_all_suffixes(tmp_path, suffix):
    expected = [*make_documents("x", 5), "línea\nsecond", "漢字 \u2028 inside", "NUL \0 is Unicode"]
    write_documents(tmp_path / f"f{suffix}", expected)
    items, tally = read_source(tmp_path)
    assert document_texts(items) == expected
    assert [i.line for i in items] == list(range(1, 9))
    assert (tally.files, tally.bytes_read) == (1, (tmp_path / f"f{suffix}").stat().st_size)
    assert tally.text_bytes == tally.bytes_read * (3 if suffix.endswith(("gz", "zst")) else 1)


# The records have the form in which they were published: `meta` differs from domain to domain, and common_crawl has
# none.
DOMAINS = {
    "arxiv/arxiv_5a0c.jsonl": {"text": "t", "meta": {"timestamp": "2020", "yymm": "2001", "language": "en"}},
    "book/book.jsonl": {"meta": {"short_book_title": "A", "publication_date": 1900}, "text": "t"},
    "c4/c4-train.00000-of-01024.jsonl": {"text": "t", "meta": {"language": "en", "timestamp": "2019-04-25"}},
    "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst": {
        **{"text": "t", "pred_label": "__label__wiki", "pred_label_prob": 0.3, "wiki_prob": 0.7},
        "source": "cc/2023-06/line9",
    },
    "github/filtered_0a1b.sampled.jsonl": {"text": "t", "meta": {"timestamp": "", "language": [{"name": "C"}]}},
    "stackexchange/stackexchange.jsonl": {"text": "Q: a\nA: b", "meta": {"question_score": "3", "language": "en"}},
    "wikipedia/wiki.jsonl": {"text": "t", "meta": {"title": "T", "language": "de"}},
}


def test_reader_reads_the_domains_of_redpajama_1t(tmp_path):
    for name, record in DOMAINS.items():
        write_lines(tmp_path / name, [json.dumps(record).encode()])
    items, _ = read_source(tmp_path)
    assert [i.text for i in items] == [DOMAINS[name]["text"] for name in sorted(DOMAINS)]
    assert [i.language for i in items] == ["en", None, "en", None, None, "en", "de"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "cut', Reason.NOT_JSON, "Unterminated string"),
        (b'{"text": "two"}{"text": "objects"}', Reason.NOT_JSON, "Extra data"),
        (b"[" * 100_000, Reason.NOT_JSON, "nested too deeply"),
        (b'{"text": "\xff\xfe"}', Reason.NOT_UTF8, "byte 11 of the line"),
        (b'{"text": "raw \0 byte"}', Reason.NUL_BYTES, ""),
        (b"\0" * 500, Reason.NUL_BYTES, ""),
        (b'{"meta": {}, "txet": "a"}', Reason.NO_TEXT, "no 'text' among 'meta', 'txet'"),
        (b"{}", Reason.NO_TEXT, "no keys"),
        (b'{"text": 5}', Reason.NO_TEXT, "'text' is a number"),
        (b'{"text": null}', Reason.NO_TEXT, "'text' is null"),
        (b'{"text": ["a"]}', Reason.NO_TEXT, "'text' is a list"),
        (b'["text"]', Reason.NO_TEXT, "it is a list, not an object"),
        (b'"text"', Reason.NO_TEXT, "it is a string, not an object"),
        (b'{"text": " \\n "}', Reason.EMPTY, ""),
        (b'{"text": ""}', Reason.EMPTY, ""),
        (b'{"text": "cut emoji \\ud83d"}', Reason.SURROGATE, ""),
        (b'{"text": "' + b"x" * 2000 + b'"}', Reason.TOO_LONG, ""),
    ],
)
def test_reader_reports_a_bad_line_and_reads_the_others(tmp_path, line, reason, detail):
    path = tmp_path / "f.jsonl"
    write_lines(path, [GOOD, b"", line, GOOD])
    (first_item, bad_line, last_item), tally = read_source(
        path, max_document_mb=1e-3 if reason is Reason.TOO_LONG else 1
    )
    assert (first_item.text, last_item) == ("fine", Document("fine", 4))
    assert (bad_line.path, bad_line.line, bad_line.reason) == (str(path), 3, reason)
    assert detail in bad_line.detail
    assert (tally.lines, tally.bad_lines, tally.damaged) == (3, 1, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n",
        GOOD + b"\r\n" + GOOD + b"\r\n",
        GOOD + b"\n\n  \n" + GOOD,
        b'{"text": "fine", "score": NaN}\n{"text": "fine", "score": -Infinity}',
        b'{"text": "fine", "title": "cut \\ud83d"}\n  {"text": "not", "text": "fine"}  ',
        b'{"text": "fine", "n": ' + b"9" * 1000 + b"}\n" + GOOD,
    ],
)
def test_reader_accepts_unusual_lines(tmp_path, content):
    (tmp_path / "f.jsonl").write_bytes(content)
    items, _ = read_source(tmp_path)
    assert [i.text for i in items] == ["fine", "fine"]


def test_tally_counts_bytes_while_reading(tmp_path):
    write_documents(tmp_path / "f.jsonl.gz", [secrets.token_hex(1_000) for _ in range(3_000)])
    [file] = find_files(spec := data_spec(tmp_path))
    reader = FileReader(file, spec)
    byte_counts = {reader.tally.text_bytes for _ in reader}
    assert len(byte_counts) > 2
    assert max(byte_counts) == 3 * file.size


def test_reader_counts_the_byte_order_mark_in_byte_numbers(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xff"}')
    [bad_line] = read_source(tmp_path)[0]
    assert (bad_line.reason, bad_line.detail) == (Reason.NOT_UTF8, "byte 14 of the line")


def test_reader_skips_a_long_line_without_holding_it(tmp_path):
    path = tmp_path / "f.jsonl"
    with path.open("wb") as f:
        f.write(GOOD + b'\n{"text": "')
        for _ in range(50):
            f.write(b"x" * 1_000_000)
        f.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    try:
        items, _ = read_source(path, max_document_mb=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (document_texts(items), bad_lines(items)) == (["fine", "fine"], [(2, Reason.TOO_LONG)])
    assert items[-1].line == 3
    assert peak < 8e6
    items, _ = read_source(path, max_document_mb=50.1)
    assert [len(t) for t in document_texts(items)] == [4, 50_000_000, 4]


def test_reader_uses_the_text_field_of_the_spec(tmp_path):
    write_lines(tmp_path / "f.jsonl", [b'{"content": "this", "text": "not this"}'])
    assert document_texts(read_source(tmp_path, text_field="content")[0]) == ["this"]


def test_reader_yields_nothing_for_an_empty_file(tmp_path):
    (tmp_path / "f.jsonl").touch()
    assert read_source(tmp_path)[0] == []
