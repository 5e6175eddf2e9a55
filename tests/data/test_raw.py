import json

import pytest

from mhmoe_ray.data.raw import BadLine, find_files, is_validation, read_documents
from mhmoe_ray.errors import DataError
from tests.data.texts import documents, write_corpus, write_documents, write_lines
from tests.specs import tiny_spec

GOOD = json.dumps({"text": "fine"}).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz"])
def test_every_form_of_file_gives_its_texts(tmp_path, suffix):
    texts = [*documents("x", 5), "línea\nsecond", "漢字 \u2028 inside"]
    write_documents(tmp_path / f"f{suffix}", texts)
    assert list(read_documents(str(tmp_path / f"f{suffix}"))) == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "it is not JSON"),
        (b"\xff\xfe{}", "it is not UTF-8"),
        (b'{"meta": {}}', "it has no text"),
        (b'{"text": 5}', "it has no text"),
        (b'["text"]', "it has no text"),
        (b'{"text": "  "}', "its text is empty"),
        (b'{"text": "cut emoji \\ud83d"}', "its text holds half a character"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_the_rest_is_read(tmp_path, line, reason):
    path = tmp_path / "f.jsonl"
    write_lines(path, [GOOD, b"", line, GOOD])
    first, bad, last = read_documents(str(path))
    assert (first, last) == ("fine", "fine")
    assert (bad.path, bad.line) == (str(path), 3)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_a_truncated_file_gives_what_is_whole_and_says_that_it_is_cut(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    texts = documents("long", 3000, words=90)
    write_documents(path, texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *read, bad = read_documents(str(path))
    assert isinstance(bad, BadLine)
    good = [t for t in read if isinstance(t, str)]
    assert good == texts[: len(good)]


def test_files_are_found_by_domain_in_the_order_of_their_names(tmp_path):
    write_corpus(tmp_path / "raw")
    found = find_files(tiny_spec(tmp_path).data)
    assert [f.domain for f in found] == ["web/a", "web/a", "web/b", "web/c"]
    assert [f.path for f in found] == sorted(f.path for f in found)


def test_missing_folders_and_domains_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        find_files(tiny_spec(tmp_path).data)
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="has no subfolders"):
        find_files(tiny_spec(tmp_path).data)
    (tmp_path / "raw" / "x").mkdir()
    with pytest.raises(DataError, match=r"web/x: .* holds no file"):
        find_files(tiny_spec(tmp_path).data)
    shares = {"sources": {"web": {"path": "raw", "shares": {"nowhere": 1}}}}
    with pytest.raises(DataError, match="web/nowhere"):
        find_files(tiny_spec(tmp_path, data=shares).data)


def test_the_held_out_share_is_near_the_fraction_and_copies_go_together():
    texts = documents("v", 4000)
    held_out = [is_validation(t, 0.1) for t in texts]
    assert 300 < sum(held_out) < 500
    assert held_out == [is_validation(t, 0.1) for t in texts]
