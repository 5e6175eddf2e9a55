"""Start of the stream of training samples: each worker group resumes at the newest intact checkpoint.

A checkpoint is intact if the hashes of its files are right. All nodes of the cluster share the hashing, because a
single node would read terabytes for an hour. An actor imports this file, so nothing here needs torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
import ray.data
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.checkpoint.manifest import newest_checkpoint, uncommitted_checkpoints
from mhmoe_ray.data.stream import training_stream
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import AttemptId, RunDir, require_newest_attempt
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import FileEntry, Location, describe_files, remove_tree

SINGLE_NODE_BYTES = 4 << 30
"""Total bytes below which this process hashes all files, because other nodes must start a process first."""


def describe_on_all_nodes(files: Sequence[Location]) -> Iterable[FileEntry]:
    """Return the size and hash of each file, in the order of the files, as an iterable that may still be computing.
    From `SINGLE_NODE_BYTES` on, each live node hashes a share of the files, which all nodes must be able to read."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 or sum(file.stat().st_size for file in files) < SINGLE_NODE_BYTES:
        return describe_files(files)
    shares = [files[i :: len(nodes)] for i in range(len(nodes))]
    # With a soft strategy, another node hashes the files of a node that dies meanwhile. A strict one would raise an
    # error.
    strategies = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    streams = [
        _describe_share.options(scheduling_strategy=strategy).remote(share)
        for strategy, share in zip(strategies, shares, strict=True)
    ]
    return (ray.get(next(streams[i % len(nodes)])) for i in range(len(files)))


@ray.remote(num_cpus=0, num_returns="streaming")  # type: ignore[untyped-decorator]  # Ray's decorator is untyped
def _describe_share(files: Sequence[Location]) -> Iterator[FileEntry]:
    yield from describe_files(files)


class ResumingDataConfig(ray.train.DataConfig):
    """Ray Train data config that resumes the training stream at the newest intact checkpoint for each worker group. It
    records this checkpoint as an event, from which the workers restore the same one."""

    def __init__(self, run: RunDir, spec: RunSpec, attempt: AttemptId, watchdog: Any) -> None:
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._run, self._spec, self._attempt, self._watchdog = run, spec, attempt, watchdog

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> Any:
        """Choose the checkpoint to resume from, record it, and return each worker's stream from this checkpoint on.

        Ray Train calls this once for each worker group, when the first rank asks for the stream. Uncommitted
        checkpoints of earlier worker groups are removed; of `datasets` only the names are used. A newer job of the run
        is a RunError, and having checkpoints of which none is intact is a CheckpointError.
        """
        require_newest_attempt(self._run, self._attempt)
        newest = newest_checkpoint(self._run, describe=self._describe_and_report)
        for error in newest.skipped if newest else []:
            print(f"warning: {error}")
            # The subject is the word "checkpoint" and the path of the checkpoint.
            folder_name = error.subject.rpartition("/")[2]
            events.record(self._run, "skipped_checkpoint", name=folder_name, reason=error.reason)
        # The check is repeated because hashing the files of a checkpoint may take long. If a newer job has begun
        # meanwhile, the lines below would remove a checkpoint that it is writing.
        require_newest_attempt(self._run, self._attempt)
        # All uncommitted checkpoints are left over from earlier worker groups: the new group writes none before it has
        # the stream.
        for folder in uncommitted_checkpoints(self._run):
            remove_tree(folder)
        name, step, position = None, 0, 0
        if newest:
            name, step, position = newest.checkpoint.name, newest.manifest.step, newest.manifest.position
        events.record(self._run, "restoring", name=name, step=step, attempt=self._attempt.number)
        record = read_start(self._run)
        stream = training_stream(self._spec, position, world_size, record.samples_before if record else None)
        return super().configure(dict.fromkeys(datasets, stream), world_size, *args, **kwargs)

    def _describe_and_report(self, files: Sequence[Location]) -> Iterator[FileEntry]:
        for entry in describe_on_all_nodes(files):
            # The ranks wait for the stream and cannot report progress themselves. Without this report the watchdog
            # would take them for hung.
            self._watchdog.report_shared_progress.remote()
            yield entry
