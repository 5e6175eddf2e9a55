import json

import pytest

from mhmoe_ray.data.prepare.chunks import EVIDENCE, Limit, entry
from mhmoe_ray.data.sources import BadLine, RawFile, Reason, Tally
from tests.data.sources.read import data_spec


def limit(size=1000, **keys) -> Limit:
    return Limit(data_spec("raw").model_copy(update=keys), [RawFile("web/all", "f.jsonl", size, "jsonl")])


def tally(documents=0, bad_lines=0, damaged=0, text_bytes=1000) -> Tally:
    made = Tally(files=damaged, damaged=damaged, documents=documents, text_bytes=text_bytes)
    for number in range(bad_lines):
        made.count_bad(BadLine("f.jsonl", number + 7, Reason.NOT_JSON, "detail"))
    for _ in range(damaged):
        made.count_bad(BadLine("g.jsonl.zst", 9, Reason.LOST, "cut"))
    return made


@pytest.mark.parametrize(
    ("keys", "bad_lines", "documents", "exceeded"),
    [
        ({}, 0, 10, False),
        ({}, 1, 10_000, True),
        ({"max_bad_lines": 3}, 3, 10, False),
        ({"max_bad_lines": 3}, 4, 10_000, True),
        ({"max_bad_share": 0.01}, 10, 990, False),
        ({"max_bad_share": 0.01}, 11, 990, True),
        ({"max_bad_share": 0.01}, 1, 10, True),
        ({"max_bad_share": 0.01, "max_bad_lines": 5}, 5, 10, False),
        ({"max_bad_share": 0.01, "max_bad_lines": 5}, 20, 1980, False),
    ],
)
def test_the_larger_of_number_and_share_of_lines_is_allowed(keys, bad_lines, documents, exceeded):
    assert limit(**keys).exceeded(tally(documents, bad_lines)) is exceeded


def test_damaged_files_are_counted_apart_from_lines():
    assert limit(max_bad_lines=9, max_bad_share=0.5).exceeded(tally(10, damaged=1))
    assert not limit(max_bad_files=1).exceeded(tally(10, damaged=1))
    assert limit(max_bad_files=1).exceeded(tally(10, damaged=2))
    assert tally(10, damaged=2).lines == 10


def test_a_job_stops_early_only_when_the_rest_cannot_mend_it():
    assert limit().hopeless(tally(0, 1))
    assert limit(max_bad_files=0).hopeless(tally(5, damaged=1))
    share = limit(size=10_000, max_bad_share=0.01)
    assert not share.hopeless(tally(10, 900)), "too little to judge by"
    # A tenth was read with a tenth of it bad: were all the rest good, 1 per cent of the whole would be.
    assert not share.hopeless(tally(9 * EVIDENCE, EVIDENCE))
    assert share.hopeless(tally(7 * EVIDENCE, 3 * EVIDENCE))


def test_compressed_files_that_are_still_to_be_read_have_more_lines_a_byte():
    """The plain file's 4 per cent of bad lines may end below 1 per cent if the compressed file has five times as many
    lines."""
    files = [RawFile("web/all", "a.jsonl", 3_000, "jsonl"), RawFile("web/all", "b.jsonl.gz", 2_000, "jsonl")]
    share = Limit(data_spec("raw").model_copy(update={"max_bad_share": 0.01}), files)
    plain = tally(96 * EVIDENCE, 4 * EVIDENCE, text_bytes=3_000)
    assert not share.hopeless(plain)
    assert share.hopeless(tally(96 * EVIDENCE, 4 * EVIDENCE, text_bytes=9_000))
    assert not share.exceeded(plain.__iadd__(tally(333 * EVIDENCE)))


def test_the_error_names_the_first_of_its_kind_and_the_key():
    both = tally(90, bad_lines=2, damaged=1)
    lines = str(limit(max_bad_files=1).error(both))
    assert lines.startswith(
        "f.jsonl line 7: it is not JSON (detail) (2 of 92 unreadable so far, data.max_bad_lines is 0)"
    )
    share = str(limit(max_bad_files=1, max_bad_share=0.01).error(both))
    assert "data.max_bad_lines is 0 and data.max_bad_share 0.01" in share
    files = str(limit(max_bad_lines=5).error(both))
    assert files.startswith("g.jsonl.zst line 9: a part of the file is lost (cut) (1 damaged files so far")
    assert "raise data.max_bad_files" in files


def test_tallies_add_up():
    total = tally(5, 2)
    total += tally(3, 1, damaged=1)
    assert (total.documents, total.bad_lines, total.damaged, total.lines) == (8, 3, 1, 11)
    assert total.first[Reason.NOT_JSON].line == 7


def test_an_entry_says_where_and_why():
    line = json.loads(entry("web/a", BadLine("f.jsonl", 7, Reason.NO_TEXT, "'text' is null")))
    assert line == {
        **{"domain": "web/a", "path": "f.jsonl", "line": 7},
        **{"reason": "it has no text", "detail": "'text' is null"},
    }


@pytest.mark.parametrize("damaged", [0, 1])
def test_the_reason_can_be_told_whichever_part_of_a_file_is_added_up_first(damaged):
    """Parts arrive as tasks end: the part that exceeds the limit may come before the part with the first bad line."""
    whole = tally(5, bad_lines=1)
    before = whole.copy()
    whole += tally(5, bad_lines=3, damaged=damaged)
    last = whole.since(before)
    assert limit(max_bad_lines=2).exceeded(last)
    assert ("damaged files" in str(limit(max_bad_lines=2).error(last))) is bool(damaged)
    end = whole.copy().since(whole)
    assert {bad.reason for bad in end.first.values()} == {Reason.NOT_JSON, *[Reason.LOST] * damaged}
