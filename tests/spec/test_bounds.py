"""Tests that senseless and huge numbers in specs give one line, or an answer in a bounded time."""

import signal
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mhmoe_ray.api.placement import forecast_placement
from mhmoe_ray.api.plan import plan_figures
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.expert_step import expected_drop_share
from mhmoe_ray.planner.resolve import resolve_spec
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import WorkerRange
from mhmoe_ray.spec.load import apply_overrides, read_tree

JOBS = Path(__file__).parents[2] / "jobs"
HUGE_NUMBER = 10**12
MAX_SECONDS = 60
BOUNDED_KEYS = {
    *ModelSpec.model_fields,
    *MoESpec.model_fields,
    "seq_len",
    "micro_batches",
    "workers",
    "ep",
    "image_size",
}


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """Interrupt an answer that would take hours."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"more than {MAX_SECONDS} s")

    previous_handler = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous_handler)


def has_integer(annotation: Any) -> bool:
    return annotation is int or any(map(has_integer, typing.get_args(annotation)))


def integer_keys(section: Section, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of each integer in a section and its subsections, also of those that are not set."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + name
        if isinstance(value, WorkerRange) or type(value) is int or (value is None and has_integer(field.annotation)):
            yield key
        elif isinstance(value, Section):
            yield from integer_keys(value, f"{key}.")
        elif isinstance(value, dict):
            for entry, subsection in value.items():
                if isinstance(subsection, Section):
                    yield from integer_keys(subsection, f"{key}.{entry}.")


@pytest.mark.parametrize("job", ["quickstart", "pictures", "vision"])
@pytest.mark.parametrize("number", [HUGE_NUMBER, 0, -1])
def test_any_integer_of_a_spec_gives_one_line_or_a_quick_plan(job, number):
    spec = resolve_spec(read_tree(JOBS / f"{job}.yaml"), job)
    keys = list(integer_keys(spec))
    assert {"model.layers", "cluster.workers", "train.steps", "train.decay_steps"} <= {*keys}
    accepted_keys, messages = list[str](), list[str]()
    for key in keys:
        tree = apply_overrides(spec.model_dump(mode="json", by_alias=True), [f"{key}={number}"])
        signal.alarm(MAX_SECONDS)
        try:
            changed_spec = resolve_spec(tree, job)
            plan_figures(changed_spec, forecast_placement(changed_spec), [])
            accepted_keys.append(key)
        except SpecError as e:
            messages.append(str(e))
    assert [message for message in messages if "\n" in message] == []
    if number:
        assert [key for key in accepted_keys if key.rpartition(".")[2] in BOUNDED_KEYS] == []


def test_a_plan_of_the_largest_sizes_is_quick():
    sizes = ["model.layers=10000", "model.d_model=2000000", "model.attention_heads=10000", "model.d_head=2000000"]
    sizes += ["model.vocab_size=100000000", "data.seq_len=100000000", "train.steps=1000000000", "cluster.workers=1000"]
    sizes += ["train.micro_batches=1000000", "train.micro_batch_size=1000000"]
    experts = ["experts=10000000", "heads=10000", "top_k=5000000", "d_expert=2000000", "capacity_factor=1.0"]
    sizes += [f"model.moe.{size}" for size in [*experts, "d_sub_token=2000000"]]
    signal.alarm(MAX_SECONDS)
    spec = resolve_spec(read_tree(JOBS / "quickstart.yaml", sizes), "spec")
    figures = plan_figures(spec, forecast_placement(spec), [])
    assert figures["sizes"]["parameters"] > 1e21


def test_the_share_of_dropped_routes_is_continuous_where_its_formula_changes():
    moe = MoESpec(experts=8, top_k=2, d_expert=8, capacity_factor=1.0)
    smaller_share, larger_share = (expected_drop_share(moe, rows) for rows in (530_000_000, 540_000_000))
    assert larger_share == pytest.approx(smaller_share * (53 / 54) ** 0.5, rel=1e-3)
