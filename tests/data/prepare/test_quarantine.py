import json

import pytest

from mhmoe_ray.data.prepare.chunks import MIN_EVIDENCE_LINES, QuarantineLimit, quarantine_entry
from mhmoe_ray.data.sources import BadLine, RawFile, Reason, Tally
from tests.data.sources.read import data_spec


def make_limit(size=1000, **keys) -> QuarantineLimit:
    return QuarantineLimit(data_spec("raw").model_copy(update=keys), [RawFile("web/all", "f.jsonl", size, "jsonl")])


def make_tally(documents=0, bad_lines=0, damaged=0, text_bytes=1000) -> Tally:
    tally = Tally(files=damaged, damaged=damaged, documents=documents, text_bytes=text_bytes)
    for number in range(bad_lines):
        tally.count_bad(BadLine("f.jsonl", number + 7, Reason.NOT_JSON, "detail"))
    for _ in range(damaged):
        tally.count_bad(BadLine("g.jsonl.zst", 9, Reason.PART_LOST, "cut"))
    return tally


@pytest.mark.parametrize(
    ("keys", "bad_lines", "documents", "is_exceeded"),
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
def test_limit_allows_the_larger_of_number_and_share_of_lines(keys, bad_lines, documents, is_exceeded):
    assert make_limit(**keys).is_exceeded(make_tally(documents, bad_lines)) is is_exceeded


def test_limit_counts_damaged_files_apart_from_lines():
    assert make_limit(max_bad_lines=9, max_bad_share=0.5).is_exceeded(make_tally(10, damaged=1))
    assert not make_limit(max_bad_files=1).is_exceeded(make_tally(10, damaged=1))
    assert make_limit(max_bad_files=1).is_exceeded(make_tally(10, damaged=2))
    assert make_tally(10, damaged=2).lines == 10


def test_will_be_exceeded_assumes_that_all_other_lines_are_good():
    assert make_limit().will_be_exceeded(make_tally(0, 1))
    assert make_limit(max_bad_files=0).will_be_exceeded(make_tally(5, damaged=1))
    share_limit = make_limit(size=10_000, max_bad_share=0.01)
    assert not share_limit.will_be_exceeded(make_tally(10, 900)), "too few lines were read"
    # A tenth of the text was read, and a tenth of its lines are bad. If all other lines are good, 1 per cent of all
    # lines are bad, which the limit allows.
    assert not share_limit.will_be_exceeded(make_tally(9 * MIN_EVIDENCE_LINES, MIN_EVIDENCE_LINES))
    assert share_limit.will_be_exceeded(make_tally(7 * MIN_EVIDENCE_LINES, 3 * MIN_EVIDENCE_LINES))


def test_will_be_exceeded_expects_more_lines_of_compressed_files():
    """4 % of bad lines do not exceed a limit of 1 % while an unread compressed file may have enough good lines."""
    files = [RawFile("web/all", "a.jsonl", 3_000, "jsonl"), RawFile("web/all", "b.jsonl.gz", 2_000, "jsonl")]
    share_limit = QuarantineLimit(data_spec("raw").model_copy(update={"max_bad_share": 0.01}), files)
    plain_tally = make_tally(96 * MIN_EVIDENCE_LINES, 4 * MIN_EVIDENCE_LINES, text_bytes=3_000)
    assert not share_limit.will_be_exceeded(plain_tally)
    assert share_limit.will_be_exceeded(make_tally(96 * MIN_EVIDENCE_LINES, 4 * MIN_EVIDENCE_LINES, text_bytes=9_000))
    assert not share_limit.is_exceeded(plain_tally.__iadd__(make_tally(333 * MIN_EVIDENCE_LINES)))


def test_limit_error_names_the_first_bad_line_and_the_key():
    mixed_tally = make_tally(90, bad_lines=2, damaged=1)
    line_error = str(make_limit(max_bad_files=1).error(mixed_tally))
    assert line_error.startswith(
        "f.jsonl line 7: it is not JSON (detail) (2 of 92 unreadable so far, data.max_bad_lines is 0)"
    )
    share_error = str(make_limit(max_bad_files=1, max_bad_share=0.01).error(mixed_tally))
    assert "data.max_bad_lines is 0 and data.max_bad_share 0.01" in share_error
    file_error = str(make_limit(max_bad_lines=5).error(mixed_tally))
    assert file_error.startswith("g.jsonl.zst line 9: a part of the file is lost (cut) (1 damaged files so far")
    assert "raise data.max_bad_files" in file_error


def test_tallies_add_up_with_plus():
    total_tally = make_tally(5, 2)
    total_tally += make_tally(3, 1, damaged=1)
    assert (total_tally.documents, total_tally.bad_lines, total_tally.damaged, total_tally.lines) == (8, 3, 1, 11)
    assert total_tally.examples[Reason.NOT_JSON].line == 7


def test_quarantine_entry_names_place_and_reason():
    line = json.loads(quarantine_entry("web/a", BadLine("f.jsonl", 7, Reason.NO_TEXT, "'text' is null")))
    assert line == {
        **{"domain": "web/a", "path": "f.jsonl", "line": 7},
        **{"reason": "it has no text", "detail": "'text' is null"},
    }


@pytest.mark.parametrize("damaged", [0, 1])
def test_tally_keeps_the_reason_of_bad_lines_in_any_order(damaged):
    """The counts since an earlier tally keep an example of each reason for the error, even one from before that tally.

    Chunks arrive in any order, so the one that exceeds the limit may come before the one with the first bad line.
    """
    total_tally = make_tally(5, bad_lines=1)
    previous_tally = total_tally.copy()
    total_tally += make_tally(5, bad_lines=3, damaged=damaged)
    new_counts = total_tally.counts_since(previous_tally)
    assert make_limit(max_bad_lines=2).is_exceeded(new_counts)
    assert ("damaged files" in str(make_limit(max_bad_lines=2).error(new_counts))) is bool(damaged)
    no_counts = total_tally.copy().counts_since(total_tally)
    assert {bad.reason for bad in no_counts.examples.values()} == {Reason.NOT_JSON, *[Reason.PART_LOST] * damaged}
