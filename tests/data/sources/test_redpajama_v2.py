import gzip

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.sources import BadLine, Reason, find_files
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec.filters import SignalRule
from tests.data.sources.read import bad, data_spec, read, texts
from tests.data.sources.v2_files import write_v2

HEAD = "2023-06/0000/en_head"


def named(*texts, **keys):
    return [{"text": text, **keys} for text in texts]


def edit(path, change):
    """Apply `change` to the lines of a gzip file."""
    path.write_bytes(gzip.compress(b"\n".join(change(gzip.decompress(path.read_bytes()).split(b"\n")))))


def test_a_languages_documents_are_a_domain_head_and_middle_by_default(tmp_path):
    for bucket in ("head", "middle", "tail"):
        for language in ("en", "de"):
            write_v2(tmp_path, f"2023-06/0000/{language}_{bucket}", named(f"{language} {bucket}"))
    write_v2(tmp_path, "2022-49/4999/en_head", named("older"))
    files = find_files(data_spec(tmp_path))
    assert {f.format for f in files} == {"redpajama-v2"}
    assert [f.domain for f in files] == ["web/en", "web/de", "web/de", "web/en", "web/en"]
    items, _ = read(tmp_path)
    assert texts(items) == ["older", "de head", "de middle", "en head", "en middle"]
    assert [i.language for i in items] == ["en", "de", "de", "en", "en"]
    assert texts(read(tmp_path, filters={"languages": ["de"], "buckets": ["tail", "head"]})[0]) == [
        "de head",
        "de tail",
    ]
    assert texts(read(tmp_path / "documents", filters={"languages": ["de"]})[0]) == ["de head", "de middle"]
    with pytest.raises(DataError, match=r"correct its path, format or filters"):
        read(tmp_path, filters={"languages": ["fr"]})


def test_what_a_download_left_beside_a_file_is_not_taken_for_it(tmp_path):
    write_v2(tmp_path, HEAD, named("once"))
    whole = tmp_path / "documents" / f"{HEAD}.json.gz"
    for end in (".1", ".tmp"):
        whole.with_name(whole.name + end).write_bytes(whole.read_bytes())
    assert texts(read(tmp_path)[0]) == ["once"]


BROKEN = {
    "rps_doc_word_count >= 50": {"rps_doc_word_count": 49.0},
    "rps_doc_word_count <= 100000": {"rps_doc_word_count": 100_001.0},
    "rps_doc_mean_word_length >= 3": {"rps_doc_mean_word_length": 2.9},
    "rps_doc_mean_word_length <= 10": {"rps_doc_mean_word_length": 10.1},
    "rps_doc_symbol_to_word_ratio <= 0.1": {"rps_doc_symbol_to_word_ratio": 0.11},
    "rps_lines_start_with_bulletpoint <= 0.9": {"rps_lines_start_with_bulletpoint": [1.0] * 19 + [0.0]},
    "rps_doc_frac_lines_end_with_ellipsis <= 0.3": {"rps_doc_frac_lines_end_with_ellipsis": 0.31},
    "rps_doc_frac_no_alph_words <= 0.2": {"rps_doc_frac_no_alph_words": 0.21},
    "rps_doc_frac_chars_top_2gram <= 0.2": {"rps_doc_frac_chars_top_2gram": 0.21},
    "rps_doc_frac_chars_top_3gram <= 0.18": {"rps_doc_frac_chars_top_3gram": 0.19},
    "rps_doc_frac_chars_top_4gram <= 0.16": {"rps_doc_frac_chars_top_4gram": 0.17},
    "rps_doc_frac_chars_dupe_5grams <= 0.15": {"rps_doc_frac_chars_dupe_5grams": 0.16},
    "rps_doc_frac_chars_dupe_6grams <= 0.14": {"rps_doc_frac_chars_dupe_6grams": 0.15},
    "rps_doc_frac_chars_dupe_7grams <= 0.13": {"rps_doc_frac_chars_dupe_7grams": 0.14},
    "rps_doc_frac_chars_dupe_8grams <= 0.12": {"rps_doc_frac_chars_dupe_8grams": 0.13},
    "rps_doc_frac_chars_dupe_9grams <= 0.11": {"rps_doc_frac_chars_dupe_9grams": 0.12},
    "rps_doc_frac_chars_dupe_10grams <= 0.1": {"rps_doc_frac_chars_dupe_10grams": 0.11},
    "2 stop words": {"rps_doc_stop_word_fraction": 1 / 120},
}


def test_each_of_gophers_rules_drops_what_breaks_it_and_is_counted(tmp_path):
    rows = [{"text": rule, "signals": signals} for rule, signals in BROKEN.items()]
    kept = [
        {"text": "fine"},
        {"text": "bullets", "signals": {"rps_lines_start_with_bulletpoint": [1.0] * 18 + [0.0] * 2}},
        {"text": "two stop words", "signals": {"rps_doc_stop_word_fraction": 0.01666667}},
    ]
    unknown = {"text": "unknown", "signals": {"rps_doc_mean_word_length": None}}
    write_v2(tmp_path, HEAD, rows + kept + [unknown])
    items, tally = read(tmp_path, filters={"gopher": True})
    assert texts(items) == ["fine", "bullets", "two stop words"]
    expected = {f"gopher: {rule}": 1 for rule in BROKEN}
    assert tally.dropped == expected | {"gopher: rps_doc_mean_word_length >= 3": 2}
    assert tally.lines == len(rows) + 4
    assert len(read(tmp_path)[0]) == len(rows) + 4, "without the filter all are there"


SCORES = st.lists(st.one_of(st.none(), st.floats(0, 1000, allow_nan=False)), min_size=1, max_size=12)


@settings(max_examples=25)
@given(scores=SCORES, low=st.integers(0, 1000), high=st.integers(0, 1000))
def test_rules_of_ones_own_keep_what_meets_all_of_them(tmp_path_factory, scores, low, high):
    folder = tmp_path_factory.mktemp("v2")
    rows = [{"text": f"row {i}", "signals": {"ccnet_perplexity": score}} for i, score in enumerate(scores)]
    write_v2(folder, HEAD, rows)
    rules = [f"ccnet_perplexity >= {low}", f"ccnet_perplexity<{high}"]
    items, tally = read(folder, filters={"signals": rules})
    assert texts(items) == [f"row {i}" for i, s in enumerate(scores) if s is not None and low <= s < high]
    below = sum(s is None or s < low for s in scores)
    assert tally.dropped[f"ccnet_perplexity >= {low}"] == below
    assert tally.dropped[f"ccnet_perplexity < {high}"] == len(scores) - below - len(items)


@given(bound=st.floats(allow_nan=False, allow_infinity=False))
def test_a_rule_keeps_its_bound_to_the_last_digit(bound):
    rule = SignalRule("ccnet_length", ">=", bound)
    assert SignalRule.parse(str(rule)) == rule


def test_rules_are_spelled_as_prepared_folders_have_them():
    """One digit more or less would make a folder count as made with other settings."""
    for bound, spelled in [("50", "50"), ("0.10", "0.1"), ("1000000", "1e+06"), ("1234567", "1234567.0")]:
        assert str(SignalRule.parse(f"ccnet_length>={bound}")) == f"ccnet_length >= {spelled}"


@pytest.mark.parametrize("bound", ["nan", "inf", "-inf", "1e999"])
def test_a_bound_is_finite(bound):
    with pytest.raises(ValueError, match="a bound is a finite number"):
        SignalRule.parse(f"ccnet_length >= {bound}")


def test_listed_duplicates_leave_one_of_each(tmp_path):
    write_v2(
        tmp_path, HEAD, named("a", "b") + named("a", duplicate=True) + named("c") + named("b", "a", duplicate=True)
    )
    write_v2(tmp_path, "2023-06/0001/en_head", named("c", duplicate=True) + named("d"))
    items, tally = read(tmp_path, filters={"deduplicate": True})
    assert texts(items) == ["a", "b", "c", "d"]
    assert tally.dropped == {"duplicate": 4}


def test_near_duplicates_of_a_kept_document_in_the_same_file_are_dropped(tmp_path):
    rows = [
        {"text": "first", "bands": [b"1", b"2", b"3"]},
        {"text": "shares a band", "bands": [b"9", b"2", b"8"]},
        {"text": "the same bytes in another band", "bands": [b"2", b"1", b"7"]},
        {"text": "too short for a signature", "bands": None},
        {"text": "dropped by a rule", "bands": [b"x", b"y", b"z"], "signals": {"rps_doc_word_count": 1.0}},
        {"text": "alike to that one only", "bands": [b"x", b"y", b"z"]},
        {"text": "too short as well", "bands": None},
    ]
    write_v2(tmp_path, HEAD, rows)
    write_v2(tmp_path, "2023-06/0001/en_head", [{"text": "in another file", "bands": [b"1", b"2", b"3"]}])
    items, tally = read(tmp_path, filters={"near_duplicates": 0.8, "signals": ["rps_doc_word_count > 2"]})
    assert texts(items) == [rows[i]["text"] for i in (0, 2, 3, 5, 6)] + ["in another file"]
    assert tally.dropped == {"near duplicate in its file": 1, "rps_doc_word_count > 2": 1}


def test_tables_are_joined_by_row_past_bad_lines_on_either_side(tmp_path):
    count = 12
    rows = [{"text": f"row {i}", "signals": {"rps_doc_word_count": float(i)}} for i in range(count)]
    rows[10] |= {"duplicate": True}
    write_v2(tmp_path, HEAD, rows)
    edit(tmp_path / "documents" / f"{HEAD}.json.gz", lambda lines: [*lines[:2], b"{torn", *lines[3:]])
    signals = tmp_path / "quality_signals" / f"{HEAD}.signals.json.gz"
    edit(
        signals,
        lambda lines: [*lines[:4], b"torn}", lines[5], *lines[7:8], lines[8].replace(b"word_count", b"x"), *lines[9:]],
    )
    items, tally = read(tmp_path, filters={"signals": ["rps_doc_word_count >= 2"], "deduplicate": True})
    assert texts(items) == ["row 3", "row 5", "row 7", "row 9", "row 11"]
    assert bad(items) == [(3, Reason.NOT_JSON), *((n, Reason.NO_SIGNALS) for n in (5, 7, 9))]
    details = [i.detail for i in items if isinstance(i, BadLine) and i.reason is Reason.NO_SIGNALS]
    assert details[0].startswith("line 5: it is not JSON")
    assert details[1].startswith("no record in ")
    assert details[2].startswith("no rps_doc_word_count in ")
    assert tally.lines == count


def test_a_table_that_is_missing_is_named_before_anything_is_read(tmp_path):
    write_v2(tmp_path, HEAD, named("a"))
    write_v2(tmp_path, "2023-06/0001/en_head", named("b"))
    for folder, filters in {
        "quality_signals": {"gopher": True},
        "duplicates": {"deduplicate": True},
        "minhash": {"near_duplicates": 0.7},
    }.items():
        for file in (tmp_path / folder).rglob("*.*"):
            file.unlink()
        assert texts(read(tmp_path)[0]) == ["a", "b"]
        with pytest.raises(DataError, match=rf"{folder}/2023-06/0000/en_head\..* is not there \(and 1 more\)"):
            read(tmp_path, filters=filters)


@pytest.mark.parametrize(
    ("folder", "filters"), [("duplicates", {"deduplicate": True}), ("minhash", {"near_duplicates": 0.9})]
)
def test_a_damaged_table_takes_its_file_out_and_says_so(tmp_path, folder, filters):
    write_v2(tmp_path, HEAD, named("a"))
    write_v2(tmp_path, "2023-06/0001/en_head", named("b"))
    [table] = (tmp_path / folder / "2023-06" / "0000").iterdir()
    table.write_bytes(table.read_bytes()[:100])
    items, tally = read(tmp_path, filters=filters)
    assert texts(items) == ["b"]
    assert bad(items) == [(1, Reason.LOST)]
    assert str(table) in items[0].detail
    assert tally.damaged == 1


def test_a_table_damaged_further_down_says_from_which_line_on(tmp_path):
    rows = [{"text": f"row {i}", "bands": [b"%d" % i]} for i in range(300)]
    write_v2(tmp_path, HEAD, rows)
    path = tmp_path / "minhash" / f"{HEAD}.minhash.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    items, tally = read(tmp_path, filters={"near_duplicates": 0.9})
    assert texts(items) == [row["text"] for row in rows[:100]]
    assert bad(items) == [(101, Reason.LOST)]
    assert tally.damaged == 1


def test_signals_that_are_cut_off_leave_documents_unjudged_not_kept(tmp_path):
    rows = named(*(f"row {i}" for i in range(500)))
    write_v2(tmp_path, HEAD, rows)
    signals = tmp_path / "quality_signals" / f"{HEAD}.signals.json.gz"
    signals.write_bytes(signals.read_bytes()[: signals.stat().st_size // 2])
    items, _ = read(tmp_path, filters={"gopher": True})
    kept = len(texts(items))
    assert 0 < kept < 500
    assert bad(items) == [(line, Reason.NO_SIGNALS) for line in range(kept + 1, 501)]
    assert "cut off" in items[-1].detail
