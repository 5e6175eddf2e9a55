"""Tests of the order of samples in runs that continue another run: no sample is repeated, and none is left out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.mixture import compute_mixture
from mhmoe_ray.data.stream import StreamLayout
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import make_manifest
from tests.support.specs import tiny_spec

OLD_SAMPLES = {"web/en": 500, "web/de": 40, "books/a": 30}
NEW_SAMPLES = {**OLD_SAMPLES, "code/py": 25}
SAMPLES_PER_STEP = 8


def mixture_of(samples, steps, sources, samples_before=None, seed=0, **train):
    spec = tiny_spec(
        data={"sources": {name: {"path": name, **source} for name, source in sources.items()}},
        train={"steps": steps, **train},
        seed=seed,
    )
    return compute_mixture(spec, make_manifest(samples), samples_before)


def sequences(mixture, positions):
    """Return the samples of each domain at positions 0 .. `positions` - 1, in the order in which they are read."""
    domain, sample = mixture.order(np.arange(positions))
    return {d.name: sample[domain == i].tolist() for i, d in enumerate(mixture.domains)}


@settings(max_examples=40)
@given(
    st.integers(1, 60),
    st.fixed_dictionaries({name: st.floats(0.1, 9) for name in ("web", "books", "code")}),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
)
def test_each_old_domain_goes_on_where_it_stood(branch_step, weights, batch_factor, seed):
    """A run that adds a source and changes weights and batch size continues each domain where the first run stopped."""
    old_sources = {"web": {"alpha": 0.5}, "books": {"weight": 0.5}}
    first_mixture = mixture_of(OLD_SAMPLES, 100, old_sources, seed=seed)
    position = branch_step * SAMPLES_PER_STEP
    read_counts = dict(
        zip([d.name for d in first_mixture.domains], first_mixture.order.domain_counts(position), strict=True)
    )
    new_sources = {name: {"weight": weight} for name, weight in weights.items()}
    branch = mixture_of(NEW_SAMPLES, 50, new_sources, read_counts, seed, micro_batches=4 * batch_factor)
    positions = 50 * SAMPLES_PER_STEP * batch_factor
    read_before, read_by_branch = sequences(first_mixture, position), sequences(branch, positions)
    # A run of one domain alone reads the domain's endless sequence of samples.
    for name, size in NEW_SAMPLES.items():
        single_mixture = mixture_of({name: size}, 2000, {name.partition("/")[0]: {}}, seed=seed)
        whole_sequence = [*read_before.get(name, []), *read_by_branch[name]]
        assert whole_sequence == sequences(single_mixture, len(whole_sequence))[name]
    counts = dict(zip([d.name for d in branch.domains], branch.order.domain_counts(positions), strict=True))
    assert counts == {name: len(samples) for name, samples in read_by_branch.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_continued_order_is_the_same_for_any_number_of_workers(world):
    """The blocks that the ranks read in turn have, together, every position of the order once."""
    read_counts = {"web/en": 123, "books/a": 31}
    branch = mixture_of(NEW_SAMPLES, 50, {"web": {}, "books": {}, "code": {}}, read_counts)
    layout = StreamLayout(world, micro_batch_size=2, micro_batches=3)
    rows = 10 * layout.block_rows * world
    positions = layout.positions(np.arange(rows))
    assert sorted(positions) == list(range(rows))
    domain, sample = branch.order(positions)
    in_order = np.argsort(positions)
    names = [d.name for d in branch.domains]
    by_domain = {n: sample[in_order][domain[in_order] == i].tolist() for i, n in enumerate(names)}
    assert by_domain == sequences(branch, rows)


def test_limits_count_what_earlier_runs_have_read():
    sources = {"web": {"max_epochs": 2}, "books": {}}
    earlier_counts = {"web/en": 900, "web/de": 80, "books/a": 7}
    mixture = mixture_of(OLD_SAMPLES, 100, sources, earlier_counts)
    names = [d.name for d in mixture.domains]
    assert dict(zip(names, mixture.limits, strict=True)) == {"web/en": 100, "web/de": 0, "books/a": None}
    read_counts = dict(zip(names, mixture.samples_read(0, 100), strict=True))
    assert (read_counts["web/en"], read_counts["web/de"]) == (100, 0)


def test_a_branch_beyond_max_epochs_is_refused():
    with pytest.raises(
        DataError, match=r"domain web/de: the run that it continues has read 81 samples, and max_epochs"
    ):
        mixture_of(OLD_SAMPLES, 100, {"web": {"max_epochs": 2}, "books": {}}, {"web/de": 81})
    with pytest.raises(DataError, match="max_epochs allows"):
        mixture_of(OLD_SAMPLES, 100, {"web": {"max_epochs": 2}}, {"web/de": 80, "web/en": 999})
