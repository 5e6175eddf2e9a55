"""Where the training stream begins, each time that workers start: at the newest whole checkpoint.

Hashes of its files are found by all nodes of the cluster: one alone reads terabytes for an hour. An actor imports this
file, so nothing here needs torch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
import ray.data
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.checkpoint.manifest import newest_checkpoint, unfinished
from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, require_newest
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import FileEntry, Location, describe_files, remove_tree

ALONE = 4 << 30
"""Bytes that are not worth asking others for: a process must start there first."""


def describe_together(files: Sequence[Location]) -> Iterable[FileEntry]:
    """Size and hash of each, in order, as they are found. They lie where all nodes see them."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 or sum(file.stat().st_size for file in files) < ALONE:
        return describe_files(files)
    shares = [files[i :: len(nodes)] for i in range(len(nodes))]
    # A node that dies meanwhile has its share read elsewhere.
    there = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    found = [_describe.options(scheduling_strategy=at).remote(share) for at, share in zip(there, shares, strict=True)]
    return (ray.get(next(found[i % len(nodes)])) for i in range(len(files)))


@ray.remote(num_cpus=0, num_returns="streaming")  # type: ignore[untyped-decorator]  # Ray's have no types for us
def _describe(files: Sequence[Location]) -> Iterator[FileEntry]:
    yield from describe_files(files)


class StreamFromNewest(ray.train.DataConfig):
    """Deals the training stream from the newest whole checkpoint on, to as many workers as a group has.

    Ray Train asks once in each group of workers, when the first rank wants the stream, and here alone does it say how
    many there are. What is chosen is recorded, so that workers, who wait for it, start where the stream does.
    """

    def __init__(self, run: RunDir, spec: RunSpec, attempt: int, watchdog: Any) -> None:
        """Args:
        run: the run.
        spec: its own.
        attempt: the number of its job.
        watchdog: the actor, which is to know that ranks who wait for this do not hang.
        """
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._run, self._spec, self._attempt, self._watchdog = run, spec, attempt, watchdog

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """`datasets` has the names alone."""
        require_newest(self._run, self._attempt)
        newest = newest_checkpoint(self._run, describe=self._describe)
        for error in newest.skipped if newest else []:
            print(f"warning: {error}")
            events.record(self._run, "skipped_checkpoint", name=error.what, reason=error.why)
        require_newest(self._run, self._attempt)  # now, or it would remove what a newer job is writing
        for folder in unfinished(self._run):  # of earlier groups: this one writes none before it has the stream
            remove_tree(folder)
        name, step, position = None, 0, 0
        if newest:
            name, step, position = newest.checkpoint.name, newest.manifest.step, newest.manifest.position
        events.record(self._run, "restoring", name=name, step=step, attempt=self._attempt)
        stream = training_stream(self._spec, position, world_size)
        return super().configure(dict.fromkeys(datasets, stream), world_size, *args, **kwargs)

    def _describe(self, files: Sequence[Location]) -> Iterator[FileEntry]:
        for entry in describe_together(files):
            self._watchdog.stir.remote()
            yield entry
