"""A sweep as one table."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.variants import Variant, matched_step, row
from mhmoe_ray.runs import events
from mhmoe_ray.runs.sweeps import SweepDir
from mhmoe_ray.spec import SweepRun


def table(place: SweepDir) -> list[dict[str, Any]]:
    """JSON: one for each variant, in the order of the sweep. Losses are those of finished runs, while none is of
    all, at the last step that they have all validated; runs whose last one is not finite have none. Ratios are to the
    first variant."""
    wanted = set(place.order(place.orders()[-1]).wanted)
    figures = {name: RunFigures.read(run) for name, run in place.runs().items() if run.attempts_file.exists()}
    compared = {name for name, run in figures.items() if not run.is_diverged}
    compared = {name for name in compared if figures[name].is_finished} or compared
    found = []
    for variant_name, same in _by_variant(e for e in place.entries() if e.name in figures or e.name in wanted).items():
        states = Counter(_state(figures.get(entry.name)) for entry in same)
        variant = Variant(variant_name, [figures[e.name] for e in same if e.name in compared])
        started = next((figures[e.name].spec for e in same if e.name in figures), same[0].spec)
        found.append((started, states, variant))
    step = matched_step([variant for _, _, variant in found if variant.runs])
    first = sizes(found[0][0].model)
    return [
        {
            "variant": variant.name,
            "states": dict(states),
            "step": step,
            "losses": variant.losses(step) if step else {},
            **row(variant, sizes(spec.model), first, step),
        }
        for spec, states, variant in found
    ]


def _by_variant(entries: Iterable[SweepRun]) -> dict[str, list[SweepRun]]:
    found: dict[str, list[SweepRun]] = {}
    for entry in entries:
        found.setdefault(entry.variant, []).append(entry)
    return found


def _state(run: RunFigures | None) -> str:
    if run is None:
        return "queued"
    said = events.state(events.events(run.run))
    return f"{said}, diverged" if run.is_diverged else said
