import json
import secrets
import tracemalloc

import pytest

from mhmoe_ray.data.sources import Document, Reading, Reason, find_files
from tests.data.sources.read import bad, data_spec, read, texts
from tests.data.texts import documents, write_documents, write_lines

GOOD = json.dumps({"text": "fine"}).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson"])
def test_every_form_of_file_gives_its_texts(tmp_path, suffix):
    expected = [*documents("x", 5), "línea\nsecond", "漢字 \u2028 inside", "NUL \0 is Unicode"]
    write_documents(tmp_path / f"f{suffix}", expected)
    items, tally = read(tmp_path)
    assert texts(items) == expected
    assert [i.line for i in items] == list(range(1, 9))
    assert (tally.files, tally.bytes_read) == (1, (tmp_path / f"f{suffix}").stat().st_size)
    assert tally.text_bytes == tally.bytes_read * (3 if suffix.endswith(("gz", "zst")) else 1)


# As published: arxiv, book, c4, github, stackexchange and wikipedia have `meta` of many forms; common_crawl has none.
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


def test_the_seven_domains_of_redpajama_1t(tmp_path):
    for name, record in DOMAINS.items():
        write_lines(tmp_path / name, [json.dumps(record).encode()])
    items, _ = read(tmp_path)
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
def test_a_bad_line_is_told_with_its_number_and_the_rest_is_read(tmp_path, line, reason, detail):
    path = tmp_path / "f.jsonl"
    write_lines(path, [GOOD, b"", line, GOOD])
    (first, wrong, last), tally = read(path, max_document_mb=1e-3 if reason is Reason.TOO_LONG else 1)
    assert (first.text, last) == ("fine", Document("fine", 4))
    assert (wrong.path, wrong.line, wrong.reason) == (str(path), 3, reason)
    assert detail in wrong.detail
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
def test_what_is_unusual_and_yet_readable_is_kept(tmp_path, content):
    (tmp_path / "f.jsonl").write_bytes(content)
    items, _ = read(tmp_path)
    assert [i.text for i in items] == ["fine", "fine"]


def test_bytes_of_text_are_told_as_reading_goes_on(tmp_path):
    write_documents(tmp_path / "f.jsonl.gz", [secrets.token_hex(1_000) for _ in range(3_000)])
    [file] = find_files(spec := data_spec(tmp_path))
    reading = Reading(file, spec)
    told = {reading.tally.text_bytes for _ in reading}
    assert len(told) > 2
    assert max(told) == 3 * file.size


def test_a_byte_order_mark_counts_among_the_bytes_of_its_line(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xff"}')
    [wrong] = read(tmp_path)[0]
    assert (wrong.reason, wrong.detail) == (Reason.NOT_UTF8, "byte 14 of the line")


def test_a_line_too_long_is_never_held_and_those_after_it_are_read(tmp_path):
    path = tmp_path / "f.jsonl"
    with path.open("wb") as f:
        f.write(GOOD + b'\n{"text": "')
        for _ in range(50):
            f.write(b"x" * 1_000_000)
        f.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    try:
        items, _ = read(path, max_document_mb=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (texts(items), bad(items)) == (["fine", "fine"], [(2, Reason.TOO_LONG)])
    assert items[-1].line == 3
    assert peak < 8e6
    items, _ = read(path, max_document_mb=50.1)
    assert [len(t) for t in texts(items)] == [4, 50_000_000, 4]


def test_the_key_of_the_text_can_be_named(tmp_path):
    write_lines(tmp_path / "f.jsonl", [b'{"content": "this", "text": "not this"}'])
    assert texts(read(tmp_path, text_field="content")[0]) == ["this"]


def test_an_empty_file_holds_nothing_and_nothing_bad(tmp_path):
    (tmp_path / "f.jsonl").touch()
    assert read(tmp_path)[0] == []
