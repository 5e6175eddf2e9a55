"""The tables of `mhmoe plan`, each with its title."""

from collections.abc import Iterator

from rich.table import Table

from mhmoe_ray.cli import plan_placement
from mhmoe_ray.cli.common import in_bytes, number_table
from mhmoe_ray.cli.plan_placement import Placement, placed_spec
from mhmoe_ray.planner.expert_step import ExpertStep, expert_step
from mhmoe_ray.planner.match import parity
from mhmoe_ray.planner.memory import checkpoint_copy, memory
from mhmoe_ray.planner.sizes import parts
from mhmoe_ray.planner.traffic import Exchange, exchanges
from mhmoe_ray.spec import ModelSpec, RunSpec


def tables(spec: RunSpec, placed: Placement) -> Iterator[tuple[str, Table]]:
    yield "parameters and multiply-adds per token, in one layer", _parts(spec)
    if spec.reference and (reference := spec.reference_model):
        name = spec.reference.name
        yield f"beside {name} on the same trunk", _parity(spec.model, name, reference)
    batch = f"{spec.train.micro_batch_size} x {spec.data.seq_len} tokens"
    yield f"memory of a rank, micro-batches of {batch}", _memory(spec)
    step = expert_step(spec)
    if step:
        title = f"expert step of one layer on one rank, {batch}, forward, {spec.train.precision}"
        yield title, _step(step)
    found = exchanges(placed_spec(spec, placed.layout) if placed.layout else spec, placed.layout)
    if found:
        yield "exchanged in a step, by one rank", _exchanges(found)
    yield f"placement, {placed.of}", plan_placement.table(placed)


def _parts(spec: RunSpec) -> Table:
    rows = [
        (p.name, str(p.layers), f"{p.parameters:,}", f"{p.active:,}", f"{p.macs:,}", f"{p.layers * p.parameters:,}")
        for p in parts(spec.model)
    ]
    return number_table(["", "layers", "parameters", "active", "multiply-adds", "in all layers"], rows)


def _parity(model: ModelSpec, name: str, reference: ModelSpec) -> Table:
    compared = parity(model, reference).items()
    rows = [(what, f"{c.own:,}", f"{c.reference:,}", f"{c.ratio:.3f}") for what, c in compared]
    return number_table(["", "this", name, "ratio"], rows)


def _step(step: ExpertStep) -> Table:
    row = (f"{step.rows:,}", f"{step.flops:.3g}", in_bytes(step.bytes), f"{step.intensity:.1f}")
    return number_table(["rows", "FLOPs", "moved", "FLOPs per byte"], [row])


def _exchanges(found: list[Exchange]) -> Table:
    rows = [
        (e.name, str(e.ranks), in_bytes(e.payload), in_bytes(e.sent), f"{e.times:,}", in_bytes(e.sent_per_step))
        for e in found
    ]
    return number_table(["", "ranks", "brings", "sends", "times", "sends in all"], rows)


def _memory(spec: RunSpec) -> Table:
    """Return a table of the memory of a rank, for the largest and the smallest number of workers that the run may have.

    Shards are largest with the fewest workers. Memory that a GPU's rank uses on its host comes after the total.
    """
    counts = [*dict.fromkeys([spec.worker_counts[-1], spec.worker_counts[0]])]
    of_size = [spec.with_workers(count) for count in counts]
    held = [memory(each) for each in of_size]
    by_name = zip(held[0]._fields, zip(*held, strict=True), strict=True)
    rows = [(name.replace("_", " "), *map(in_bytes, of)) for name, of in by_name if any(of)]
    rows.append(("total", *(in_bytes(h.total) for h in held)))
    if spec.cluster.gpus_per_worker:
        rows.append(("checkpoint copy, on the host", *(in_bytes(checkpoint_copy(each)) for each in of_size)))
    columns = [f"of {count} workers" for count in counts]
    return number_table(["", *columns], rows, header=len(counts) > 1)
