"""Preparing and streaming by several packages in turn, each time in a process and a folder of its own."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mhmoe_ray.bench.apart import Measurement, run_apart
from mhmoe_ray.bench.ingest import ours, peers
from mhmoe_ray.bench.timing import turns
from mhmoe_ray.spec import RunSpec


class Contestant(NamedTuple):
    task: str
    package: str
    """That must be installed."""
    run: Measurement


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
    for turn, name in turns(names, rounds):
        result = run_apart(CONTESTANTS[name].run, spec, processes, f"bench ingest, {name}")
        tell(f"round {turn + 1}: {name} took {result['seconds']:.1f} s")
        found[name].append(result)
    for name, results in found.items():
        own = found[next(n for n in OURS if CONTESTANTS[n].task == CONTESTANTS[name].task)]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(results, own, strict=True)]
        yield Figures(name, results, statistics.median(ratios))
