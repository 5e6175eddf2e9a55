"""Starts four processes, two in each network namespace if there is a slow link, and collects their measurements."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mhmoe_ray.bench.dispatch.cases import (
    DISPATCHES,
    INTERFACE,
    NODES,
    Expected,
    Namespace,
    expected,
    layers,
    slow_link,
)
from mhmoe_ray.bench.timing import failure
from mhmoe_ray.spec import MoESpec


class Passes(NamedTuple):
    """Measurements of the forward and backward passes of one layer with one dispatch."""

    seconds: list[float]
    """Seconds of a pass, one value per round."""
    counted: int
    """Bytes of rows between nodes, as the dispatch counts them."""
    over_link: list[int]
    """Bytes that crossed the link, with all headers, one value per round; empty without a link."""

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def bytes(self) -> float:
        """Median of the bytes that crossed the link; without a link, the bytes that the dispatch counted."""
        return median(self.over_link) if self.over_link else self.counted


class Figures(NamedTuple):
    """Measurements of one layer."""

    name: str
    moe: MoESpec
    width: int
    """Width D of a row."""
    flat: Passes
    hierarchical: Passes
    expected: Expected

    def as_json(self) -> dict[str, Any]:
        passes = {name: getattr(self, name)._asdict() for name in DISPATCHES}
        return {"layer": self.name, "moe": self.moe.model_dump(mode="json"), "width": self.width, **passes} | {
            "expected": self.expected._asdict()
        }


def measure(tokens: int, rounds: int, rate: str | None) -> list[Figures]:
    """Measure every layer with both dispatches.

    Args:
        tokens: the number of tokens of each rank.
        rounds: the number of interleaved rounds.
        rate: the bandwidth of a slow link between the nodes; None runs everything in one network.

    Raises:
        SpecError, JobError: in the same cases as `slow_link`.
        JobError: a process failed.
    """
    with slow_link(rate) if rate else nullcontext(()) as ends:
        found = _run(ends, {"tokens": tokens, "rounds": rounds, "link": bool(ends)})
    figures = []
    for name, model in layers().items():
        assert model.moe is not None
        flat, hierarchical = (Passes(**found[name][dispatch]) for dispatch in DISPATCHES)
        width = model.d_model // model.moe.heads
        figures.append(Figures(name, model.moe, width, flat, hierarchical, expected(model, tokens)))
    return figures


def _run(ends: Sequence[Namespace], request: dict[str, Any]) -> dict[str, Any]:
    """Run the processes of all ranks, and return the measurements that rank 0 prints."""
    names = sorted(set(NODES))
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        arguments = [sys.executable, "-m", "mhmoe_ray.bench.dispatch.rank", json.dumps({**request, "folder": folder})]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, node in enumerate(NODES):
                env = {"RANK": str(rank), "GLOO_SOCKET_IFNAME": INTERFACE if ends else "lo", "OMP_NUM_THREADS": "1"}
                command = (ends[names.index(node)].command if ends else []) + arguments
                with Path(folder, f"{rank}.out").open("wb") as out, Path(folder, f"{rank}.err").open("wb") as err:
                    # Of a session of its own, so that Ctrl-C comes here alone.
                    started = subprocess.Popen(
                        command, env=os.environ | env, stdout=out, stderr=err, start_new_session=True
                    )
                ranks.append(started)
            failed = first_failed(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed is not None:
            raise failure(f"rank {failed}", Path(folder, f"{failed}.err").read_text(), ranks[failed].returncode)
        result: dict[str, Any] = json.loads(Path(folder, "0.out").read_text().splitlines()[-1])
        return result


def first_failed(ranks: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Wait until all processes have ended or the first one fails; return the rank that failed, or None.

    After a failure it does not wait for the others, because they would wait for the failed one.
    """
    while True:
        codes = [process.poll() for process in ranks]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.1)
