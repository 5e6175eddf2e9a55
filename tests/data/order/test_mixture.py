"""Tests of the mixture that a spec asks for, computed from a manifest alone."""

from decimal import Decimal
from itertools import pairwise
from math import floor

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.mixture import compute_mixture
from mhmoe_ray.errors import DataError
from tests.data.order.plain_order import DOMAIN_ERROR
from tests.data.shards.manifests import T, make_manifest
from tests.support.specs import tiny_spec


def make_mixture(samples, steps=100, schedule=(), **sources):
    """Return the mixture of a spec with these sources and eight samples a step; `samples` are counts by domain."""
    sources = {name: {"path": name, **source} for name, source in sources.items()}
    spec = tiny_spec(data={"sources": sources, "schedule": schedule}, train={"steps": steps})
    return compute_mixture(spec, make_manifest(samples))


SAMPLES = {"web/en": 5000, "web/de": 400, "web/sw": 12, "books/a": 300, "books/b": 100, "books/empty": 0}


def values_by_domain(mixture, values):
    return dict(zip([d.name for d in mixture.domains], values, strict=True))


def test_temperature_flattens_shares_within_a_source():
    mixture = make_mixture(SAMPLES, web={"weight": 3, "alpha": 0.3}, books={"weight": 1})
    [phase] = mixture.phases
    tokens = np.array([SAMPLES[d] * T + 1 for d in ("web/de", "web/en", "web/sw")])
    tempered = values_by_domain(mixture, phase.tempered)
    assert list(tempered) == ["books/a", "books/b", "web/de", "web/en", "web/sw"]
    expected_shares = 0.75 * tokens**0.3 / (tokens**0.3).sum()
    assert [tempered["web/de"], tempered["web/en"], tempered["web/sw"]] == pytest.approx(expected_shares, rel=1e-12)
    by_size = values_by_domain(mixture, phase.by_size)
    assert by_size["web/en"] == pytest.approx(0.75 * tokens[1] / tokens.sum())
    assert (by_size["books/a"], tempered["books/a"]) == pytest.approx([0.25 * 4801 / 6402] * 2)
    assert phase.shares == pytest.approx(phase.tempered, abs=1e-12)


def test_fixed_shares_exclude_other_domains():
    mixture = make_mixture(SAMPLES, web={"shares": {"en": 3, "sw": 1}}, books={"weight": 0})
    shares = values_by_domain(mixture, mixture.phases[0].shares)
    assert shares == pytest.approx({"web/en": 0.75, "web/sw": 0.25, "web/de": 0, "books/a": 0, "books/b": 0})
    assert values_by_domain(mixture, mixture.samples_read(0, 100))["web/de"] == 0


def test_schedule_changes_the_named_sources_only():
    schedule = [
        {"from_step": 50, "sources": {"web": {"weight": 1}, "books": {"shares": {"b": 1}}}},
        {"from_step": 80, "sources": {"web": {"weight": 0}, "books": {"alpha": 0}}},
        {"from_step": 100, "sources": {"books": {"weight": 0}, "web": {"weight": 1}}},
    ]
    mixture = make_mixture(SAMPLES, schedule=schedule, web={"weight": 3, "shares": {"en": 1}}, books={"weight": 1})
    assert [(p.from_step, p.steps) for p in mixture.phases] == [(0, 50), (50, 30), (80, 20)], (
        "the last phase never begins"
    )
    shares = [values_by_domain(mixture, p.shares) for p in mixture.phases]
    assert [s["web/en"] for s in shares] == pytest.approx([0.75, 0.5, 0])
    assert [s["books/b"] for s in shares] == pytest.approx([0.25 * 1601 / 6402, 0.5, 0.5])
    domain, sample = mixture.order(np.arange(800))
    names = np.array([d.name for d in mixture.domains])[domain]
    assert (names[640:] != "web/en").all()
    read_counts = values_by_domain(mixture, mixture.samples_read(0, 100))
    assert read_counts == {name: (names == name).sum() for name in read_counts}
    for name in ("books/b", "books/a"):
        domain_samples = sample[names == name]
        first_epoch = domain_samples[: mixture.domains[list(read_counts).index(name)].samples]
        assert len(set(first_epoch)) == len(first_epoch), "a sample was repeated before all samples were read"


def test_order_without_limits_is_independent_of_the_number_of_steps():
    sources = {"web": {"weight": 3, "alpha": 0.3}, "books": {}}
    schedule = [{"from_step": 40, "sources": {"web": {"weight": 1}}}]
    short_order, long_order = (make_mixture(SAMPLES, steps=n, schedule=schedule, **sources).order for n in (30, 100))
    assert np.array_equal(short_order(np.arange(240)), long_order(np.arange(240)))


def test_limited_domain_passes_its_excess_to_domains_of_its_source():
    mixture = make_mixture(SAMPLES, web={"weight": 3, "alpha": 0, "max_epochs": 4}, books={"weight": 1})
    read_counts = values_by_domain(mixture, mixture.samples_read(0, 100))
    assert read_counts["web/sw"] == 48
    assert (read_counts["web/en"], read_counts["web/de"]) == (276, 276)
    assert read_counts["books/a"] + read_counts["books/b"] == 200
    assert mixture.limits == [None, None, 1600, 20000, 48]


@pytest.mark.parametrize(("epochs", "samples", "limit"), [(0.29, 100, 29), (0.7, 10, 7), (1.1, 10, 11), (2, 7, 14)])
def test_limits_are_exact_decimals(epochs, samples, limit):
    mixture = make_mixture({"web/a": samples, "web/b": 5000}, web={"max_epochs_of": {"a": epochs}})
    assert mixture.limits == [limit, None]


def test_limited_source_passes_its_excess_to_other_sources():
    limited_source = {"weight": 3, "max_epochs": 1, "max_epochs_of": {"a": 0.5}}
    mixture = make_mixture(SAMPLES, web={"weight": 1, "shares": {"en": 1}}, books=limited_source)
    assert values_by_domain(mixture, mixture.samples_read(0, 100)) == {
        "books/a": 150,
        "books/b": 100,
        "web/de": 0,
        "web/en": 550,
        "web/sw": 0,
    }


def test_mixture_allows_exactly_one_epoch_of_all_samples():
    samples = {"web/a": 333, "web/b": 67, "books/c": 400}
    sources = {"web": {"max_epochs": 1}, "books": {"max_epochs": 1}}
    mixture = make_mixture(samples, **sources)
    domain, sample = mixture.order(np.arange(800))
    assert len(set(zip(domain, sample, strict=True))) == 800
    with pytest.raises(DataError) as e:
        make_mixture(samples, steps=123, **sources)
    assert str(e.value) == (
        "mixture: max_epochs allows 800 samples, and 984 are needed; "
        "set train.steps to 100, or raise max_epochs, or add text"
    )


def test_error_names_a_phase_without_enough_data():
    schedule = [{"from_step": 40, "sources": {"web": {"weight": 0}}}]
    sources = {"web": {"weight": 3}, "books": {"shares": {"b": 1}, "max_epochs": 3}}
    with pytest.raises(DataError, match=r"allows 258 samples from step 40 on, and 480 are needed; set .* to 67,") as e:
        make_mixture(SAMPLES, schedule=schedule, **sources)
    assert e.value.exit_code == 4
    make_mixture(SAMPLES, steps=67, schedule=schedule, **sources)
    with pytest.raises(DataError):
        make_mixture(SAMPLES, steps=68, schedule=schedule, **sources)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"books": {"shares": {"a": 1, "empty": 1}}}, "domain books/empty: it does not fill a single sample"),
        ({"books": {"shares": {"c": 1}}}, "domain books/c: it does not fill a single sample"),
        ({"books": {}, "news": {}}, "source news: none of its domains fills a sample"),
        ({"books": {"max_epochs_of": {"x": 1}}}, "there is no books/x in the prepared data"),
        ({"books": {"max_epochs": 0.001}}, "max_epochs allows 0 samples, and 800 are needed; raise max_epochs"),
    ],
)
def test_unusable_sources_are_reported(sources, message):
    with pytest.raises(DataError) as e:
        make_mixture(SAMPLES, **sources)
    assert message in str(e.value)


@st.composite
def mixture_problems(draw):
    """Draw counts of samples by domain, the number of steps, a schedule, and sources with optional limits."""
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=8))
    samples = {f"{draw(st.sampled_from(['x', 'y', 'z']))}/{i}": n for i, n in enumerate(sizes)}
    names = sorted({name[0] for name in samples})
    epochs = st.none() | st.floats(0.3, 8)
    sources = {
        name: {
            "weight": draw(st.floats(0, 3)),
            "alpha": draw(st.floats(0, 1)),
            "max_epochs": draw(epochs),
        }
        for name in names
    }
    steps = sorted(draw(st.sets(st.integers(1, 60), max_size=3)))
    source_changes = st.fixed_dictionaries({"weight": st.floats(0, 3)}, optional={"alpha": st.floats(0, 1)})
    schedule = [
        {"from_step": s, "sources": draw(st.dictionaries(st.sampled_from(names), source_changes, min_size=1))}
        for s in steps
    ]
    return samples, draw(st.integers(1, 80)), schedule, sources


def requested_samples(samples, steps, schedule, sources):
    """Return the samples that the spec requests of each domain in each phase, as if there were no limits.

    The result is None if a phase gives no source a weight.
    """
    current_sources = {name: dict(source) for name, source in sources.items()}
    changes_by_step = {0: {}, **{phase["from_step"]: phase["sources"] for phase in schedule}}
    result = []
    for start_step, end_step in zip(changes_by_step, [*list(changes_by_step)[1:], 10**9], strict=True):
        if start_step >= steps:
            break
        for name, source_changes in changes_by_step[start_step].items():
            current_sources[name] |= source_changes
        total_weight = sum(source["weight"] for source in current_sources.values())
        if not total_weight:
            return None
        tempered = {d: (n * T + 1) ** current_sources[d[0]]["alpha"] for d, n in samples.items()}
        tempered_by_source = {s: sum(v for d, v in tempered.items() if d[0] == s) for s in current_sources}
        positions = (min(end_step, steps) - start_step) * 8
        result.append(
            {
                d: positions * current_sources[d[0]]["weight"] / total_weight * v / tempered_by_source[d[0]]
                for d, v in tempered.items()
            }
        )
    return result


@settings(max_examples=200)
@given(mixture_problems())
def test_samples_read_follow_shares_and_limits(problem):
    samples, steps, schedule, sources = problem
    requested_samples_by_phase = requested_samples(*problem)
    assume(requested_samples_by_phase is not None)
    assume(all(any(s["weight"] for s in mixes) for mixes in _source_mixes(schedule, sources)))
    limits = {
        d: None if (max_epochs := sources[d[0]]["max_epochs"]) is None else floor(Decimal(str(max_epochs)) * n)
        for d, n in samples.items()
    }
    has_limits = any(limit is not None for limit in limits.values())
    try:
        mixture = make_mixture(samples, steps=steps, schedule=schedule, **sources)
    except DataError:
        # The error is correct only if more samples of some domain are requested than its limit allows.
        total_requested = {d: sum(phase[d] for phase in requested_samples_by_phase) for d in samples}
        assert any(limits[d] is not None and total_requested[d] > limits[d] for d in samples)
        return
    names = [d.name for d in mixture.domains]
    domain, sample = mixture.order(np.arange(steps * 8))
    read_counts = values_by_domain(mixture, mixture.samples_read(0, steps))
    assert read_counts == {name: int((domain == i).sum()) for i, name in enumerate(names)}
    for i, name in enumerate(names):
        if limits[name] is not None:
            assert read_counts[name] <= limits[name]
            assert np.bincount(sample[domain == i], minlength=1).max() <= -(-limits[name] // samples[name])
    bounds = [*(p.from_step for p in mixture.phases), steps]
    for phase, (start_step, end_step) in zip(requested_samples_by_phase, pairwise(bounds), strict=True):
        phase_counts = values_by_domain(mixture, mixture.samples_read(start_step, end_step))
        assert sum(phase_counts.values()) == (end_step - start_step) * 8
        error = 2 if has_limits else DOMAIN_ERROR
        is_below_limits = all(
            limits[d] is None
            or sum(p[d] for p in requested_samples_by_phase) * (1 + 1e-9) < limits[d] - len(requested_samples_by_phase)
            for d in samples
        )
        for name in names:
            if not phase[name]:
                assert phase_counts[name] == 0
            if is_below_limits:
                assert abs(phase_counts[name] - phase[name]) < error


def _source_mixes(schedule, sources):
    current_sources = dict(sources)
    yield list(current_sources.values())
    for phase in schedule:
        current_sources |= phase["sources"]
        yield list(current_sources.values())
