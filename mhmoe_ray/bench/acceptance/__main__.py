"""Run the parts of the GPU acceptance test, each in a process of its own, and write the report after each of them.

python3 -m mhmoe_ray.bench.acceptance --out jobs/gpu/acceptance --parts ceilings,correctness
"""

import argparse
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from mhmoe_ray.bench.acceptance.report import (
    RECORDS_FILE,
    TO_BE_CONTINUED,
    append_record,
    failures,
    part_records,
    part_status,
    read_records,
    write_report,
)
from mhmoe_ray.bench.acceptance.settings import Row, Settings, part_cases

PARTS = {
    "predictions": 60,
    "compile": 330,
    "ceilings": 60,
    "correctness": 300,
    "sanitizer": 240,
    "steps": 180,
    "waits": 120,
    "layers": 400,
    "experts": 180,
    "training": 240,
    "defaults": 300,
    "state": 180,
    "profiles": 120,
}
NODE_PARTS = {"ceilings": 60, "node": 560}
"""Parts on one GPU, and those on all GPUs of a node (`--gpus`), with their longest times within a call in seconds."""
_LIMITS = PARTS | NODE_PARTS
INCOMPLETE_STATUS = 75
"""Exit status of a call that leaves something for the next one (EX_TEMPFAIL in sysexits.h), and of such a part."""
GRACE_SECONDS = 3
"""Seconds between SIGTERM and SIGKILL for a part that must end."""
MARGIN_SECONDS = 10
"""Seconds of the budget that are reserved for the end of a part and for the report."""
START_SECONDS = 15
"""Seconds without which no further part is started, because it needs about as many to import torch."""


def main(arguments: list[str]) -> int:
    """Run the parts that the arguments name until the budget ends, and return the exit status.

    It is `INCOMPLETE_STATUS` if another call must continue, and else 1 if a check failed or a part ended in an error or
    at its time limit.
    """
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python3 -m mhmoe_ray.bench.acceptance", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("jobs/gpu/acceptance"), help="folder of the report")
    parser.add_argument("--parts", help="names of parts, separated by commas")
    parser.add_argument("--gpus", type=int, default=1, help="with more than one: measure a node with so many GPUs")
    parser.add_argument("--toy", action="store_true", help="toy sizes; always so on a CPU")
    budget_help = f"seconds of this call (570); it ends with status {INCOMPLETE_STATUS} if another one must continue"
    parser.add_argument("--budget", type=float, default=570, help=budget_help)
    for hidden_option, kind in (("--run-part", str), ("--deadline", float), ("--first", int)):
        parser.add_argument(hidden_option, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.out, options.toy or options.device == "cpu", options.gpus)
    if options.run_part:
        return _run_part(settings, options.run_part, options.deadline, bool(options.first))
    names = options.parts.split(",") if options.parts else list(NODE_PARTS if settings.gpus > 1 else PARTS)
    if unknown_names := set(names) - _LIMITS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown_names))}; choose from {', '.join(_LIMITS)}")
    settings.folder.mkdir(parents=True, exist_ok=True)
    identity = {"device": settings.device, "is_toy": settings.is_toy, "gpus": settings.gpus}
    with (settings.folder / RECORDS_FILE).open("a") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"another call writes to {settings.folder}; wait for its end")
        records = read_records(settings.folder)
        if not records:
            append_record(settings.folder, identity)
        elif records[0] != identity:
            parser.error(
                f"{settings.folder} has results of another device, size, number of GPUs or version; use another --out"
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _exit_at_signal)
        try:
            _run_parts(settings, names, start + options.budget - MARGIN_SECONDS, options.budget)
        finally:
            status = _report(settings, names)
    return status


def _exit_at_signal(number: int, _: object) -> None:
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    sys.exit(128 + number)


def _incomplete_parts(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if part_status(part_records(folder, name)) == TO_BE_CONTINUED]


def _report(settings: Settings, names: list[str]) -> int:
    incomplete_parts = _incomplete_parts(settings.folder, names)
    write_report(settings.folder, has_predictions=not settings.is_toy, incomplete_parts=incomplete_parts)
    failed_lines = failures(settings.folder)
    print("\n".join([*failed_lines, f"report: {settings.folder / 'report.md'}"]))
    if incomplete_parts:
        print(f"to be continued by the same command: {', '.join(incomplete_parts)}", flush=True)
        return INCOMPLETE_STATUS
    print(f"complete: {', '.join(names)}", flush=True)
    return 1 if failed_lines else 0


def _run_parts(settings: Settings, names: list[str], deadline: float, budget: float) -> None:
    folder = settings.folder
    for index, name in enumerate(_incomplete_parts(folder, names)):
        if index and time.monotonic() + START_SECONDS > deadline:
            return
        print(f"{name} ...", flush=True)
        old_count = len(part_records(folder, name))
        end = _run_process(settings, name, deadline, is_first=not index)
        if end["status"] == TO_BE_CONTINUED and not index:
            end |= check_progress(folder, name, old_count, budget)
        append_record(folder, {"part": name, **end})
        if end["status"] == TO_BE_CONTINUED:
            return
        write_report(folder, has_predictions=not settings.is_toy, incomplete_parts=_incomplete_parts(folder, names))


def check_progress(folder: Path, part: str, old_count: int, budget: float) -> Row:
    """Return what the end of a part says of a case that had a whole call and did not end; the second time, it fails.

    Otherwise each call would start such a case, and the test would never end. `old_count` is the number of the part's
    records before this call.
    """
    records = part_records(folder, part)
    old_records, new_records = records[:old_count], records[old_count:]
    if any("case" in record for record in new_records):
        return {}
    case = new_records[-1]["started"] if new_records else "start of the part"
    last_end: Row = next((record for record in reversed(old_records) if "status" in record), {})
    if last_end.get("stalled") != case:
        return {"stalled": case}
    reason = f"did not end within the budgets of two calls; raise --budget, now {budget:g} s"
    if not new_records:
        return {"status": f"{case} {reason}"}
    row = {"name": case, "passed": False, "error": reason}
    append_record(folder, {"part": part, "case": case, "seconds": 0.0, "rows": [row]})
    return {}


def _run_process(settings: Settings, name: str, deadline: float, is_first: bool) -> Row:
    command = [sys.executable, "-m", "mhmoe_ray.bench.acceptance", "--out", str(settings.folder)]
    command += ["--device", settings.device, "--gpus", str(settings.gpus), "--run-part", name]
    command += ["--deadline", str(deadline), "--first", str(+is_first)]
    if settings.is_toy:
        command.append("--toy")
    if name == "sanitizer":
        tool = shutil.which("compute-sanitizer")
        if tool is None or settings.device == "cpu":
            return {"status": "done", "skipped": "there is no compute-sanitizer here"}
        command = [tool, "--error-exitcode", "3", "--report-api-errors", "no", *command]
    environment = {**os.environ, "KINETO_LOG_LEVEL": "6"}
    if name == "sanitizer":
        # torch's cache puts tensors side by side in large blocks of memory. There an access past the end of a tensor
        # would reach its neighbour, and the sanitizer would not notice it.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if settings.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    seconds_left = deadline - start
    code = None
    # The pipe is at its end when this process is, even if it is killed. The part then ends itself.
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as error_file, os.fdopen(write_end, "wb"):
        # The sanitizer's tool starts a child process, so a part of the test is a process group, which ends as a whole.
        process = subprocess.Popen(command, env=environment, stdin=read_end, stderr=error_file, start_new_session=True)
        os.close(read_end)
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0, min(_LIMITS[name], seconds_left)))
        finally:
            _end_group(process)
        error_file.seek(0)
        errors = error_file.read().decode(errors="replace").strip()
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        return {"status": "done", "seconds": seconds}
    if code == INCOMPLETE_STATUS or (code is None and seconds_left < _LIMITS[name]):
        return {"status": TO_BE_CONTINUED, "seconds": seconds}
    if code is None:
        return {"status": f"ended after its limit of {_LIMITS[name]} s", "seconds": seconds, "last": errors[-300:]}
    print(errors, file=sys.stderr)
    last_line = (errors.splitlines() or [""])[-1]
    return {"status": f"exit code {code}: {last_line[:300]}", "seconds": seconds}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _run_part(settings: Settings, name: str, deadline: float, is_first: bool) -> int:
    """Run the cases of a part that have no results yet, append their results, and return the exit status.

    A case is started only if one as long as the longest so far would end before the deadline, or if it is the first of
    a call. Before a case has ended, it counts as long as its share of the part's limit.
    """
    # Python's own reaction to SIGTERM would leave temporary folders behind.
    signal.signal(signal.SIGTERM, _exit_at_signal)
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    cases = part_cases(settings, name)
    records = part_records(settings.folder, name)
    seconds_by_case = {record["case"]: record["seconds"] for record in records if "case" in record}
    limit_share = _LIMITS[name] / len(cases) / (10 if settings.is_toy else 1)
    for case in cases:
        if case.name in seconds_by_case:
            continue
        start = time.monotonic()
        expected_seconds = max(seconds_by_case.values(), default=limit_share)
        if start + expected_seconds > deadline and not is_first:
            return INCOMPLETE_STATUS
        is_first = False
        append_record(settings.folder, {"part": name, "started": case.name})
        rows = list(case.measure())
        seconds_by_case[case.name] = seconds = round(time.monotonic() - start, 3)
        append_record(settings.folder, {"part": name, "case": case.name, "seconds": seconds, "rows": rows})
    return 0


def _exit_with_parent() -> None:
    """End this process at once when its parent has ended, so that it does not stay on the GPU."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
