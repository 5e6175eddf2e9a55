"""One rank of a training run: restore, then step, validate and save until done or asked to stop.

What a step read has a fingerprint (`sample_digest`, `combine_digests`), which is equal for equal samples in equal
order, at any number of workers.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import Manifest, stored_manifest
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.shards.files import split_padding
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.data.stream import validation_samples
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.distributed.dispatch.exchange import Sent
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.errors import DataError, JobError, StorageError
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import RunDir, require_newest
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, location
from mhmoe_ray.train.preemption import PreemptedError, announced
from mhmoe_ray.train.step import MicroBatch, RankSums, Trainer, Update
from mhmoe_ray.train.telemetry import Telemetry, Totals, Waits, step_line
from mhmoe_ray.train.watchdog import Place, Heartbeat

DIGEST_BYTES = 6  # exact in a float64, the type in which ranks exchange their numbers


def sample_digest(tokens: np.ndarray) -> int:
    """Return the digest of one micro-batch of token ids, (b, T + 1)."""
    data = np.ascontiguousarray(tokens, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest(), "little")


def combine_digests(digests: Iterable[int]) -> str:
    """Return one hexadecimal digest for the micro-batches of a step, given in the step's order."""
    data = b"".join(d.to_bytes(DIGEST_BYTES, "little") for d in digests)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


LOG = logging.getLogger("mhmoe")
LOOK_SECONDS = 1.0


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of the run.

    Ray Train calls this on each worker.

    Args:
        config: `run`, the path of the run directory; `attempt`, the number of the attempt; and `watchdog`, the watchdog
            actor.
    """
    run = RunDir(location(config["run"]))
    rank = dist.get_rank() if dist.is_initialized() else 0
    _set_up_logging(rank)
    with Heartbeat(config["watchdog"], Place.here(rank)) as pulse:
        Worker(run, run.spec(), config["attempt"], pulse).train()


def _set_up_logging(rank: int) -> None:
    """Configure log lines with a time and its offset from UTC, which `mhmoe logs --since` needs on a machine
    elsewhere."""
    handler = logging.StreamHandler()
    form = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%dT%H:%M:%S%z"))
    LOG.handlers = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False  # the root has a handler of Ray's
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it repeats each report


class Worker:
    def __init__(self, run: RunDir, spec: RunSpec, attempt: int, pulse: Heartbeat) -> None:
        torch.set_num_threads(spec.cluster.cpus_per_worker)  # Ray leaves one thread to a worker, whatever its CPUs
        self.run, self.spec, self.attempt, self.pulse = run, spec, attempt, pulse
        device = ray.train.torch.get_device()
        rank = pulse.place.rank
        places = _gather(pulse.place)
        mesh = build_mesh(spec.cluster, [p.node for p in places], device.type, _domains(spec, places))
        start = boundaries(load_tokenizer(run.tokenizer_file, spec.model.vocab_size)).start
        self.trainer = Trainer(spec, mesh, device, start, on_progress=pulse.beat)
        self.data = require_data_manifest(spec.data.prepared)
        self.rank = rank
        # Ray has the stream made when the first rank asks, and with it the choice of the checkpoint.
        self.shard = ray.train.get_dataset_shard("train")
        self.group, restored = self._agree()
        if restored:
            restore(self.trainer, *restored)
        self.saver = Saver(run, self.trainer, self.group, on_piece=pulse.stir)
        self.start = self.trainer.step
        self._looks = 0.0
        """Monotonic time in seconds at which rank 0 next checks the run directory."""
        self.telemetry = Telemetry(run, spec, rank, self.group, self.start)
        if rank == 0:
            workers = [vars(p) for p in places]
            where = {**mesh.sizes, "groups": mesh.groups}
            where |= {"straddling_groups": mesh.straddling, "groups_apart": mesh.apart}
            hierarchical = spec.cluster.dispatch == "hierarchical"
            where |= {"dispatch": spec.cluster.dispatch, "flat_groups": mesh.uneven if hierarchical else 0}
            where |= {"workers": workers, "asked": spec.cluster.workers.model_dump()}
            events.record(run, "started", group=self.group, step=self.start, **where)
        LOG.info("%d workers, from step %d on, process %d", mesh.world, self.start, pulse.place.pid)

    def train(self) -> None:
        try:
            self._train()
        except BaseException:
            try:
                self.telemetry.close("FAILED")
            except (OSError, StorageError) as e:  # what came before it says more
                LOG.warning("some of what was measured is lost: %s", e)
            raise
        self.telemetry.close("FINISHED" if self.trainer.step == self.spec.train.steps else "KILLED")

    def _train(self) -> None:
        spec, trainer = self.spec, self.trainer
        held_out = self._held_out()
        stream = self._stream()
        counts_LE = trainer.zero_counts()
        stop = False
        while trainer.step < spec.train.steps and not stop:
            began = time.monotonic()
            self.pulse.at(trainer.step, "training")
            batches = _Timed(stream, spec.train.micro_batches // trainer.mesh.world, self.data.token_bytes)
            sums = trainer.accumulate(batches)
            try:
                update = trainer.update(sums)
            except JobError:
                self.saver.wait()  # a checkpoint that is being written is worth having, the more so now
                raise
            line, step_counts_LE, waited, stop, leave = self._line(sums, batches, update, began)
            counts_LE += step_counts_LE
            last = trainer.step == spec.train.steps or stop
            if last or trainer.step % spec.train.validate_every == 0:
                self.pulse.at(trainer.step, "validating")
                loss, tokens = trainer.validate(*held_out)
                line |= {metrics.VAL_LOSS: loss, metrics.VAL_TOKENS: tokens}
            self.telemetry.tell(line, step_counts_LE, waited)
            if last or leave or trainer.step % spec.train.checkpoint_every == 0:
                self.pulse.at(trainer.step, "saving")
                self.telemetry.flush()
                self.saver.save(counts_LE, line.get(metrics.VAL_LOSS))
                counts_LE.zero_()
            if leave and not last:
                self.saver.wait()
                self._leave()
            if metrics.VAL_LOSS in line:
                if self.rank == 0:
                    loss, held = line[metrics.LOSS], line[metrics.VAL_LOSS]
                    LOG.info("step %d: loss %.4f, validation loss %.4f", trainer.step, loss, held)
                ray.train.report(line)
        self.saver.wait()

    def _agree(self) -> tuple[int, tuple[Location, Manifest] | None]:
        """Return the number of this worker group, and the checkpoint to restore or None; all ranks get the same.

        The checkpoint is the one at which the stream begins: `StreamFromNewest` chose it and recorded it as an event.
        """
        found: tuple[int, tuple[Location, Manifest] | None] | None = None
        if self.rank == 0:
            happened = events.events(self.run)
            group = 1 + sum(e["event"] == "started" for e in happened)
            # An earlier attempt's may lie behind it, by a clock that was ahead (`jsonl`).
            chosen = sorted((e for e in happened if e["event"] == "restoring"), key=lambda e: e.get("attempt", 0))
            name = chosen[-1]["name"]
            checkpoint = self.run.checkpoints / name if name else None
            found = group, (checkpoint, stored_manifest(checkpoint)) if checkpoint else None
        agreed: tuple[int, tuple[Location, Manifest] | None] = _gather(found)[0]
        return agreed

    def _held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, counts = validation_samples(self.spec.data.prepared, self.data)
        return torch.from_numpy(tokens), torch.from_numpy(counts)

    def _stream(self) -> Iterator[np.ndarray]:
        """Yield this rank's micro-batches as they are stored.

        Raises:
            DataError: a micro-batch is not the one that the training order says.
        """
        spec, world = self.spec, self.trainer.mesh.world
        b = spec.train.micro_batch_size
        first = self.start * spec.samples_per_step + self.rank * b
        for i, batch in enumerate(self.shard.iter_batches(batch_size=b, prefetch_batches=4, batch_format="numpy")):
            expected = first + i * world * b + np.arange(b)
            if not np.array_equal(batch["position"], expected):
                why = f"rank {self.rank} got positions from {batch['position'][0]} on, not from {expected[0]} on"
                raise DataError("training stream", why, "this is a defect; the run can be resumed")
            yield batch["tokens"]

    def _line(
        self, sums: RankSums, batches: "_Timed", update: Update, began: float
    ) -> tuple[dict[str, Any], torch.Tensor, Waits, bool, bool]:
        """Return the step's metrics over all ranks, its routes per layer and expert, the shares of time that this rank
        waited, whether to stop, and whether a node of the worker group is preempted.

        Raises:
            CheckpointError: a checkpoint could not be written; raised on all ranks at the same step.
            RunError: the run has a newer job; raised on rank 0.
        """
        spec, trainer = self.spec, self.trainer
        stop = self.rank == 0 and self._is_to_stop()
        seconds = time.monotonic() - began
        waited = Waits(batches.waited / seconds, sums.waited / seconds)
        sent = [sums.sent.rows, sums.least_sent, sums.sent.counts, sums.sent.between_nodes]
        summed = [sums.loss, sums.balance, sums.dropped, *sent]
        largest = [*waited, stop, announced() is not None, self.saver.failed]
        own: list[list[float]] = [summed, largest, [*batches.digests], sums.count_LE.flatten().tolist()]
        every = _gather_numbers(torch.tensor(list(chain(*own)), dtype=torch.float64))
        totals, most, digests, routes = torch.split(every, [len(part) for part in own], dim=1)
        loss, balance, dropped, rows, least, counts, between_nodes = totals.sum(0).tolist()
        data_wait, exchange_wait, stops, leaves, failures = most.max(0).values.tolist()
        if failures:
            self.saver.wait()  # raises, on all ranks at the same step
        count_LE = routes.sum(0).long().view_as(sums.count_LE)
        digest = combine_digests(int(d) for d in digests.T.flatten())  # r's j-th micro-batch is number j * world + r
        all_sent = Sent(int(rows), int(counts), int(between_nodes))
        whole = Totals(sums.targets, loss, balance, dropped, count_LE, all_sent, int(least), digest)
        longest, seconds = Waits(data_wait, exchange_wait), time.monotonic() - began
        line = step_line(spec, trainer, self.group, whole, longest, update, seconds)
        return line, count_LE, waited, bool(stops), bool(leaves)

    def _is_to_stop(self) -> bool:
        """Return whether the run directory asks to stop, which is checked once per `LOOK_SECONDS`.

        On an object store a check takes round trips, for which all ranks wait. Between two checks, and if the directory
        cannot be read, the answer is False.

        Raises:
            RunError: the run has a newer job.
        """
        now = time.monotonic()
        if now < self._looks:
            return False
        self._looks = now + LOOK_SECONDS
        try:
            require_newest(self.run, self.attempt)
            return self.run.stop_file.exists()
        except OSError as e:  # a look that fails is no reason for all ranks to start again
            LOG.warning("the run directory cannot be read, and is looked at again: %s", e)
            return False

    def _leave(self) -> None:
        """End this worker group because a node is preempted, after a checkpoint, so that nothing is lost.

        Raises:
            PreemptedError: always, on every rank.
        """
        told = next(info for info in _gather(announced()) if info)
        if self.rank == 0:
            deadline = told.deadline_ms and told.deadline_ms / 1000
            events.record(
                self.run, "preempted", step=self.trainer.step, nodes=told.preempted_node_ids, deadline=deadline
            )
        raise PreemptedError


def _domains(spec: RunSpec, places: list[Place]) -> list[str] | None:
    """Return the domain of each rank's node, by its label; None if the spec names no label.

    All nodes without the label are one domain.
    """
    label = spec.cluster.domain_label
    if label is None:
        return None
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    return [labels[place.node].get(label, "") for place in places]


class _Timed:
    """The next `count` micro-batches of a stream, with the seconds spent waiting for them and a digest of each."""

    def __init__(self, stream: Iterator[np.ndarray], count: int, token_bytes: int) -> None:
        self._stream, self._left, self._token_bytes = stream, count, token_bytes
        self.waited = 0.0
        self.digests: list[int] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        while self._left:
            asked = time.monotonic()
            stored = next(self._stream)
            self.waited += time.monotonic() - asked
            self._left -= 1
            self.digests.append(sample_digest(stored))
            parts = split_padding(stored, self._token_bytes)
            yield MicroBatch(*(_on_its_way(torch.from_numpy(part), ray.train.torch.get_device()) for part in parts))


def _on_its_way(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device, without waiting for the work that the device has yet to do."""
    return part.to(device) if device.type == "cpu" else part.pin_memory().to(device, non_blocking=True)


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _gather_numbers(own: torch.Tensor) -> torch.Tensor:
    """Gather a vector of numbers of all ranks: (world, len(own)), the same on every rank."""
    if not dist.is_initialized():
        return own[None]
    device = ray.train.torch.get_device()
    every = [torch.empty_like(own, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own.to(device))
    return torch.stack(every).cpu()
