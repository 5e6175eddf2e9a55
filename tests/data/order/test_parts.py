"""Tests of the order of samples if a micro-batch has several parts, each with samples of its own sources."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.data.order.mixture import compute_mixture
from mhmoe_ray.errors import DataError
from tests.data.shards.manifests import make_manifest
from tests.support.specs import tiny_spec

SAMPLES = {"books/a": 70, "code/go": 40, "code/rust": 25, "web/de": 90, "web/en": 400}
PARTS = {
    "text": {"sources": ["web", "books"], "micro_batch_size": 3},
    "programs": {"sources": ["code"], "micro_batch_size": 2},
}
MICRO_BATCHES = 4


def make_spec(parts, sources=("books", "code", "web"), size=None, steps=20, **data):
    sources = {name: {"path": name, "alpha": 0.5, **data.pop(name, {})} for name in sources}
    size = size or sum(part["micro_batch_size"] for part in parts.values())
    train = {"steps": steps, "micro_batches": MICRO_BATCHES, "micro_batch_size": size}
    return tiny_spec(data={"sources": sources, "parts": parts, **data}, train=train)


def read_samples(spec, positions=None):
    """Return the domain's name and the sample's number at each position, by default at all those of the training."""
    mixture = compute_mixture(spec, make_manifest(SAMPLES))
    if positions is None:
        positions = np.arange(spec.train.steps * spec.samples_per_step)
    names = [domain.name for domain in mixture.domains]
    return [(names[domain], int(sample)) for domain, sample in zip(*mixture.order(positions), strict=True)]


def test_every_micro_batch_has_every_part_in_order():
    rows = np.array([name.split("/")[0] for name, _ in read_samples(make_spec(PARTS))]).reshape(-1, 5)
    assert np.isin(rows[:, :3], ["web", "books"]).all()
    assert (rows[:, 3:] == "code").all()


@pytest.mark.parametrize(("part", "columns"), [("text", slice(0, 3)), ("programs", slice(3, 5))])
def test_a_part_has_the_order_of_a_training_of_its_own(part, columns):
    """A training with only the part's sources, and with micro-batches of its size, reads the same samples in order."""
    samples = np.array(read_samples(make_spec(PARTS))).reshape(-1, 5, 2)[:, columns].reshape(-1, 2)
    own_spec = make_spec({}, sorted(PARTS[part]["sources"]), size=PARTS[part]["micro_batch_size"])
    assert samples.tolist() == [[name, str(sample)] for name, sample in read_samples(own_spec)]


def test_a_single_part_has_the_order_of_a_training_without_parts():
    single_part = {"all": {"sources": ["web", "books", "code"], "micro_batch_size": 5}}
    assert read_samples(make_spec(single_part)) == read_samples(make_spec({}, size=5))


@settings(max_examples=60)
@given(position=st.integers(0, 20 * MICRO_BATCHES * 5))
def test_counts_are_those_of_the_positions_before(position):
    spec = make_spec(PARTS)
    mixture = compute_mixture(spec, make_manifest(SAMPLES))
    domains, _ = mixture.order(np.arange(position))
    expected_counts = np.bincount(domains, minlength=len(mixture.domains)).tolist()
    assert mixture.order.domain_counts(position) == expected_counts


def test_shares_are_those_of_all_parts_together():
    mixture = compute_mixture(make_spec(PARTS), make_manifest(SAMPLES))
    [phase] = mixture.phases
    for shares in (phase.by_size, phase.tempered, phase.shares):
        share_by_source = {"books": 0.0, "code": 0.0, "web": 0.0}
        for domain, share in zip(mixture.domains, shares, strict=True):
            share_by_source[domain.source] += share
        assert share_by_source == pytest.approx({"books": 0.3, "code": 0.4, "web": 0.3})


def test_a_limit_belongs_to_the_part_of_its_source():
    """`max_epochs` limits only the domains of its source, and the error names the part that needs more samples."""
    assert compute_mixture(make_spec(PARTS, code={"max_epochs": 3}), make_manifest(SAMPLES)).limits == [
        None, 120, 75, None, None,
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"mixture of part programs: .* allows 65 samples, and 160 are needed"):
        compute_mixture(make_spec(PARTS, code={"max_epochs": 1}), make_manifest(SAMPLES))


@pytest.mark.parametrize(
    ("parts", "size", "reason"),
    [
        ({"a": {"sources": ["web"], "micro_batch_size": 1}}, 1, "source books is in 0 parts: name it in one"),
        (
            {**PARTS, "b": {"sources": ["web"], "micro_batch_size": 1}},
            6,
            "source web is in 2 parts: name it in one",
        ),
        ({"a": {"sources": ["wen"], "micro_batch_size": 1}}, 1, "parts name 'wen', which is not a source"),
        (PARTS, 6, r"micro_batch_size is 6, but the parts of a micro-batch have 3 \+ 2 samples: set it to 5"),
    ],
)
def test_impossible_parts_are_refused(parts, size, reason):
    with pytest.raises(ValueError, match=reason):
        make_spec(parts, size=size)


def test_a_part_needs_a_source_in_every_phase():
    schedule = [{"from_step": 10, "sources": {"code": {"weight": 0}}}]
    with pytest.raises(ValueError, match="every source of part programs has weight 0 from step 10 on"):
        make_spec(PARTS, schedule=schedule)
