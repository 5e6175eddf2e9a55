"""Tests of the acceptance run for GPUs, which is rehearsed on the CPU at toy sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_ray.bench.acceptance.__main__ import PARTS
from mhmoe_ray.bench.acceptance.predictions import PREDICTIONS
from mhmoe_ray.bench.acceptance.report import append_record, failures, write_report

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_rehearsal_runs_all_parts_without_an_installation(tmp_path):
    """The packages are imported from their source folders, as on a machine where nothing can be installed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.run(
        [sys.executable, "-m", "mhmoe_ray.bench.acceptance", "--device", "cpu", "--out", str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["part"] for record in records} == PARTS.keys()
    assert all(record["status"] == "done" for record in records if record["name"] == "end of the part")
    checks = [record["passed"] for record in records if "passed" in record]
    assert len(checks) > 20
    assert all(checks)
    report = (tmp_path / "report.md").read_text()
    assert all(f"\n## {part}\n" in report for part in PARTS)
    # The report has no predictions, because they hold only for full sizes on a GPU.
    assert "reached" not in report


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_parts_need_only_torch_and_the_packages_that_are_fetched():
    """A bare machine has torch with its own dependencies, numpy and pyarrow; `make gpu-wheels` fetches the rest."""
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if "-c constraints.txt pydantic" in line]
    fetched = {name.lower().replace("pyyaml", "yaml") for name in line.split("constraints.txt")[1].split()}
    fetched |= {"pydantic_core", "annotated_types", "typing_inspection", "typing_extensions"}
    torchs_own = {"torch", "torchgen", "triton", "jinja2", "markupsafe", "mpmath", "sympy", "numpy", "pyarrow"}
    # torch and triton use these packages if they are installed, as they are here, but do not need them.
    optional = ["cloudpickle", "dill", "tqdm"]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({[*optional, 'ray', 'tokenizers', 'typer', 'rich']!r}))\n"
        f"for part in {[*PARTS, '__main__']!r}:\n"
        "    if part != 'sanitizer':\n"
        "        importlib.import_module('mhmoe_ray.bench.acceptance.' + part)\n"
        "import mhmoe_kernels.triton.grouped.experts, mhmoe_kernels.triton.fused.experts\n"
        "import mhmoe_kernels.triton.routing\n"
        "files = {name: getattr(module, '__file__', None) or '' for name, module in sys.modules.items()}\n"
        "print(*{name.partition('.')[0] for name, file in files.items() if 'site-packages' in file})\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own_finders = {name for name in process.stdout.split() if name.startswith(("_", "mhmoe"))}
    assert set(process.stdout.split()) - own_finders <= fetched | torchs_own


def test_report_shows_predictions_and_failures(tmp_path):
    append_record(tmp_path, "layers", {"name": "SMoE", "ms": 20.5})
    append_record(tmp_path, "layers", {"name": "MH-MoE h 2 to SMoE", "times": 1.2})
    append_record(tmp_path, "correctness", {"name": "grouped_gemm", "error": 0.5, "passed": False})
    append_record(tmp_path, "layers", {"name": "end of the part", "status": "ended after its limit of 600 s"})
    write_report(tmp_path, has_predictions=True)
    report = (tmp_path / "report.md").read_text()
    assert "| SMoE | ms 20.5 | at most 26 ms: reached |" in report
    assert "| MH-MoE h 2 to SMoE | times 1.2 | at most 1.05 times: not reached |" in report
    assert failures(tmp_path) == [
        "correctness: grouped_gemm: error 0.5, passed False",
        "layers: end of the part: status ended after its limit of 600 s",
    ]


@pytest.mark.slow  # test_report_shows_predictions_and_failures tests the report of a failure
def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "mhmoe_ray.bench.acceptance", "--out", str(tmp_path), "--parts", "waits,ceilings"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stdout.count("exit code 1") == 2
    assert "there is no part other" in _refusal(tmp_path, "--parts", "other")


def _refusal(tmp_path, *arguments):
    """Return the error of a command that is refused."""
    command = [sys.executable, "-m", "mhmoe_ray.bench.acceptance", "--out", str(tmp_path), *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    return process.stderr


def test_predictions_belong_to_parts():
    assert {name.partition(":")[0] for name in PREDICTIONS} <= PARTS.keys()
