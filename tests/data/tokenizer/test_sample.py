import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources import RawFile, find_files
from mhmoe_ray.data.tokenizer import train
from mhmoe_ray.data.tokenizer.train import domain_budgets, file_budgets, sample_texts
from mhmoe_ray.errors import DataError
from tests.data.texts import make_documents, write_documents
from tests.support.specs import tiny_spec


def make_data_spec(train_mb=1.0, schedule=(), **sources):
    sources = {name: {"path": f"raw/{name}", **source} for name, source in sources.items()}
    keys = {"sources": sources, "schedule": schedule, "tokenizer_train_mb": train_mb}
    return tiny_spec(data=keys).data


SIZES = {"web/en": 8_000_000, "web/de": 1_000_000, "books/a": 900_000, "books/b": 100_000}


def test_domain_budgets_follow_weights_and_sizes():
    spec = make_data_spec(web={"weight": 3}, books={"weight": 1})
    assert domain_budgets(SIZES, spec) == pytest.approx(
        {"web/en": 666_667, "web/de": 83_333, "books/a": 225_000, "books/b": 25_000}, abs=1
    )


def test_domain_budgets_follow_temperature_and_fixed_shares():
    spec = make_data_spec(web={"weight": 3, "alpha": 0}, books={"weight": 1, "shares": {"b": 1, "a": 9}})
    expected = {"web/en": 375_000, "web/de": 375_000, "books/a": 225_000, "books/b": 25_000}
    assert domain_budgets(SIZES, spec) == expected


def test_domain_budgets_are_limited_by_sizes():
    spec = make_data_spec(5.0, web={"weight": 1}, books={"weight": 1, "shares": {"b": 1}})
    assert domain_budgets(SIZES, spec) == pytest.approx(
        {"web/en": 4_355_556, "web/de": 544_444, "books/a": 0, "books/b": 100_000}, abs=1
    )
    assert domain_budgets(SIZES, make_data_spec(500.0, web={}, books={})) == SIZES


def test_domain_budgets_include_domains_of_later_phases():
    schedule = [
        {"from_step": 10, "sources": {"books": {"weight": 1}, "web": {"weight": 4, "shares": {"de": 1}}}},
        {"from_step": 20, "sources": {"books": {"weight": 1e6}}},
    ]
    spec = make_data_spec(schedule=schedule, web={"shares": {"en": 1}}, books={"weight": 0})
    # In the first phase, web/en has the share 1. In the second, web/de has 0.8, books/a has 0.2 * 0.9 and books/b has
    # 0.2 * 0.1. The third phase has no further domain, so it does not count.
    expected = {"web/en": 500_000, "web/de": 400_000, "books/a": 90_000, "books/b": 10_000}
    assert domain_budgets(SIZES, spec) == pytest.approx(expected, abs=1)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=12), st.floats(1e-4, 2))
def test_file_budgets_add_up_within_the_sizes(sizes, megabytes):
    files = [RawFile(f"web/{i % 3}", f"{i:02}.jsonl", size, "jsonl") for i, size in enumerate(sizes)]
    budgets = file_budgets(files, make_data_spec(megabytes, web={}))
    assert all(0 < budget <= file.size for file, budget in budgets)
    assert sum(budget for _, budget in budgets) <= min(int(megabytes * 1e6), sum(sizes))
    assert sum(budget for _, budget in budgets) == min(int(megabytes * 1e6), sum(sizes))


def test_file_budgets_choose_evenly_spaced_files():
    files = [RawFile("web/all", f"{i:05}.jsonl", 10_000_000, "jsonl") for i in range(10_000)]
    budgets = file_budgets(files, make_data_spec(1.0, web={}))
    numbers = [int(file.path[:5]) for file, _ in budgets]
    assert numbers == list(range(0, 10_000, 500))
    assert {budget for _, budget in budgets} == {50_000}
    names = ("a.jsonl.zst", "b.parquet", "c.jsonl", "d.arrow")
    small_files = [RawFile("web/all", name, 1_000, "jsonl") for name in names]
    assert [budget for _, budget in file_budgets(small_files, make_data_spec(1.0, web={}))] == [
        3_000,
        3_000,
        1_000,
        1_000,
    ]


@pytest.fixture
def corpus(tmp_path):
    """Write two files several times as large as their budgets; return data section, files, and texts by file name."""
    texts_by_name = {name: make_documents(name, 400) for name in ("one", "two")}
    for name, texts in texts_by_name.items():
        write_documents(tmp_path / f"raw/a/{name}.jsonl", texts)
    spec = tiny_spec(tmp_path, data={"tokenizer_train_mb": 0.04}).data
    return spec, find_files(spec), texts_by_name


def test_sample_texts_spreads_over_every_file(corpus, monkeypatch):
    monkeypatch.setattr(train, "MIN_FILE_CHARACTERS", 10_000)
    spec, files, texts_by_name = corpus
    samples = list(sample_texts(files, spec))
    assert samples == list(sample_texts(list(files), spec))
    assert sum(map(len, samples)) == 40_000
    for texts in texts_by_name.values():
        starts = {text[:20]: i for i, text in enumerate(texts)}
        text_indices = sorted(starts[t[:20]] for t in samples if t[:20] in starts)
        assert len(text_indices) == len(set(text_indices)) > 40
        assert max(b - a for a, b in itertools.pairwise([0, *text_indices, 400])) < 60


def test_sample_texts_needs_undamaged_files(corpus):
    """A download may be damaged in the training of the tokenizer alone, and not when the text is tokenised."""
    spec, files, _ = corpus
    os.truncate(files[0].path, files[0].size // 2)
    with pytest.raises(DataError, match=r"it ended after .* \(1 damaged files so far, data.max_bad_files is 0\)"):
        list(sample_texts(files, spec))
    assert list(sample_texts(files, spec.model_copy(update={"max_bad_files": 1})))


def test_sample_texts_is_independent_of_held_out_documents(corpus):
    spec, files, texts_by_name = corpus
    samples = tuple(sample_texts(files, spec))
    texts = [text for texts in texts_by_name.values() for text in texts]
    sampled = [text for text in texts if text.startswith(samples)]
    assert len(sampled) > 100
    shares = [sum(is_validation(text, 0.1) for text in group) / len(group) for group in (texts, sampled)]
    assert shares[1] == pytest.approx(shares[0], abs=0.08)


def test_sample_texts_stops_before_the_end_of_a_large_file(corpus, monkeypatch):
    monkeypatch.setattr(train, "READ_FACTOR", 2)
    spec, files, texts_by_name = corpus
    samples = list(sample_texts(files, spec))
    text_indices = [i for t in samples for i, text in enumerate(texts_by_name["one"]) if text.startswith(t)]
    assert text_indices
    assert max(text_indices) < 300


def test_sample_texts_yields_a_small_corpus_whole(corpus):
    spec, files, texts_by_name = corpus
    spec = spec.model_copy(update={"tokenizer_train_mb": 50.0})
    assert sorted(sample_texts(files, spec)) == sorted(t for texts in texts_by_name.values() for t in texts)
