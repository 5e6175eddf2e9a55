"""Interleaved timing: each round runs all cases, so that other load on the machine affects all cases alike.

The module also has the device and its clock, errors of measurements, and a check of installed packages.
"""

import platform
import re
import signal
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError

from mhmoe_ray.errors import JobError, SpecError

Case = TypeVar("Case", bound=Hashable)
Result = TypeVar("Result")


class Timing(NamedTuple):
    """Seconds of one case, one value per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time each case once per round.

    `clock` returns seconds; for a GPU, it waits until the GPU has finished its work. Cases that have run before need no
    `warm_up`.
    """

    def time_case(name: str, _: int) -> float:
        start = clock()
        cases[name]()
        return clock() - start

    return {name: Timing(seconds) for name, seconds in measure_rounds(cases, rounds, time_case, warm_up).items()}


def measure_rounds(
    cases: Iterable[Case], rounds: int, measure: Callable[[Case, int], Result], warm_up: bool = False
) -> dict[Case, list[Result]]:
    """Call `measure(case, round)` for each case in each round, from round 0, and return the results of each case.

    A warm-up is round -1, whose results are dropped.
    """
    results: dict[Case, list[Result]] = {case: [] for case in cases}
    # The order alternates, so that a steady change of the machine's speed affects all cases alike.
    order = list(results)
    for number in range(-1 if warm_up else 0, rounds):
        for case in order:
            result = measure(case, number)
            if number >= 0:
                results[case].append(result)
        order.reverse()
    return results


class Hardware(NamedTuple):
    """Device on which the measurements run."""

    device: torch.device
    name: str
    """Name of the processor or the graphics card."""
    threads: int | None
    """Number of torch's threads on a CPU; None on a graphics card."""

    def as_json(self) -> dict[str, Any]:
        return {"device": self.device.type, "machine": self.name, "threads": self.threads}

    def __str__(self) -> str:
        return self.name if self.threads is None else f"{self.name}, {self.threads} threads"


def find_hardware(device: str) -> Hardware:
    """Return the hardware of `cpu` or `cuda`, the current graphics card; raise a SpecError if there is no card."""
    if device == "cpu":
        return Hardware(torch.device("cpu"), cpu_name(), torch.get_num_threads())
    if not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        reason = f"torch {torch.__version__} {build} and finds no card"
        raise SpecError("device cuda", reason, "use --device cpu, or run it where there is one")
    return Hardware(torch.device("cuda"), torch.cuda.get_device_name(), None)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor if the system reports it, else its architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(names[0].replace("(R)", "").replace("(TM)", "").split()) if names else platform.machine()


def device_clock(device: torch.device) -> Callable[[], float]:
    """Return a function that waits until the device has finished its work and then returns the time in seconds."""

    def read() -> float:
        # CUDA calls return before the GPU has done the work, so the clock waits for it.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


@contextmanager
def checked_sizes(title: str) -> Iterator[None]:
    """Turn a ValidationError for an impossible model inside the block into a SpecError about the user's sizes."""
    try:
        yield
    except ValidationError as e:
        reason = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(title, reason, "choose other sizes") from e


def process_failure(title: str, stderr: str, code: int) -> JobError:
    """Return the error for a process that failed, with the first error of its traceback.

    If negative, the exit code is minus the number of the signal that ended the process.
    """
    # A traceback prints a chain of errors with the cause first, so the first error is the one to report.
    lines = [line for line in stderr.splitlines() if line.strip()]
    # In a traceback, a line that states an error starts with the name of the error.
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    exit_reason = f"exit code {code}" if code >= 0 else f"it was ended by {signal.Signals(-code).name}"
    return JobError(title, next(iter(errors or lines[-1:]), exit_reason), "fix that and measure again")


def installed_contestants(packages: Mapping[str, str | None], report: Callable[[str], None]) -> list[str]:
    """Return the alternatives whose package, if they need one, is installed, and report a line for each other one."""
    missing_packages = {name: package for name, package in packages.items() if package and find_spec(package) is None}
    for name, package in missing_packages.items():
        report(f"{name} is not measured: {package} is not installed")
    return [name for name in packages if name not in missing_packages]
