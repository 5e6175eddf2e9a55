"""Measurement of flat and hierarchical dispatch by four processes; a slow link has two of them at each end."""

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
    ExpectedBytes,
    Namespace,
    expected_bytes,
    layer_models,
    slow_link,
)
from mhmoe_ray.bench.timing import process_failure
from mhmoe_ray.spec import MoESpec


class PassFigures(NamedTuple):
    """Measurements of the forward and backward passes of one layer with one kind of dispatch."""

    seconds: list[float]
    """Seconds of a pass, one value per round."""
    counted_bytes: int
    """Bytes of rows that all ranks send between nodes in one pass, as counted by the dispatch."""
    over_link: list[int]
    """Bytes that crossed the link, with all headers, one value per round; empty without a link."""

    @property
    def median(self) -> float:
        return median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Return the values as `mhmoe bench dispatch --json` prints them."""
        return {"seconds": self.seconds, "counted": self.counted_bytes, "over_link": self.over_link}

    @property
    def bytes(self) -> float:
        """Median of the bytes that crossed the link in a pass; without a link, the bytes that the dispatch counted."""
        return median(self.over_link) if self.over_link else self.counted_bytes


class Figures(NamedTuple):
    """Measurements of one layer, with rows of width D, with flat and with hierarchical dispatch."""

    name: str
    moe: MoESpec
    width: int
    flat: PassFigures
    hierarchical: PassFigures
    expected: ExpectedBytes

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as `mhmoe bench dispatch --json` prints them."""
        passes = {name: getattr(self, name).as_json() for name in DISPATCHES}
        return {"layer": self.name, "moe": self.moe.model_dump(mode="json"), "width": self.width, **passes} | {
            "expected": self.expected._asdict()
        }


def measure(tokens: int, rounds: int, rate: str | None) -> list[Figures]:
    """Measure every layer with flat and with hierarchical dispatch; a rate puts a slow link between the nodes.

    `tokens` is the number of tokens of each rank. The link's errors are those of `slow_link`, and a process that fails
    is a JobError.
    """
    with slow_link(rate) if rate else nullcontext(()) as namespaces:
        results = _run_ranks(namespaces, {"tokens": tokens, "rounds": rounds, "link": bool(namespaces)})
    figures = []
    for name, model in layer_models().items():
        assert model.moe is not None
        flat, hierarchical = (PassFigures(**results[name][dispatch]) for dispatch in DISPATCHES)
        figures.append(Figures(name, model.moe, model.row_width, flat, hierarchical, expected_bytes(model, tokens)))
    return figures


def _run_ranks(namespaces: Sequence[Namespace], request: dict[str, Any]) -> dict[str, Any]:
    """Run a process for each rank, and return the measurements that rank 0 prints; if one fails, kill the others."""
    node_names = sorted(set(NODES))
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        arguments = [sys.executable, "-m", "mhmoe_ray.bench.dispatch.rank", json.dumps({**request, "folder": folder})]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, node in enumerate(NODES):
                env = {
                    "RANK": str(rank),
                    "GLOO_SOCKET_IFNAME": INTERFACE if namespaces else "lo",
                    "OMP_NUM_THREADS": "1",
                }
                command = (namespaces[node_names.index(node)].command if namespaces else []) + arguments
                with Path(folder, f"{rank}.out").open("wb") as out, Path(folder, f"{rank}.err").open("wb") as err:
                    # Each rank runs in a session of its own, so that Ctrl-C in the terminal reaches only this process,
                    # which then kills the ranks.
                    rank_process = subprocess.Popen(
                        command, env=os.environ | env, stdout=out, stderr=err, start_new_session=True
                    )
                ranks.append(rank_process)
            failed_rank = wait_for_ranks(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed_rank is not None:
            raise process_failure(
                f"rank {failed_rank}", Path(folder, f"{failed_rank}.err").read_text(), ranks[failed_rank].returncode
            )
        # Libraries may print to stdout before rank 0 prints the result, so the result is the last line.
        result: dict[str, Any] = json.loads(Path(folder, "0.out").read_text().splitlines()[-1])
        return result


def wait_for_ranks(ranks: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Wait until all processes have ended or one fails; return the rank that failed, or None."""
    # All ranks are polled in turn. After a failure the other ranks wait for the failed one forever, so waiting for one
    # rank after another might never end.
    while True:
        codes = [process.poll() for process in ranks]
        if failed_ranks := [rank for rank, code in enumerate(codes) if code]:
            return failed_ranks[0]
        if None not in codes:
            return None
        time.sleep(0.1)
