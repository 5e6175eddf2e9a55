"""Profiles of training steps: traces of torch's profiler, memory on GPUs, and the time of each part of a step.

Each moment of a rank's step belongs to the innermost range or operation that runs then on the rank's main thread, and
this to a part. Ranges are those of `observed_parts`. An operation of a backward has the sequence number of the
operation that it differentiates, and so its part; the accumulation of a gradient, which has none, follows at once. On
GPUs, where the host runs ahead, the time is that of the kernels which a part launches, and `no kernel` is the rest.
Operations of compiled blocks belong to parts only by the names of their operators.
"""

import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mhmoe_ray.errors import StorageError
from mhmoe_ray.model.parts import MARK, observed_parts
from mhmoe_ray.planner.parts import BLOCKS, CASTS, EXCHANGE, IDLE, OPERATOR_PARTS, OTHER_WORK, REDUCTION
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.profiles import RankProfile, profile_folder
from mhmoe_ray.storage import copy_file, make_folder, write_json
from mhmoe_ray.train.step import Trainer

LOGGER = logging.getLogger("mhmoe")
STEP = "step"
"""Name of the range of a whole step."""
BACKWARD = "autograd::engine::evaluate_function: "
"""Start of the name of the event in which autograd runs a node of the backward."""
REDUCTIONS = ("c10d::", "fsdp::")
MEMORY_EVENTS = 100_000
"""Number of newest allocations in a memory snapshot."""


class Event(NamedTuple):
    """Event of a profile on the host; times are in nanoseconds."""

    name: str
    start: int
    end: int
    thread: int
    forward_thread: int = 0  # that ran the operation which a node of the backward differentiates
    sequence: int = -1  # number of the autograd node that a forward operation creates, or that a backward runs
    correlation: int = 0


class PartEvent(NamedTuple):
    """Event with its part, None outside of steps, and its time without the events within it."""

    event: Event
    part: str | None
    own_time: int


def attribute_events(events_of_host: Iterable[Event]) -> list[PartEvent]:
    """Return each event with its part, ordered by start, without those of work that runs beside the thread."""
    stacks: dict[int, list[int]] = defaultdict(list)  # indices of the open events of each thread
    forward_parts: dict[tuple[int, int], str | None] = {}
    backward_part: dict[int, str | None] = {}  # of the newest node that a thread ran
    nested_events, parts, own_times = list[Event](), list[str | None](), list[int]()
    for e in sorted(events_of_host, key=lambda e: (e.start, -e.end)):
        stack = stacks[e.thread]
        while stack and nested_events[stack[-1]].end <= e.start:
            stack.pop()
        part = None
        if stack:
            # A collective has an event of gloo, too, which outlasts the operation that starts it.
            if e.end > nested_events[stack[-1]].end:
                continue
            part = parts[stack[-1]]
            own_times[stack[-1]] -= e.end - e.start
        if e.name.startswith(BACKWARD):
            known_part = forward_parts.get((e.forward_thread, e.sequence), backward_part.get(e.thread))
            part = backward_part[e.thread] = known_part or part
        elif e.name.startswith(MARK):
            part = e.name.removeprefix(MARK)
            part = OTHER_WORK if part == STEP else part
        elif e.name.startswith(REDUCTIONS):
            part = EXCHANGE if "alltoall" in e.name or part == EXCHANGE else REDUCTION
        elif part == BLOCKS:
            part = next((p for start, p in OPERATOR_PARTS.items() if e.name.startswith(start)), part)
        if e.sequence >= 0 and not e.name.startswith(BACKWARD):
            # An operation without a gradient has the number of the next node, so the last operation with it counts.
            forward_parts[e.thread, e.sequence] = part
        stack.append(len(parts))
        nested_events.append(e)
        parts.append(part)
        own_times.append(e.end - e.start)
    return [PartEvent(*entry) for entry in zip(nested_events, parts, own_times, strict=True)]


def host_events(all_events: Iterable[Any]) -> list[Event]:
    """Return the events of the profiler that are operations or ranges on the host."""
    return [
        Event(
            e.name(), e.start_ns(), e.end_ns(), e.start_thread_id(), e.fwd_thread_id(), e.sequence_nr(),
            e.correlation_id(),
        )
        for e in all_events
        if e.device_type() == DeviceType.CPU and not e.is_async() and e.linked_correlation_id() == 0
    ]  # fmt: skip


def seconds_by_part(results: Any, is_cuda: bool) -> tuple[float, dict[str, float]]:
    """Return the seconds of all profiled steps together, and of each part, from the profiler's `kineto_results`."""
    all_events = results.events()
    part_events = attribute_events(host_events(all_events))
    steps = [e.event for e in part_events if e.event.name == MARK + STEP]
    seconds: dict[str, float] = defaultdict(float)
    if not is_cuda:
        [thread] = {step.thread for step in steps}
        for event, part, own_time in part_events:
            if part is not None and event.thread == thread:
                seconds[part] += own_time / 1e9
    else:
        part_of = {e.event.correlation: e.part for e in part_events}
        kernels = [e for e in all_events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
        busy, busy_end = 0, 0
        for kernel in sorted(kernels, key=lambda e: e.start_ns()):
            start, end = kernel.start_ns(), kernel.end_ns()
            # Validations and checkpoints between profiled steps do not count.
            if any(step.start <= start < step.end for step in steps):
                seconds[part_of.get(kernel.linked_correlation_id()) or OTHER_WORK] += (end - start) / 1e9
                # Kernels of several streams may run at the same time.
                busy += max(0, end - max(start, busy_end))
                busy_end = max(end, busy_end)
        seconds[IDLE] = max(0, sum(step.end - step.start for step in steps) - busy) / 1e9
    return sum(step.end - step.start for step in steps) / 1e9, dict(seconds)


class StepProfiler:
    """Profiler of one rank, and the observer of the parts of its steps while they are profiled."""

    def __init__(self, run: RunDir, trainer: Trainer, group: int) -> None:
        self._run, self._trainer, self._group = run, trainer, group
        self._profile: profile | None = None
        self._requested_steps = 0
        self._first_step = self._steps = 0
        self._contexts = ExitStack()
        self._modules: list[record_function] = []
        self._part: record_function | None = None
        self._step_range: record_function | None = None
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @property
    def is_active(self) -> bool:
        """True from a request to the end of the profiled steps."""
        return bool(self._requested_steps)

    def request(self, steps: int) -> None:
        """Profile the next steps, unless a profile is requested already; all ranks call this at the same step."""
        self._requested_steps = self._requested_steps or steps

    def begin_step(self) -> None:
        """Begin a step, with the profile that the spec or a request asks for."""
        schedule = self._trainer.spec.train.profile
        if schedule and self._trainer.step + 1 == schedule.at:
            self.request(schedule.steps)
        if not self._requested_steps:
            return
        if self._profile is None:
            self._start()
        self._step_range = _enter(STEP)
        self.begin_part(CASTS)

    def end_step(self) -> None:
        """End a step, and the profile after its last one."""
        if self._step_range is None:
            return
        self._end_part()
        _leave(self._step_range)
        self._step_range = None
        self._steps += 1
        if self._steps == self._requested_steps:
            self._finish()

    def close(self) -> None:
        """End a profile that has begun, and wait until it is written."""
        if self._profile is not None:
            self._finish()
        if self._pending is not None:
            self._pending.result()

    def begin_part(self, part: str) -> None:
        self._end_part()
        self._part = _enter(part)

    def _end_part(self) -> None:
        if self._part is not None:
            _leave(self._part)
        self._part = None

    def enter_module(self, part: str) -> None:
        self._modules.append(_enter(part))

    def leave_module(self) -> None:
        _leave(self._modules.pop())

    def _start(self) -> None:
        if self._pending is not None:
            self._pending.result()
        # Without this variable, the profiler announces its stages on stderr. It reads the variable at its first use.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._first_step, self._steps = self._trainer.step + 1, 0
        activities = [ProfilerActivity.CPU]
        if self._trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._contexts.enter_context(observed_parts(self._trainer.model, self))
        self._profile = profile(activities=activities)
        self._profile.start()

    def _finish(self) -> None:
        assert self._profile is not None
        finished_profile, memory_file = self._profile, None
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)
        finished_profile.stop()
        self._contexts.close()
        if self._trainer.device.type == "cuda":
            memory_file = Path(tempfile.mkstemp(suffix=".pickle")[1])
            torch.cuda.memory._dump_snapshot(str(memory_file))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._requested_steps = None, 0
        rank = self._trainer.mesh.rank
        if rank == 0:
            # The request is removed before the next one is looked for.
            try:
                self._run.clear_profile_request()
            except StorageError as e:
                LOGGER.warning("the request for a profile cannot be removed: %s", e)
        self._pending = self._writer.submit(self._write, finished_profile, memory_file, self._first_step, self._steps)

    def _write(self, finished_profile: profile, memory_file: Path | None, step: int, steps: int) -> None:
        """Write the files of a profile, in a thread; the run goes on without those that cannot be written."""
        mesh, device = self._trainer.mesh, self._trainer.device.type
        results = finished_profile.profiler.kineto_results if finished_profile.profiler else None
        seconds, parts = seconds_by_part(results, device == "cuda")
        mean_parts = {part: value / steps for part, value in parts.items()}
        rank_profile = RankProfile(mesh.rank, mesh.world_size, step, steps, device, seconds / steps, mean_parts)
        folder = profile_folder(self._run, step, self._group)
        try:
            with tempfile.TemporaryDirectory() as temporary_folder:
                trace = Path(temporary_folder) / "trace.json.gz"
                finished_profile.export_chrome_trace(str(trace))
                make_folder(folder)
                copy_file(trace, folder / f"rank_{mesh.rank}.trace.json.gz")
            if memory_file:
                copy_file(memory_file, folder / f"rank_{mesh.rank}.memory.pickle")
            write_json(folder / f"rank_{mesh.rank}.json", rank_profile._asdict())
            if mesh.rank == 0:
                events.record(self._run, "profile", step=step, steps=steps, ranks=mesh.world_size, name=folder.name)
        except (OSError, StorageError) as e:
            LOGGER.warning("the profile of step %d cannot be written: %s", step, e)
        finally:
            if memory_file:
                memory_file.unlink()


def _enter(part: str) -> record_function:
    part_range = record_function(MARK + part)
    part_range.__enter__()  # type: ignore[no-untyped-call]
    return part_range


def _leave(part_range: record_function) -> None:
    part_range.__exit__(None, None, None)
