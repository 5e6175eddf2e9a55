import gzip

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.sources import BadLine, Reason, find_files
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec.filters import SignalRule
from tests.data.sources.read import bad_lines, data_spec, document_texts, read_source
from tests.data.sources.v2_files import write_v2_files

HEAD = "2023-06/0000/en_head"


def make_rows(*texts, **keys):
    return [{"text": text, **keys} for text in texts]


def edit_lines(path, edit_function):
    """Replace the lines of a gzip file with what `edit_function` returns for them."""
    path.write_bytes(gzip.compress(b"\n".join(edit_function(gzip.decompress(path.read_bytes()).split(b"\n")))))


def test_v2_domains_are_languages_with_head_and_middle(tmp_path):
    for bucket in ("head", "middle", "tail"):
        for language in ("en", "de"):
            write_v2_files(tmp_path, f"2023-06/0000/{language}_{bucket}", make_rows(f"{language} {bucket}"))
    write_v2_files(tmp_path, "2022-49/4999/en_head", make_rows("older"))
    files = find_files(data_spec(tmp_path))
    assert {f.format for f in files} == {"redpajama-v2"}
    assert [f.domain for f in files] == ["web/en", "web/de", "web/de", "web/en", "web/en"]
    items, _ = read_source(tmp_path)
    assert document_texts(items) == ["older", "de head", "de middle", "en head", "en middle"]
    assert [i.language for i in items] == ["en", "de", "de", "en", "en"]
    assert document_texts(read_source(tmp_path, filters={"languages": ["de"], "buckets": ["tail", "head"]})[0]) == [
        "de head",
        "de tail",
    ]
    assert document_texts(read_source(tmp_path / "documents", filters={"languages": ["de"]})[0]) == [
        "de head",
        "de middle",
    ]
    with pytest.raises(DataError, match=r"correct its path, format or filters"):
        read_source(tmp_path, filters={"languages": ["fr"]})


def test_v2_tables_lie_beside_the_folder_of_documents(tmp_path):
    """The path may name the folder of documents or a pattern below it; the tables are in other folders."""
    for name in (HEAD, "2023-06/0001/en_head", "2022-49/0000/en_head"):
        write_v2_files(tmp_path, name, make_rows(name))
    filters = {"gopher": True, "deduplicate": True}
    for path in ("documents", "documents/2023-06/**", "documents/2023-06/0000/en_head.json.gz"):
        assert find_files(data_spec(tmp_path / path, format="redpajama-v2", filters=filters))
    (tmp_path / "quality_signals/2023-06/0001/en_head.signals.json.gz").unlink()
    with pytest.raises(DataError, match=r"0001/en_head\.signals\.json\.gz is not there; download it"):
        find_files(data_spec(tmp_path / "documents", filters=filters))
    assert find_files(data_spec(tmp_path / "documents/2022-49", filters=filters))


def test_v2_tables_on_s3_lie_beside_the_folder_of_documents(tmp_path, s3):
    query, file_system = s3
    for name in (HEAD, "2023-06/0001/en_head"):
        write_v2_files(tmp_path / "v2", name, make_rows(name))
    for path in (tmp_path / "v2").rglob("*.*"):
        with file_system.open_output_stream(f"bucket/signals/{path.relative_to(tmp_path / 'v2')}") as stream:
            stream.write(path.read_bytes())
    spec = data_spec(f"s3://bucket/signals/documents?{query}", filters={"gopher": True, "deduplicate": True})
    assert len(find_files(spec)) == 2
    file_system.delete_file("bucket/signals/duplicates/2023-06/0001/en_head.duplicates.parquet")
    with pytest.raises(DataError, match=r"0001/en_head\.duplicates\.parquet is not there; download it"):
        find_files(spec)


def test_v2_ignores_temporary_files_of_a_download(tmp_path):
    write_v2_files(tmp_path, HEAD, make_rows("once"))
    documents_path = tmp_path / "documents" / f"{HEAD}.json.gz"
    for suffix in (".1", ".tmp"):
        documents_path.with_name(documents_path.name + suffix).write_bytes(documents_path.read_bytes())
    assert document_texts(read_source(tmp_path)[0]) == ["once"]


SIGNALS_BY_BROKEN_RULE = {
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


def test_gopher_rules_drop_and_count_documents(tmp_path):
    rows = [{"text": rule, "signals": signals} for rule, signals in SIGNALS_BY_BROKEN_RULE.items()]
    good_rows = [
        {"text": "fine"},
        {"text": "bullets", "signals": {"rps_lines_start_with_bulletpoint": [1.0] * 18 + [0.0] * 2}},
        {"text": "two stop words", "signals": {"rps_doc_stop_word_fraction": 0.01666667}},
    ]
    unknown_row = {"text": "unknown", "signals": {"rps_doc_mean_word_length": None}}
    write_v2_files(tmp_path, HEAD, rows + good_rows + [unknown_row])
    items, tally = read_source(tmp_path, filters={"gopher": True})
    assert document_texts(items) == ["fine", "bullets", "two stop words"]
    expected = {f"gopher: {rule}": 1 for rule in SIGNALS_BY_BROKEN_RULE}
    assert tally.dropped == expected | {"gopher: rps_doc_mean_word_length >= 3": 2}
    assert tally.lines == len(rows) + 4
    assert len(read_source(tmp_path)[0]) == len(rows) + 4, "all documents are read without the filter"


SCORES = st.lists(st.one_of(st.none(), st.floats(0, 1000, allow_nan=False)), min_size=1, max_size=12)


@settings(max_examples=25)
@given(scores=SCORES, low=st.integers(0, 1000), high=st.integers(0, 1000))
def test_signal_rules_keep_documents_that_meet_all_rules(tmp_path_factory, scores, low, high):
    folder = tmp_path_factory.mktemp("v2")
    rows = [{"text": f"row {i}", "signals": {"ccnet_perplexity": score}} for i, score in enumerate(scores)]
    write_v2_files(folder, HEAD, rows)
    rules = [f"ccnet_perplexity >= {low}", f"ccnet_perplexity<{high}"]
    items, tally = read_source(folder, filters={"signals": rules})
    assert document_texts(items) == [f"row {i}" for i, s in enumerate(scores) if s is not None and low <= s < high]
    below_count = sum(s is None or s < low for s in scores)
    assert tally.dropped[f"ccnet_perplexity >= {low}"] == below_count
    assert tally.dropped[f"ccnet_perplexity < {high}"] == len(scores) - below_count - len(items)


@given(bound=st.floats(allow_nan=False, allow_infinity=False))
def test_signal_rule_keeps_all_digits_of_its_bound(bound):
    rule = SignalRule("ccnet_length", ">=", bound)
    assert SignalRule.parse(str(rule)) == rule


def test_signal_rule_has_a_stable_spelling():
    """The recipe of a prepared folder contains rules as text, so another spelling would count as other settings."""
    for bound, spelling in [("50", "50"), ("0.10", "0.1"), ("1000000", "1e+06"), ("1234567", "1234567.0")]:
        assert str(SignalRule.parse(f"ccnet_length>={bound}")) == f"ccnet_length >= {spelling}"


@pytest.mark.parametrize("bound", ["nan", "inf", "-inf", "1e999"])
def test_signal_rule_rejects_an_infinite_bound(bound):
    with pytest.raises(ValueError, match="the bound must be a finite number"):
        SignalRule.parse(f"ccnet_length >= {bound}")


def test_deduplicate_keeps_one_of_the_listed_duplicates(tmp_path):
    write_v2_files(
        tmp_path,
        HEAD,
        make_rows("a", "b") + make_rows("a", duplicate=True) + make_rows("c") + make_rows("b", "a", duplicate=True),
    )
    write_v2_files(tmp_path, "2023-06/0001/en_head", make_rows("c", duplicate=True) + make_rows("d"))
    items, tally = read_source(tmp_path, filters={"deduplicate": True})
    assert document_texts(items) == ["a", "b", "c", "d"]
    assert tally.dropped == {"duplicate": 4}


def test_near_duplicates_in_the_same_file_are_dropped(tmp_path):
    rows = [
        {"text": "first", "bands": [b"1", b"2", b"3"]},
        {"text": "shares a band", "bands": [b"9", b"2", b"8"]},
        {"text": "the same bytes in another band", "bands": [b"2", b"1", b"7"]},
        {"text": "too short for a signature", "bands": None},
        {"text": "dropped by a rule", "bands": [b"x", b"y", b"z"], "signals": {"rps_doc_word_count": 1.0}},
        {"text": "alike to that one only", "bands": [b"x", b"y", b"z"]},
        {"text": "too short as well", "bands": None},
    ]
    write_v2_files(tmp_path, HEAD, rows)
    write_v2_files(tmp_path, "2023-06/0001/en_head", [{"text": "in another file", "bands": [b"1", b"2", b"3"]}])
    items, tally = read_source(tmp_path, filters={"near_duplicates": 0.8, "signals": ["rps_doc_word_count > 2"]})
    assert document_texts(items) == [rows[i]["text"] for i in (0, 2, 3, 5, 6)] + ["in another file"]
    assert tally.dropped == {"near duplicate in its file": 1, "rps_doc_word_count > 2": 1}


def test_v2_tables_are_joined_by_row_despite_bad_lines(tmp_path):
    count = 12
    rows = [{"text": f"row {i}", "signals": {"rps_doc_word_count": float(i)}} for i in range(count)]
    rows[10] |= {"duplicate": True}
    write_v2_files(tmp_path, HEAD, rows)
    edit_lines(tmp_path / "documents" / f"{HEAD}.json.gz", lambda lines: [*lines[:2], b"{torn", *lines[3:]])
    signals = tmp_path / "quality_signals" / f"{HEAD}.signals.json.gz"
    edit_lines(
        signals,
        lambda lines: [*lines[:4], b"torn}", lines[5], *lines[7:8], lines[8].replace(b"word_count", b"x"), *lines[9:]],
    )
    items, tally = read_source(tmp_path, filters={"signals": ["rps_doc_word_count >= 2"], "deduplicate": True})
    assert document_texts(items) == ["row 3", "row 5", "row 7", "row 9", "row 11"]
    assert bad_lines(items) == [(3, Reason.NOT_JSON), *((n, Reason.NO_SIGNALS) for n in (5, 7, 9))]
    details = [i.detail for i in items if isinstance(i, BadLine) and i.reason is Reason.NO_SIGNALS]
    assert details[0].startswith("line 5: it is not JSON")
    assert details[1].startswith("no record in ")
    assert details[2].startswith("no rps_doc_word_count in ")
    assert tally.lines == count


def test_v2_names_a_missing_table_before_reading(tmp_path):
    write_v2_files(tmp_path, HEAD, make_rows("a"))
    write_v2_files(tmp_path, "2023-06/0001/en_head", make_rows("b"))
    for folder, filters in {
        "quality_signals": {"gopher": True},
        "duplicates": {"deduplicate": True},
        "minhash": {"near_duplicates": 0.7},
    }.items():
        for file in (tmp_path / folder).rglob("*.*"):
            file.unlink()
        assert document_texts(read_source(tmp_path)[0]) == ["a", "b"]
        with pytest.raises(DataError, match=rf"{folder}/2023-06/0000/en_head\..* is not there \(and 1 more\)"):
            read_source(tmp_path, filters=filters)


@pytest.mark.parametrize(
    ("folder", "filters"), [("duplicates", {"deduplicate": True}), ("minhash", {"near_duplicates": 0.9})]
)
def test_v2_skips_the_file_of_a_damaged_table(tmp_path, folder, filters):
    write_v2_files(tmp_path, HEAD, make_rows("a"))
    write_v2_files(tmp_path, "2023-06/0001/en_head", make_rows("b"))
    [table] = (tmp_path / folder / "2023-06" / "0000").iterdir()
    table.write_bytes(table.read_bytes()[:100])
    items, tally = read_source(tmp_path, filters=filters)
    assert document_texts(items) == ["b"]
    assert bad_lines(items) == [(1, Reason.PART_LOST)]
    assert str(table) in items[0].detail
    assert tally.damaged == 1


def test_v2_reads_documents_before_damage_in_a_table(tmp_path):
    rows = [{"text": f"row {i}", "bands": [b"%d" % i]} for i in range(300)]
    write_v2_files(tmp_path, HEAD, rows)
    path = tmp_path / "minhash" / f"{HEAD}.minhash.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    items, tally = read_source(tmp_path, filters={"near_duplicates": 0.9})
    assert document_texts(items) == [row["text"] for row in rows[:100]]
    assert bad_lines(items) == [(101, Reason.PART_LOST)]
    assert tally.damaged == 1


def test_v2_drops_documents_with_truncated_signals(tmp_path):
    rows = make_rows(*(f"row {i}" for i in range(500)))
    write_v2_files(tmp_path, HEAD, rows)
    signals = tmp_path / "quality_signals" / f"{HEAD}.signals.json.gz"
    signals.write_bytes(signals.read_bytes()[: signals.stat().st_size // 2])
    items, _ = read_source(tmp_path, filters={"gopher": True})
    document_count = len(document_texts(items))
    assert 0 < document_count < 500
    assert bad_lines(items) == [(line, Reason.NO_SIGNALS) for line in range(document_count + 1, 501)]
    assert "cut off" in items[-1].detail
