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
from typing import Any

from mhmoe_ray.bench.timing import cpu_name, process_failure
from mhmoe_ray.cli.formats import format_bytes, format_seconds
from tests.benchmarks.dispatch.cases import DISPATCHES, NODES, expected_bytes, layer_models
from tests.benchmarks.dispatch.link import INTERFACE, Namespace, slow_link
from tests.benchmarks.harness import Results


def measure(tokens: int, rounds: int, rate: str | None) -> Results:
    """Measure every layer with flat and with hierarchical dispatch; a rate puts a slow link between the nodes.

    `tokens` is the number of tokens of each rank. The link's errors are those of `slow_link`, and a process that fails
    is a JobError.
    """
    with slow_link(rate) if rate else nullcontext(()) as namespaces:
        passes = _run_ranks(namespaces, {"tokens": tokens, "rounds": rounds, "link": bool(namespaces)})
    rows, layers = [], []
    for name, model in layer_models().items():
        moe, expected = model.moe, expected_bytes(model, tokens)
        assert moe is not None
        layer_passes = [passes[name][dispatch] for dispatch in DISPATCHES]
        # Without a link, the bytes are those that the dispatch counted.
        flat_bytes, hierarchical_bytes = (median(p["over_link"] or [p["counted"]]) for p in layer_passes)
        flat_seconds, hierarchical_seconds = (median(p["seconds"]) for p in layer_passes)
        rows.append(
            (
                name,
                *map(str, (moe.heads, moe.experts, moe.top_k, model.row_width)),
                format_bytes(round(flat_bytes)),
                format_bytes(round(hierarchical_bytes)),
                f"{hierarchical_bytes / flat_bytes:.3f}",
                f"{expected.hierarchical / expected.flat:.3f}",
                format_seconds(flat_seconds),
                format_seconds(hierarchical_seconds),
                f"{hierarchical_seconds / flat_seconds:.2f}",
            )
        )
        sizes = {"layer": name, "moe": moe.model_dump(mode="json"), "width": model.row_width}
        layers.append({**sizes, **passes[name], "expected": expected._asdict()})
    columns = ("", "h", "E", "k", "D", "flat", "hierarchical", "ratio", "expected", "flat", "hierarchical", "ratio")
    machine = cpu_name()
    title = (
        f"{machine}, 4 ranks of 1 thread, bfloat16, {tokens:,} tokens a rank, over "
        f"{f'a link of {rate}' if rate else 'one machine'}\n"
        f"bytes between the nodes, then time, of a forward and backward pass; medians of {rounds} rounds in turn"
    )
    data = {"machine": machine, "tokens": tokens, "rounds": rounds, "link": rate, "layers": layers}
    return Results(title, columns, rows, data)


def _run_ranks(namespaces: Sequence[Namespace], request: dict[str, Any]) -> dict[str, Any]:
    """Run a process for each rank, and return the measurements that rank 0 prints; if one fails, kill the others."""
    node_names = sorted(set(NODES))
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        arguments = [sys.executable, "-m", "tests.benchmarks.dispatch.rank", json.dumps({**request, "folder": folder})]
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
