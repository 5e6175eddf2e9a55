"""Start of the training stream: each worker group starts at the newest intact checkpoint.

All nodes of the cluster share the hashing of its files: a single node would read terabytes for an hour. An actor
imports this file, so nothing here needs torch.
"""

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
"""Bytes below which this process hashes alone, because other nodes must start a process first."""


def describe_together(files: Sequence[Location]) -> Iterable[FileEntry]:
    """Return the size and hash of each file, in order, as they become known.

    From `ALONE` bytes on, each live node of the cluster hashes a share of the files, which must be visible to all
    nodes.
    """
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
    """Data config that deals the training stream, from the newest intact checkpoint on, to the workers of a group.

    Ray Train calls `configure` once for each worker group, when the first rank asks for the stream, and only there says
    how many workers there are. The chosen checkpoint is recorded as an event, so that the workers, which wait for the
    stream, start where it does.
    """

    def __init__(self, run: RunDir, spec: RunSpec, attempt: int, watchdog: Any) -> None:
        """Ask Ray Data to preserve the order of the stream.

        Args:
            run: the run.
            spec: spec of the run.
            attempt: number of the attempt that this job executes.
            watchdog: the watchdog actor, which is told that ranks that wait for the stream do not hang.
        """
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._run, self._spec, self._attempt, self._watchdog = run, spec, attempt, watchdog

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """Choose the checkpoint, record it, and return the stream from its position on for each worker.

        Folders of checkpoints that earlier worker groups left unfinished are removed. `datasets` gives only the names.

        Raises:
            RunError: the run has a newer job.
            CheckpointError: there are checkpoints, but none is intact.
        """
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
