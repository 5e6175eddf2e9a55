"""Run the parts of the GPU acceptance test, each in a process of its own, and write the report after each of them.

python3 -m mhmoe_ray.bench.acceptance --out acceptance --parts ceilings,correctness
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mhmoe_ray.bench.acceptance.report import append_record, failures, forget_part, write_report
from mhmoe_ray.bench.acceptance.settings import Settings

PARTS = {
    "ceilings": 60,
    "correctness": 600,
    "sanitizer": 300,
    "steps": 240,
    "waits": 120,
    "layers": 600,
    "training": 360,
    "state": 180,
    "profiles": 120,
}
"""Time limit in seconds of each part of the acceptance test, by the name of the part."""


def main(arguments: list[str]) -> int:
    """Run the parts of the acceptance test that the arguments name, and return the exit status.

    The status is 1 if a check failed or a part ended in an error or at its time limit.
    """
    parser = argparse.ArgumentParser(prog="python3 -m mhmoe_ray.bench.acceptance", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder of the report")
    parser.add_argument("--parts", default=",".join(PARTS), help="names of parts, separated by commas")
    parser.add_argument("--toy", action="store_true", help="toy sizes; always so on a CPU")
    parser.add_argument("--run-part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.out, options.toy or options.device == "cpu")
    if options.run_part:
        _run_part(settings, options.run_part)
        return 0
    names = options.parts.split(",")
    if unknown_names := set(names) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown_names))}; choose from {', '.join(PARTS)}")
    settings.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{name} ...", flush=True)
        forget_part(settings.folder, name)
        append_record(settings.folder, name, {"name": "end of the part", **_start_part(settings, name)})
        write_report(settings.folder, has_predictions=not settings.is_toy)
    lines = failures(settings.folder)
    print("\n".join([*lines, f"report: {settings.folder / 'report.md'}"]))
    return 1 if lines else 0


def _start_part(settings: Settings, name: str) -> dict[str, object]:
    """Run a part of the test in a process of its own, and return its status and how many seconds it took."""
    command = [sys.executable, "-m", "mhmoe_ray.bench.acceptance", "--out", str(settings.folder)]
    command += ["--device", settings.device, "--run-part", name]
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
    # The sanitizer's tool starts a child process, so a part of the test is a process group, which is killed as a whole.
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=PARTS[name])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        return {"status": f"ended after its limit of {PARTS[name]} s", "last": errors.strip()[-300:]}
    seconds = round(time.monotonic() - start, 1)
    if process.returncode:
        last_lines = errors.strip().splitlines()[-1:] or [""]
        print(errors, file=sys.stderr)
        return {"status": f"exit code {process.returncode}: {last_lines[0][:300]}", "seconds": seconds}
    return {"status": "done", "seconds": seconds}


def _run_part(settings: Settings, name: str) -> None:
    """Run a part of the test in this process, and append each result to the records as soon as it is known."""
    # The part `sanitizer` runs checks of the module `correctness` under NVIDIA's compute-sanitizer.
    module_name = "correctness" if name == "sanitizer" else name
    module = importlib.import_module(f"mhmoe_ray.bench.acceptance.{module_name}")
    for row in module.run_sanitized(settings) if name == "sanitizer" else module.run(settings):
        append_record(settings.folder, name, row)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
