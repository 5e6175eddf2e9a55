"""A sweep as one table."""

from collections import Counter
from typing import Any

from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.variants import Variant, matched_step, row
from mhmoe_ray.runs import events
from mhmoe_ray.runs.sweeps import SweepDir


def table(place: SweepDir) -> list[dict[str, Any]]:
    """JSON: one for each variant, in the order of the sweep. Losses are those of finished runs, while none is of
    all, at the last step that they have all validated; ratios are to the first variant."""
    definition, started = place.definition(), place.runs()
    figures = {
        name: RunFigures.read(run)
        for name, run in started.items()
        if run.attempts_file.exists() and run.spec_file.exists()
    }
    over = {name for name, run in figures.items() if run.is_finished}
    shown = [e for e in definition.entries if e.name in started or e.name in set(definition.wanted)]
    names = list(dict.fromkeys(entry.variant for entry in shown))
    found = []
    for name in names:
        entries = [entry for entry in shown if entry.variant == name]
        states = Counter(
            events.state(events.events(started[e.name])) if e.name in figures else "queued" for e in entries
        )
        variant = Variant(name, [figures[e.name] for e in entries if e.name in (over or figures)])
        found.append((entries[0].spec, states, variant))
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
