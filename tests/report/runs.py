"""Run directories with known numbers, as if the runs had trained."""

import json

from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.variants import group_variants
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run
from tests.support.specs import tiny_spec

MOE = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24}


def make_run(
    folder,
    name,
    seed,
    final,
    moe=MOE,
    steps=20,
    validated=5,
    micro_batches=4,
    speed=100.0,
    balance=1.0,
    end_event="finished",
) -> RunDir:
    """Write a run directory with a history, as if the run had trained, and return it.

    Args:
        folder: The project folder.
        name: The name of the run's variant.
        seed: The seed of the run.
        final: The validation loss at step 20; earlier ones are higher.
        moe: The section of the mixture of experts, or None for a dense model.
        steps: The number of steps in the history; the spec has 20.
        validated: The number of steps from one validation to the next.
        micro_batches: The micro-batches of a step in the spec.
        speed: The tokens per second, to which each step adds its number.
        balance: The balance of the router, to which each step adds 1 / step.
        end_event: The kind of the last event, or None if the run has not ended.
    """
    spec = tiny_spec(folder, model={"moe": moe}, train={"micro_batches": micro_batches})
    spec = spec.model_copy(update={"name": f"sweep-{name}-s{seed}", "seed": seed})
    run = create_run(spec)
    add_attempt(run, Attempt(f"{run.id}-1", "http://127.0.0.1:1", local=True))
    for step in range(1, steps + 1):
        line = {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: final + 1 / step, metrics.GROUP: 1}
        line |= {metrics.TOKENS: 128 * step, metrics.TOKENS_PER_S: speed + step}
        if moe:
            line |= {metrics.BALANCE: balance + 1 / step, metrics.ENTROPY: 0.9, metrics.DROPPED: 0.0}
        if step % validated == 0:
            line[metrics.VAL_LOSS] = final + (20 - step) / 20
        history.append(run, line)
    history.flush(run)
    if moe:
        counts = {"step": steps, "routes_per_layer_and_expert": [[10, 20, 30, 40]]}
        (run.routing / f"step_{steps:08d}.1.json").write_text(json.dumps(counts))
    if end_event:
        events.record(run, end_event, **({"reason": "its end"} if end_event == "failed" else {"step": steps}))
    return run


def six_runs(folder):
    """Write and return the finished runs of the variants `dense` and `mhmoe-h2` with the seeds 0, 1 and 2."""
    losses = {"dense": (3.0, 3.1, 3.2), "mhmoe-h2": (2.9, 2.98, 3.11)}
    return [
        make_run(folder, name, seed, loss, moe=None if name == "dense" else MOE)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def read_variants(runs):
    """Read the metrics, evaluations and events of runs, and return the variants into which the runs are grouped."""
    return group_variants([RunFigures.read(run) for run in runs])
