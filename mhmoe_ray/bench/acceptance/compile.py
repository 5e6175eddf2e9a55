"""Compilation of the kernels of later parts in parallel processes, before anything is timed.

Each process runs cases once, with as few rounds as possible. What Triton and torch compile stays in their caches on the
disk, from which the parts themselves read it.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from mhmoe_ray.bench.acceptance.ranks import exit_with_parent
from mhmoe_ray.bench.acceptance.settings import PartCase, Row, Rows, Settings, first_line, part_cases

COMPILED_PARTS = ("correctness", "waits", "experts", "steps", "training")
"""Parts whose cases together have all shapes: `layers`, `state` and `profiles` have the shapes of these."""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each part with kernels to compile: the seconds of all its cases, and the slowest one."""
    for part in COMPILED_PARTS:
        yield PartCase(part, partial(_compile, settings._replace(is_compiling=True), part))


def _compile(settings: Settings, part: str) -> Rows:
    count, processes = len(part_cases(settings, part)), 2 if settings.is_toy else os.cpu_count() or 1
    # Each process computes and compiles with one thread, because there are as many processes as cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    indices = range(min(4, count) if settings.is_toy else count)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), exit_with_parent) as pool:
        rows = list(pool.map(partial(_run_case, settings, part), indices))
    slowest = max(rows, key=lambda row: float(row["seconds"]))
    figures = {"cases": len(rows), "failed": sum("error" in row for row in rows)}
    yield {"name": part, **figures, "slowest": slowest["name"], "seconds_of_slowest": slowest["seconds"]}


def _run_case(settings: Settings, part: str, index: int) -> Row:
    case, start = part_cases(settings, part)[index], time.monotonic()
    row: Row = {"name": case.name}
    try:
        list(case.measure())
    # The part itself runs the case again, and reports its error.
    except Exception as error:
        row["error"] = first_line(error)
    return {**row, "seconds": round(time.monotonic() - start, 1)}
