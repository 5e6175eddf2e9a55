import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import RawFile, find_files
from mhmoe_ray.data.tokenizer import train
from mhmoe_ray.data.tokenizer.train import domain_budgets, file_budgets, sample_texts
from tests.data.texts import documents, write_documents
from tests.specs import tiny_spec


def data(train_mb=1.0, schedule=(), **sources):
    sources = {name: {"path": f"raw/{name}", **source} for name, source in sources.items()}
    keys = {"sources": sources, "schedule": schedule, "tokenizer_train_mb": train_mb}
    return tiny_spec(data=keys).data


SIZES = {"web/en": 8_000_000, "web/de": 1_000_000, "books/a": 900_000, "books/b": 100_000}


def test_budgets_follow_weights_and_sizes():
    spec = data(web={"weight": 3}, books={"weight": 1})
    assert domain_budgets(SIZES, spec) == pytest.approx(
        {"web/en": 666_667, "web/de": 83_333, "books/a": 225_000, "books/b": 25_000}, abs=1
    )


def test_budgets_follow_temperature_and_fixed_shares():
    spec = data(web={"weight": 3, "alpha": 0}, books={"weight": 1, "shares": {"b": 1, "a": 9}})
    expected = {"web/en": 375_000, "web/de": 375_000, "books/a": 225_000, "books/b": 25_000}
    assert domain_budgets(SIZES, spec) == expected


def test_nobody_gives_more_than_there_is_and_the_others_the_rest():
    spec = data(5.0, web={"weight": 1}, books={"weight": 1, "shares": {"b": 1}})
    assert domain_budgets(SIZES, spec) == pytest.approx(
        {"web/en": 4_355_556, "web/de": 544_444, "books/a": 0, "books/b": 100_000}, abs=1
    )
    assert domain_budgets(SIZES, data(500.0, web={}, books={})) == SIZES


def test_what_only_the_schedule_brings_in_counts_as_it_begins():
    schedule = [
        {"from_step": 10, "sources": {"books": {"weight": 1}, "web": {"weight": 4, "shares": {"de": 1}}}},
        {"from_step": 20, "sources": {"books": {"weight": 1e6}}},
    ]
    spec = data(schedule=schedule, web={"shares": {"en": 1}}, books={"weight": 0})
    # Shares 1 in the first phase, 0.8 and 0.2 * 0.9 and 0.2 * 0.1 in the second.
    expected = {"web/en": 500_000, "web/de": 400_000, "books/a": 90_000, "books/b": 10_000}
    assert domain_budgets(SIZES, spec) == pytest.approx(expected, abs=1)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=12), st.floats(1e-4, 2))
def test_budgets_of_files_add_up_and_are_within_their_sizes(sizes, megabytes):
    files = [RawFile(f"web/{i % 3}", f"{i:02}.jsonl", size, "jsonl") for i, size in enumerate(sizes)]
    found = file_budgets(files, data(megabytes, web={}))
    assert all(0 < part <= file.size for file, part in found)
    assert sum(part for _, part in found) <= min(int(megabytes * 1e6), sum(sizes))
    assert sum(part for _, part in found) == min(int(megabytes * 1e6), sum(sizes))


def test_many_files_are_not_all_read_but_evenly():
    files = [RawFile("web/all", f"{i:05}.jsonl", 10_000_000, "jsonl") for i in range(10_000)]
    found = file_budgets(files, data(1.0, web={}))
    numbers = [int(file.path[:5]) for file, _ in found]
    assert numbers == list(range(0, 10_000, 500))
    assert {part for _, part in found} == {50_000}
    names = ("a.jsonl.zst", "b.parquet", "c.jsonl", "d.arrow")
    small = [RawFile("web/all", name, 1_000, "jsonl") for name in names]
    assert [part for _, part in file_budgets(small, data(1.0, web={}))] == [3_000, 3_000, 1_000, 1_000]


@pytest.fixture
def corpus(tmp_path):
    """Write two files of a domain, several times as large as the budgets below; return the spec, the files and their
    texts."""
    made = {name: documents(name, 400) for name in ("one", "two")}
    for name, texts in made.items():
        write_documents(tmp_path / f"raw/a/{name}.jsonl", texts)
    spec = tiny_spec(tmp_path, data={"tokenizer_train_mb": 0.04}).data
    return spec, find_files(spec), made


def test_a_sample_is_spread_over_every_file(corpus, monkeypatch):
    monkeypatch.setattr(train, "MIN_FILE", 10_000)
    spec, files, made = corpus
    found = list(sample_texts(files, spec))
    assert found == list(sample_texts(list(files), spec))
    assert sum(map(len, found)) == 40_000
    for texts in made.values():
        starts = {text[:20]: i for i, text in enumerate(texts)}
        places = sorted(starts[t[:20]] for t in found if t[:20] in starts)
        assert len(places) == len(set(places)) > 40
        assert max(b - a for a, b in itertools.pairwise([0, *places, 400])) < 60


def test_documents_that_are_held_out_are_as_likely_in_a_sample_as_others(corpus):
    spec, files, made = corpus
    found = tuple(sample_texts(files, spec))
    texts = [text for texts in made.values() for text in texts]
    sampled = [text for text in texts if text.startswith(found)]
    assert len(sampled) > 100
    shares = [sum(is_validation(text, 0.1) for text in some) / len(some) for some in (texts, sampled)]
    assert shares[1] == pytest.approx(shares[0], abs=0.08)


def test_a_huge_file_is_not_read_to_its_end(corpus, monkeypatch):
    monkeypatch.setattr(train, "REACH", 2)
    spec, files, made = corpus
    found = list(sample_texts(files, spec))
    places = [i for t in found for i, text in enumerate(made["one"]) if text.startswith(t)]
    assert places
    assert max(places) < 300


def test_a_corpus_below_its_budget_is_taken_whole(corpus):
    spec, files, made = corpus
    spec = spec.model_copy(update={"tokenizer_train_mb": 50.0})
    assert sorted(sample_texts(files, spec)) == sorted(t for texts in made.values() for t in texts)
