"""The tables of `mhmoe plan`, each with its title."""

from collections.abc import Iterator

from rich.table import Table

from mhmoe_ray.api.placement import Placement, spec_for_layout
from mhmoe_ray.cli.common import format_bytes, number_table
from mhmoe_ray.cli.plan_placement import placement_table
from mhmoe_ray.planner.expert_step import ExpertStep, expert_step
from mhmoe_ray.planner.family import plan_of
from mhmoe_ray.planner.match import compare_models
from mhmoe_ray.planner.memory import checkpoint_copy_bytes, compute_memory
from mhmoe_ray.planner.sizes import model_parts
from mhmoe_ray.planner.traffic import Exchange, all_exchanges
from mhmoe_ray.spec import ModelSpec, RunSpec


def tables(spec: RunSpec, placement: Placement) -> Iterator[tuple[str, Table]]:
    """Yield the title and the table of each part of a plan: sizes, memory, traffic and placement of ranks."""
    yield "parameters and multiply-adds per token, in one layer", _parts_table(spec)
    if spec.reference and (reference := spec.reference_model):
        name = spec.reference.name
        yield f"beside {name} on the same trunk", _parity_table(spec.model, name, reference)
    batch = plan_of(spec.model).micro_batch(spec)
    yield f"memory of a rank, micro-batches of {batch}", _memory_table(spec)
    step = expert_step(spec)
    if step:
        title = f"expert step of one layer on one rank, {batch}, forward, {spec.train.precision}"
        yield title, _step_table(step)
    # An elastic run may start with fewer workers than the spec's largest number. The exchanged amounts depend on the
    # number of workers, so the number in the placement is used.
    step_exchanges = all_exchanges(
        spec_for_layout(spec, placement.layout) if placement.layout else spec, placement.layout
    )
    if step_exchanges:
        yield "exchanged in a step, by one rank", _exchange_table(step_exchanges)
    yield f"placement, {placement.description}", placement_table(placement)


def _parts_table(spec: RunSpec) -> Table:
    rows = [
        (p.name, str(p.layers), f"{p.parameters:,}", f"{p.active:,}", f"{p.macs:,}", f"{p.layers * p.parameters:,}")
        for p in model_parts(spec.model)
    ]
    return number_table(["", "layers", "parameters", "active", "multiply-adds", "in all layers"], rows)


def _parity_table(model: ModelSpec, name: str, reference: ModelSpec) -> Table:
    comparisons = compare_models(model, reference).items()
    rows = [(quantity, f"{c.model_value:,}", f"{c.reference:,}", f"{c.ratio:.3f}") for quantity, c in comparisons]
    return number_table(["", "this", name, "ratio"], rows)


def _step_table(step: ExpertStep) -> Table:
    row = (f"{step.rows:,}", f"{step.flops:.3g}", format_bytes(step.bytes), f"{step.intensity:.1f}")
    return number_table(["rows", "FLOPs", "moved", "FLOPs per byte"], [row])


def _exchange_table(step_exchanges: list[Exchange]) -> Table:
    rows = [
        (
            e.name,
            str(e.ranks),
            format_bytes(e.payload),
            format_bytes(e.sent_bytes),
            f"{e.times:,}",
            format_bytes(e.sent_per_step),
        )
        for e in step_exchanges
    ]
    return number_table(["", "ranks", "brings", "sends", "times", "sends in all"], rows)


def _memory_table(spec: RunSpec) -> Table:
    """Return a table of the memory of a rank, with the largest and the smallest number of workers."""
    # An elastic run has two columns, because ranks need the most memory with the fewest workers, whose shards are
    # largest. Any other run has one number of workers, and so one column.
    counts = [*dict.fromkeys([spec.worker_counts[-1], spec.worker_counts[0]])]
    specs = [spec.with_workers(count) for count in counts]
    memories = [compute_memory(sized_spec) for sized_spec in specs]
    by_name = zip(memories[0]._fields, zip(*memories, strict=True), strict=True)
    # Rows that are zero for every number of workers are left out, because they would only distract.
    rows = [(name.replace("_", " "), *map(format_bytes, sizes)) for name, sizes in by_name if any(sizes)]
    rows.append(("total", *(format_bytes(h.total) for h in memories)))
    if spec.cluster.gpus_per_worker:
        rows.append(
            ("checkpoint copy, on the host", *(format_bytes(checkpoint_copy_bytes(sized_spec)) for sized_spec in specs))
        )
    columns = [f"of {count} workers" for count in counts]
    return number_table(["", *columns], rows, header=len(counts) > 1)
