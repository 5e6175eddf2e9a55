"""Worker of a training run: one rank, which restores a checkpoint, then trains, validates and saves until the run ends.

The samples of each step have a digest (`Objective.receive`, `combine_digests`). It is equal for equal samples in equal
order, at any number of workers.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, stored_manifest
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.distributed.dispatch.exchange import SentBytes
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.errors import DataError, JobError, StorageError
from mhmoe_ray.model.parts import mark
from mhmoe_ray.planner.parts import DATA
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import AttemptId, RunDir, require_newest_attempt
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import Location, location
from mhmoe_ray.train.malloc import use_expandable_segments
from mhmoe_ray.train.objectives import Objective
from mhmoe_ray.train.objectives.base import DIGEST_BYTES, objective_class
from mhmoe_ray.train.preemption import PreemptedError, preemption_notice
from mhmoe_ray.train.profile import StepProfiler
from mhmoe_ray.train.step import StepSums, Trainer, Update
from mhmoe_ray.train.stragglers import StragglerRecorder, slowdowns
from mhmoe_ray.train.telemetry.line import RankTimes, step_line
from mhmoe_ray.train.telemetry.sinks import Telemetry
from mhmoe_ray.train.watchdog import Heartbeat, WorkerInfo


def combine_digests(digests: Iterable[int]) -> str:
    """Return one hexadecimal digest of a step from those of its micro-batches, in the step's order."""
    data = b"".join(d.to_bytes(DIGEST_BYTES, "little") for d in digests)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


LOGGER = logging.getLogger("mhmoe")
# Time between two checks for requests of users. All ranks wait during a check, and a check takes round trips to an
# object store, so checks are rare.
REQUEST_CHECK_SECONDS = 1.0


def train_worker(config: dict[str, Any], shard: Future[ray.data.DataIterator]) -> None:
    """Train as one rank on its shard of the stream. `config` has the run directory's path (`run`), the id of the
    `attempt`, the handle of the `watchdog` actor, and the `last_step`."""
    run = RunDir(location(config["run"]))
    rank = dist.get_rank() if dist.is_initialized() else 0
    _set_up_logging(rank)
    spec = run.spec()
    # A hang lasts for `hang_seconds`; a rank that makes no progress for half of that probably takes part in one.
    with Heartbeat(config["watchdog"], WorkerInfo.current(rank), spec.cluster.hang_seconds / 2) as heartbeat:
        Worker(run, spec, config["attempt"], heartbeat, shard, config["last_step"]).train()


def _set_up_logging(rank: int) -> None:
    # Each line has its time with an offset from UTC, because `mhmoe logs --since` may run on a machine in another time
    # zone.
    handler = logging.StreamHandler()
    line_format = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(line_format, datefmt="%Y-%m-%dT%H:%M:%S%z"))
    LOGGER.handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    # The root logger has a handler of Ray, which would print each line again.
    LOGGER.propagate = False
    # Ray Train logs each report of a worker at the level INFO. These lines are left out of the log.
    logging.getLogger("ray.train").setLevel(logging.WARNING)


class Worker:
    """Training on one rank: the constructor restores the checkpoint to start from, and `train` runs all steps."""

    def __init__(
        self,
        run: RunDir,
        spec: RunSpec,
        attempt: AttemptId,
        heartbeat: Heartbeat,
        shard: Future[ray.data.DataIterator],
        last_step: int,
    ) -> None:
        # Ray starts a worker with one thread for torch, whatever number of CPUs the worker has.
        torch.set_num_threads(spec.cluster.cpus_per_worker)
        self.run, self.spec, self.heartbeat, self.last_step = run, spec, heartbeat, last_step
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            use_expandable_segments(os.environ)
        rank = heartbeat.worker_info.rank
        worker_infos = _gather_objects(heartbeat.worker_info)
        self._straggler_recorder = StragglerRecorder(run, worker_infos)
        mesh = build_mesh(spec.cluster, [p.node for p in worker_infos], device.type, _node_domains(spec, worker_infos))
        self.data = require_data_manifest(spec.data.prepared)
        inputs = objective_class(spec).load_inputs(run, spec, self.data)
        self.trainer = Trainer(spec, mesh, device, inputs, heartbeat.report_progress)
        self.rank = rank
        # When Ray creates the stream, it chooses the checkpoint to start from, so this comes before `_agree_on_start`.
        self.shard = shard.result()
        self.group, start_checkpoint = self._agree_on_start()
        self._start_manifest = start_checkpoint[1] if start_checkpoint else None
        ends = self.trainer.objective.extra_ends(self.data)
        adds_start = True
        if start_checkpoint:
            restore(self.trainer, *start_checkpoint)
            # A run that starts from another model keeps that model's end tokens, and its choice whether prompts begin
            # with a start token.
            ends |= set(start_checkpoint[1].ends)
            adds_start = start_checkpoint[1].adds_start
        fence = self._require_newest_attempt = partial(require_newest_attempt, run, attempt)
        self.start_step = self.trainer.step
        self.telemetry = Telemetry(run, spec, rank, self.group, self.start_step)
        self.profiler = StepProfiler(run, self.trainer, self.group)
        self.saver = Saver(
            run, self.trainer, self.group, heartbeat.report_side_progress, ends, adds_start, fence,
            self.telemetry.report_checkpoint,
        )  # fmt: skip
        self._next_request_check = 0.0  # monotonic time in seconds at which rank 0 next checks the run directory
        if rank == 0:
            self._require_newest_attempt()
            worker_fields = [vars(p) for p in worker_infos]
            fields = {**mesh.sizes, "groups": mesh.groups}
            fields |= {"straddling_groups": mesh.straddling_count, "groups_apart": mesh.cross_domain_count}
            hierarchical = spec.cluster.dispatch == "hierarchical"
            fields |= {"dispatch": spec.cluster.dispatch, "flat_groups": mesh.uneven_count if hierarchical else 0}
            fields |= {"workers": worker_fields, "asked": spec.cluster.workers.model_dump()}
            events.record(run, "started", group=self.group, step=self.start_step, **fields)
        LOGGER.info(
            "%d workers, from step %d on, process %d", mesh.world_size, self.start_step, heartbeat.worker_info.pid
        )

    def train(self) -> None:
        """Train until the last step or until the user stops the run. Close the telemetry even after an error."""
        try:
            self._train()
        except BaseException:
            try:
                self.telemetry.close("FAILED")
            except (OSError, StorageError) as e:
                # This error is only logged, because the error that ends the training says more about the cause.
                LOGGER.warning("some metrics of this rank are lost: %s", e)
            raise
        self.telemetry.close("FINISHED" if self.trainer.step == self.spec.train.steps else "KILLED")

    def _train(self) -> None:
        """Train, validate, report and save step by step. A preempted node raises PreemptedError after a checkpoint."""
        spec, trainer = self.spec, self.trainer
        trainer.objective.prepare(self.run, self.data, self._start_manifest, self._require_newest_attempt)
        held_out_samples = trainer.objective.load_validation(self.data)
        stream = self._stream()
        counts_LE = trainer.zero_counts()
        stop_requested = False
        while trainer.step < self.last_step and not stop_requested:
            # The number of experts that a task's rows choose is adapted before a step and not after one. The model in a
            # checkpoint is then the one whose validation loss the checkpoint states. And a run that is extended after
            # its last step adapts these numbers at the same steps as a run of the full length.
            self._adapt(held_out_samples)
            self.profiler.begin_step()
            step_start = time.monotonic()
            self.heartbeat.report_phase(trainer.step, "training")
            rank_batches = spec.train.micro_batches // trainer.mesh.world_size
            batches = _TimedBatches(stream, rank_batches, trainer.objective)
            sums = trainer.accumulate(batches)
            try:
                update = trainer.update(sums)
            except JobError:
                # The run ends here, so the checkpoint that is being written must be finished first.
                self.saver.wait()
                raise
            if update.spike:
                LOGGER.warning("step %d is a spike, so it updated nothing: %s", trainer.step, update.spike)
                if self.rank == 0:
                    events.record(self.run, "spike", step=trainer.step, reason=update.spike)
            line, step_counts_LE, rank_times, stop_requested, is_preempted = self._gather_metrics(
                sums, batches, update, step_start
            )
            self.profiler.end_step()
            counts_LE += step_counts_LE
            is_last_step = trainer.step == self.last_step or stop_requested
            if is_last_step or trainer.step % spec.train.validate_every == 0:
                self.heartbeat.report_phase(trainer.step, "validating")
                line |= self._validate(held_out_samples)
            line |= trainer.objective.metrics
            self.telemetry.report(line, step_counts_LE, rank_times)
            if is_last_step or is_preempted or trainer.step % spec.train.checkpoint_every == 0:
                self.heartbeat.report_phase(trainer.step, "saving")
                self.telemetry.flush()
                self.saver.save(counts_LE, line.get(metrics.VAL_LOSS))
                counts_LE.zero_()
            if is_preempted and not is_last_step:
                self.saver.wait()
                self.profiler.close()
                self._end_preempted_group()
            if metrics.VAL_LOSS in line:
                if self.rank == 0:
                    loss, val_loss = line[metrics.LOSS], line[metrics.VAL_LOSS]
                    LOGGER.info("step %d: loss %.4f, validation loss %.4f", trainer.step, loss, val_loss)
                ray.train.report(line)
        self.saver.wait()
        self.profiler.close()

    def _validate(self, held_out_samples: Any) -> dict[str, Any]:
        with self.trainer.strategy.averaged_weights():
            validation = self.trainer.objective.validate(held_out_samples)
        line: dict[str, Any] = {metrics.VAL_LOSS: validation.loss, metrics.VAL_TOKENS: validation.targets}
        if validation.part_losses:
            line[self.trainer.objective.val_part_metric] = validation.part_losses
        return line

    def _adapt(self, held_out_samples: Any) -> None:
        for change in self.trainer.objective.adapt(held_out_samples, self.trainer.step):
            if self.rank == 0:
                events.record(self.run, "adapted", step=self.trainer.step, **change._asdict())
            LOGGER.info("step %d: %s", self.trainer.step, change)

    def _agree_on_start(self) -> tuple[int, tuple[Location, CheckpointManifest] | None]:
        """Return the number of this worker group and the checkpoint to restore (None to start anew), the same on all
        ranks. `ResumingDataConfig` chose this checkpoint, at which the stream begins, and recorded it as an event."""
        choice: tuple[int, tuple[Location, CheckpointManifest] | None] | None = None
        if self.rank == 0:
            run_events = events.read(self.run)
            group = 1 + sum(e["event"] == "started" for e in run_events)
            # On an object store, an event of an earlier attempt may come last, if the clock of its writer was ahead. So
            # the events are sorted by attempt.
            restoring_events = sorted(
                (e for e in run_events if e["event"] == "restoring"), key=lambda e: e.get("attempt", 0)
            )
            name = restoring_events[-1]["name"]
            checkpoint = self.run.checkpoints / name if name else None
            choice = group, (checkpoint, stored_manifest(checkpoint)) if checkpoint else None
        agreed_choice: tuple[int, tuple[Location, CheckpointManifest] | None] = _gather_objects(choice)[0]
        return agreed_choice

    def _stream(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield this rank's micro-batches by column; one that is not next in the training order is a DataError."""
        spec, world = self.spec, self.trainer.mesh.world_size
        b, rows = spec.train.micro_batch_size, self.trainer.objective.rows_per_micro_batch
        first_position = self.start_step * spec.samples_per_step + self.rank * b
        for i, batch in enumerate(self.shard.iter_batches(batch_size=rows, prefetch_batches=4, batch_format="numpy")):
            expected_positions = first_position + i * world * b + np.arange(rows)
            if not np.array_equal(batch["position"], expected_positions):
                reason = (
                    f"rank {self.rank} got positions from {batch['position'][0]} on, "
                    f"not from {expected_positions[0]} on"
                )
                raise DataError("training stream", reason, "this is a defect; the run can be resumed")
            yield batch

    def _gather_metrics(
        self, sums: StepSums, batches: "_TimedBatches", update: Update, step_start: float
    ) -> tuple[dict[str, Any], torch.Tensor, RankTimes, bool, bool]:
        """Gather the step's metrics of all ranks, in one collective operation.

        Return the step's line, the routes to each layer's experts over all ranks, this rank's times, and
        whether a stop is requested and a node is preempted. A checkpoint that could not be written is a CheckpointError
        on all ranks at the same step; a newer job of the run is a RunError on rank 0.
        """
        stop_requested, profile_steps = self._read_requests() if self.rank == 0 else (False, 0)
        seconds = time.monotonic() - step_start
        rank_times = RankTimes(batches.wait_seconds / seconds, sums.wait_seconds / seconds)
        sent_bytes = [sums.sent_bytes.rows, sums.least_bytes, sums.sent_bytes.counts, sums.sent_bytes.between_nodes]
        values_to_sum = [sums.loss, sums.balance, sums.dropped, *sent_bytes]
        is_preempted = preemption_notice() is not None
        values_to_maximize = [*rank_times[:2], stop_requested, is_preempted, self.saver.has_failed, profile_steps]
        rank_values: list[list[float]] = [
            values_to_sum,
            values_to_maximize,
            [*batches.digests],
            sums.count_LE.flatten().tolist(),
            sums.part_sums_P2.flatten().tolist(),
            [sums.own_seconds - batches.wait_seconds, batches.wait_seconds],
        ]
        gathered_values = _gather_numbers(torch.tensor(list(chain(*rank_values)), dtype=torch.float64))
        totals, maxima, digests, routes, part_sums, times_R2 = torch.split(
            gathered_values, [len(part) for part in rank_values], dim=1
        )
        loss, balance, dropped, sent_rows, least_rows, sent_counts, sent_between_nodes = totals.sum(0).tolist()
        data_wait, exchange_wait, stop_flag, preemption_flag, failure_flag, steps = maxima.max(0).values.tolist()
        self.profiler.request(int(steps))
        if failure_flag:
            # Ranks learn of a failed checkpoint at different moments, but all must raise at the same step. Otherwise
            # those that went on would wait for the others in their next collective operation.
            self.saver.wait()
        count_LE = routes.sum(0).long().view_as(sums.count_LE)
        part_sums_P2 = part_sums.sum(0).view_as(sums.part_sums_P2)
        # The j-th micro-batch of rank r is micro-batch j * world + r of the step, so the transposed digests are in the
        # step's order.
        digest = combine_digests(int(d) for d in digests.T.flatten())
        step_totals = sums._replace(
            loss=loss,
            balance=balance,
            dropped=int(dropped),
            count_LE=count_LE,
            part_sums_P2=part_sums_P2,
            sent_bytes=SentBytes(int(sent_rows), int(sent_counts), int(sent_between_nodes)),
            least_bytes=int(least_rows),
        )
        slowdown_R = slowdowns(times_R2.sum(1).numpy())
        rank_times = rank_times._replace(slowdown=float(slowdown_R[self.rank]))
        if self.rank == 0:
            self._straggler_recorder.record(self.trainer.step, times_R2.numpy())
        slowest_times = RankTimes(data_wait, exchange_wait, float(slowdown_R.max()))
        seconds = time.monotonic() - step_start
        line = step_line(self.trainer, self.group, step_totals, digest, slowest_times, update, seconds)
        return line, count_LE, rank_times, bool(stop_flag), bool(preemption_flag)

    def _read_requests(self) -> tuple[bool, int]:
        """Return whether the user asked the run to stop, and how many steps to profile. Between two checks, and if the
        run directory cannot be read, nothing is requested; a newer job of the run is a RunError."""
        current_time = time.monotonic()
        if current_time < self._next_request_check:
            return False, 0
        self._next_request_check = current_time + REQUEST_CHECK_SECONDS
        try:
            self._require_newest_attempt()
            profile_steps = 0 if self.profiler.is_active else self.run.requested_profile_steps()
            return self.run.stop_file.exists(), profile_steps
        except (OSError, StorageError) as e:
            # An error here would restart all ranks, but the storage may be back at the next check.
            LOGGER.warning("the run directory cannot be read, and is checked again: %s", e)
            return False, 0

    def _end_preempted_group(self) -> None:
        """Record which nodes are preempted, and raise PreemptedError on every rank; a checkpoint was saved before."""
        notice = next(info for info in _gather_objects(preemption_notice()) if info)
        if self.rank == 0:
            deadline = notice.deadline_ms and notice.deadline_ms / 1000
            events.record(
                self.run, "preempted", step=self.trainer.step, nodes=notice.preempted_node_ids, deadline=deadline
            )
        raise PreemptedError


def _node_domains(spec: RunSpec, worker_infos: list[WorkerInfo]) -> list[str] | None:
    """Return the network domain of each rank's node, which is a label of the Ray node ("" without the label); None if
    the spec names no label."""
    label = spec.cluster.domain_label
    if label is None:
        return None
    labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    return [labels[info.node].get(label, "") for info in worker_infos]


class _TimedBatches:
    """Iterator over the next `count` micro-batches of a stream, which times waits and collects digests of samples."""

    def __init__(self, stream: Iterator[dict[str, np.ndarray]], count: int, objective: Objective[Any, Any]) -> None:
        self._stream, self._remaining, self._objective = stream, count, objective
        self.wait_seconds = 0.0
        self.digests: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        while self._remaining:
            request_time = time.monotonic()
            with mark(DATA):
                rows = next(self._stream)
                self.wait_seconds += time.monotonic() - request_time
                self._remaining -= 1
                digest, batch = self._objective.receive(rows)
            self.digests.append(digest)
            yield batch


def _gather_objects(value: Any) -> list[Any]:
    """Return the objects of all ranks, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, value)
    return objects


def _gather_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """Return the vectors of all ranks as a CPU tensor, (world size, len(numbers)), on every rank."""
    if not dist.is_initialized():
        return numbers[None]
    device = ray.train.torch.get_device()
    gathered_numbers = [torch.empty_like(numbers, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered_numbers, numbers.to(device))
    return torch.stack(gathered_numbers).cpu()
