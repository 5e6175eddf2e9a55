"""Preparing and streaming by several packages in turn, each time in a process and a folder of its own."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from mhmoe_ray.bench.ingest import ours, peers
from mhmoe_ray.errors import JobError
from mhmoe_ray.spec import RunSpec


class Contestant(NamedTuple):
    task: str
    package: str
    """That must be installed."""
    run: Callable[[RunSpec, Path, int], dict[str, Any]]


CONTESTANTS = {
    "prepare: mhmoe": Contestant("prepare", "ray", ours.prepare_ours),
    "prepare: datasets": Contestant("prepare", "datasets", peers.prepare_datasets),
    "prepare: datasets, our encoder": Contestant("prepare", "datasets", peers.prepare_datasets_with_ours),
    "stream: mhmoe": Contestant("stream", "ray", ours.stream_ours),
    "stream: mosaicml-streaming": Contestant("stream", "streaming", peers.stream_mosaicml),
}
OURS = ("prepare: mhmoe", "stream: mhmoe")


class Figures(NamedTuple):
    name: str
    rounds: list[dict[str, Any]]
    """What each round found; `seconds` among it."""
    to_ours: float
    """Median of its time over ours, round by round."""

    def median(self, key: str) -> float:
        return float(statistics.median(found[key] for found in self.rounds))


def contest(
    spec: RunSpec, names: list[str], rounds: int, processes: int, tell: Callable[[str], None]
) -> Iterator[Figures]:
    """Args:
        spec: with a given tokenizer; of a stream, with prepared data.
        names: of `CONTESTANTS`, ours among them.
        rounds: each of all of them; every other one in reverse order.
        processes: of each.
        tell: gets a line after each.

    Raises:
        JobError: one of them failed.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            result = _in_a_process(name, spec, processes)
            tell(f"round {turn + 1}: {name} took {result['seconds']:.1f} s")
            found[name].append(result)
    for name, results in found.items():
        own = found[next(n for n in OURS if CONTESTANTS[n].task == CONTESTANTS[name].task)]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(results, own, strict=True)]
        yield Figures(name, results, statistics.median(ratios))


def missing(name: str) -> str | None:
    """The package that it needs and that is not installed."""
    package = CONTESTANTS[name].package
    return package if find_spec(package) is None else None


def _in_a_process(name: str, spec: RunSpec, processes: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="mhmoe-bench-")
    request = json.dumps({"name": name, "spec": spec.model_dump_json(), "folder": folder, "processes": processes})
    # A Ray of its own, which listens on loopback only and has a token, as that of `mhmoe cluster up`.
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=request, text=True, capture_output=True, env=os.environ | ray)
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        raise JobError(f"bench ingest, {name}", _why(done), "mend that, or leave out --peers")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """The first error of a traceback, which caused the others."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return next(iter(errors or lines[-1:]), f"exit code {done.returncode}")


def main() -> None:
    request = json.load(sys.stdin)
    spec = RunSpec.model_validate_json(request["spec"])
    result = CONTESTANTS[request["name"]].run(spec, Path(request["folder"]), request["processes"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
