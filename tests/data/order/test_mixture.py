"""The mixture that a spec asks for, computed from a manifest alone."""

from decimal import Decimal
from itertools import pairwise
from math import floor

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.mixture import mixture
from mhmoe_ray.errors import DataError
from tests.data.order.plain_order import DOMAIN_ERROR
from tests.data.shards.manifests import T, manifest_of
from tests.specs import tiny_spec


def mixed(samples, steps=100, schedule=(), **sources):
    """Return the mixture of a spec with these sources and eight samples a step."""
    sources = {name: {"path": name, **source} for name, source in sources.items()}
    spec = tiny_spec(data={"sources": sources, "schedule": schedule}, train={"steps": steps})
    return mixture(spec, manifest_of(samples))


SAMPLES = {"web/en": 5000, "web/de": 400, "web/sw": 12, "books/a": 300, "books/b": 100, "books/empty": 0}


def by_name(found, values):
    return dict(zip([d.name for d in found.domains], values, strict=True))


def test_temperature_flattens_within_a_source_and_weights_hold_between_them():
    found = mixed(SAMPLES, web={"weight": 3, "alpha": 0.3}, books={"weight": 1})
    [phase] = found.phases
    tokens = np.array([SAMPLES[d] * T + 1 for d in ("web/de", "web/en", "web/sw")])
    tempered = by_name(found, phase.tempered)
    assert list(tempered) == ["books/a", "books/b", "web/de", "web/en", "web/sw"]
    wanted = 0.75 * tokens**0.3 / (tokens**0.3).sum()
    assert [tempered["web/de"], tempered["web/en"], tempered["web/sw"]] == pytest.approx(wanted, rel=1e-12)
    by_size = by_name(found, phase.by_size)
    assert by_size["web/en"] == pytest.approx(0.75 * tokens[1] / tokens.sum())
    assert (by_size["books/a"], tempered["books/a"]) == pytest.approx([0.25 * 4801 / 6402] * 2)
    assert phase.shares == pytest.approx(phase.tempered, abs=1e-12)


def test_fixed_shares_leave_out_what_they_do_not_name():
    found = mixed(SAMPLES, web={"shares": {"en": 3, "sw": 1}}, books={"weight": 0})
    shares = by_name(found, found.phases[0].shares)
    assert shares == pytest.approx({"web/en": 0.75, "web/sw": 0.25, "web/de": 0, "books/a": 0, "books/b": 0})
    assert by_name(found, found.read(0, 100))["web/de"] == 0


def test_a_schedule_changes_what_it_names_and_counts_go_on():
    schedule = [
        {"from_step": 50, "sources": {"web": {"weight": 1}, "books": {"shares": {"b": 1}}}},
        {"from_step": 80, "sources": {"web": {"weight": 0}, "books": {"alpha": 0}}},
        {"from_step": 100, "sources": {"books": {"weight": 0}, "web": {"weight": 1}}},
    ]
    found = mixed(SAMPLES, schedule=schedule, web={"weight": 3, "shares": {"en": 1}}, books={"weight": 1})
    assert [(p.from_step, p.steps) for p in found.phases] == [(0, 50), (50, 30), (80, 20)], "the last never begins"
    shares = [by_name(found, p.shares) for p in found.phases]
    assert [s["web/en"] for s in shares] == pytest.approx([0.75, 0.5, 0])
    assert [s["books/b"] for s in shares] == pytest.approx([0.25 * 1601 / 6402, 0.5, 0.5])
    domain, sample = found.order(np.arange(800))
    names = np.array([d.name for d in found.domains])[domain]
    assert (names[640:] != "web/en").all()
    read = by_name(found, found.read(0, 100))
    assert read == {name: (names == name).sum() for name in read}
    for name in ("books/b", "books/a"):
        ours = sample[names == name]
        first = ours[: found.domains[list(read).index(name)].samples]
        assert len(set(first)) == len(first), "nothing twice before all was read, across phases"


def test_the_order_does_not_depend_on_the_number_of_steps_without_limits():
    sources = {"web": {"weight": 3, "alpha": 0.3}, "books": {}}
    schedule = [{"from_step": 40, "sources": {"web": {"weight": 1}}}]
    short, long = (mixed(SAMPLES, steps=n, schedule=schedule, **sources).order for n in (30, 100))
    assert np.array_equal(short(np.arange(240)), long(np.arange(240)))


def test_limits_hold_to_the_sample_and_the_rest_goes_to_the_source_s_others():
    found = mixed(SAMPLES, web={"weight": 3, "alpha": 0, "max_epochs": 4}, books={"weight": 1})
    read = by_name(found, found.read(0, 100))
    assert read["web/sw"] == 48
    assert (read["web/en"], read["web/de"]) == (276, 276)
    assert read["books/a"] + read["books/b"] == 200
    assert found.limits == [None, None, 1600, 20000, 48]


@pytest.mark.parametrize(("epochs", "samples", "limit"), [(0.29, 100, 29), (0.7, 10, 7), (1.1, 10, 11), (2, 7, 14)])
def test_limits_are_as_written(epochs, samples, limit):
    found = mixed({"web/a": samples, "web/b": 5000}, web={"max_epochs_of": {"a": epochs}})
    assert found.limits == [limit, None]


def test_a_source_at_its_limits_leaves_the_rest_to_the_others():
    limited = {"weight": 3, "max_epochs": 1, "max_epochs_of": {"a": 0.5}}
    found = mixed(SAMPLES, web={"weight": 1, "shares": {"en": 1}}, books=limited)
    assert by_name(found, found.read(0, 100)) == {
        "books/a": 150,
        "books/b": 100,
        "web/de": 0,
        "web/en": 550,
        "web/sw": 0,
    }


def test_exactly_one_epoch_of_everything_is_possible_and_a_step_more_is_not():
    samples = {"web/a": 333, "web/b": 67, "books/c": 400}
    sources = {"web": {"max_epochs": 1}, "books": {"max_epochs": 1}}
    found = mixed(samples, **sources)
    domain, sample = found.order(np.arange(800))
    assert len(set(zip(domain, sample, strict=True))) == 800
    with pytest.raises(DataError) as e:
        mixed(samples, steps=123, **sources)
    assert str(e.value) == (
        "mixture: max_epochs allows 800 samples, and 984 are wanted; "
        "set train.steps to 100, or raise max_epochs, or add text"
    )


def test_a_phase_without_enough_data_is_named_with_the_steps_that_are_possible():
    schedule = [{"from_step": 40, "sources": {"web": {"weight": 0}}}]
    sources = {"web": {"weight": 3}, "books": {"shares": {"b": 1}, "max_epochs": 3}}
    with pytest.raises(DataError, match=r"allows 258 samples from step 40 on, and 480 are wanted; set .* to 67,") as e:
        mixed(SAMPLES, schedule=schedule, **sources)
    assert e.value.exit_code == 4
    mixed(SAMPLES, steps=67, schedule=schedule, **sources)
    with pytest.raises(DataError):
        mixed(SAMPLES, steps=68, schedule=schedule, **sources)


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"books": {"shares": {"a": 1, "empty": 1}}}, "domain books/empty: it does not fill a single sample"),
        ({"books": {"shares": {"c": 1}}}, "domain books/c: it does not fill a single sample"),
        ({"books": {}, "news": {}}, "source news: none of its domains fills a sample"),
        ({"books": {"max_epochs_of": {"x": 1}}}, "there is no books/x in the prepared data"),
        ({"books": {"max_epochs": 0.001}}, "max_epochs allows 0 samples, and 800 are wanted; raise max_epochs"),
    ],
)
def test_mistakes_are_one_line(sources, says):
    with pytest.raises(DataError) as e:
        mixed(SAMPLES, **sources)
    assert says in str(e.value)


@st.composite
def limited_mixtures(draw):
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
    change = st.fixed_dictionaries({"weight": st.floats(0, 3)}, optional={"alpha": st.floats(0, 1)})
    schedule = [
        {"from_step": s, "sources": draw(st.dictionaries(st.sampled_from(names), change, min_size=1))} for s in steps
    ]
    return samples, draw(st.integers(1, 80)), schedule, sources


def asked_without_limits(samples, steps, schedule, sources):
    """Return the samples of each domain that the spec asks for, phase by phase: a plain reading of the rules without
    limits."""
    now = {name: dict(source) for name, source in sources.items()}
    begins = {0: {}, **{phase["from_step"]: phase["sources"] for phase in schedule}}
    result = []
    for begin, end in zip(begins, [*list(begins)[1:], 10**9], strict=True):
        if begin >= steps:
            break
        for name, change in begins[begin].items():
            now[name] |= change
        whole = sum(source["weight"] for source in now.values())
        if not whole:
            return None
        tempered = {d: (n * T + 1) ** now[d[0]]["alpha"] for d, n in samples.items()}
        of_source = {s: sum(v for d, v in tempered.items() if d[0] == s) for s in now}
        positions = (min(end, steps) - begin) * 8
        result.append({d: positions * now[d[0]]["weight"] / whole * v / of_source[d[0]] for d, v in tempered.items()})
    return result


@settings(max_examples=200)
@given(limited_mixtures())
def test_what_is_read_follows_from_the_rules(problem):
    samples, steps, schedule, sources = problem
    asked = asked_without_limits(*problem)
    assume(asked is not None)
    assume(all(any(s["weight"] for s in mixes) for mixes in _weights_by_phase(schedule, sources)))
    limits = {
        d: None if (most := sources[d[0]]["max_epochs"]) is None else floor(Decimal(str(most)) * n)
        for d, n in samples.items()
    }
    has_limits = any(limit is not None for limit in limits.values())
    try:
        found = mixed(samples, steps=steps, schedule=schedule, **sources)
    except DataError:
        # Not where each phase can have all it asks for.
        whole = {d: sum(phase[d] for phase in asked) for d in samples}
        assert any(limits[d] is not None and whole[d] > limits[d] for d in samples)
        return
    names = [d.name for d in found.domains]
    domain, sample = found.order(np.arange(steps * 8))
    read = by_name(found, found.read(0, steps))
    assert read == {name: int((domain == i).sum()) for i, name in enumerate(names)}
    for i, name in enumerate(names):
        if limits[name] is not None:
            assert read[name] <= limits[name]
            assert np.bincount(sample[domain == i], minlength=1).max() <= -(-limits[name] // samples[name])
    bounds = [*(p.from_step for p in found.phases), steps]
    for phase, (begin, end) in zip(asked, pairwise(bounds), strict=True):
        in_phase = by_name(found, found.read(begin, end))
        assert sum(in_phase.values()) == (end - begin) * 8
        error = 2 if has_limits else DOMAIN_ERROR
        within = all(
            limits[d] is None or sum(p[d] for p in asked) * (1 + 1e-9) < limits[d] - len(asked) for d in samples
        )
        for name in names:
            if not phase[name]:
                assert in_phase[name] == 0
            if within:
                assert abs(in_phase[name] - phase[name]) < error


def _weights_by_phase(schedule, sources):
    now = dict(sources)
    yield list(now.values())
    for phase in schedule:
        now |= phase["sources"]
        yield list(now.values())
