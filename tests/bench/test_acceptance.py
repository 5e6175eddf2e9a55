"""Tests of the acceptance run for GPUs, which is rehearsed on the CPU at toy sizes."""

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_ray.bench.acceptance import correctness, node
from mhmoe_ray.bench.acceptance.__main__ import INCOMPLETE_STATUS, NODE_PARTS, PARTS, check_progress
from mhmoe_ray.bench.acceptance.accounting import Accounting, count_pass
from mhmoe_ray.bench.acceptance.compile import COMPILED_PARTS
from mhmoe_ray.bench.acceptance.defaults import SETTINGS, WORKER_SETTINGS
from mhmoe_ray.bench.acceptance.goals import STATED_PREDICTIONS
from mhmoe_ray.bench.acceptance.layers import layer_flops, with_kernel
from mhmoe_ray.bench.acceptance.predictions import predict_layer_seconds
from mhmoe_ray.bench.acceptance.report import (
    PLOT_FILE,
    RECORDS_FILE,
    TO_BE_CONTINUED,
    append_record,
    failures,
    part_records,
    read_records,
    write_report,
)
from mhmoe_ray.bench.acceptance.settings import Settings
from mhmoe_ray.bench.acceptance.steps import GROUP_VARIANTS, VARIANTS
from mhmoe_ray.bench.layers import single_layer_spec
from mhmoe_ray.model.moe import MultiHeadMoE
from tests.support.watch import LIMIT, wait_until

ROOT = Path(__file__).parents[2]
IDENTITY = {"device": "cpu", "is_toy": True, "gpus": 1}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def start_call(folder, *arguments):
    """Start a call of the acceptance run, with the packages' source folders, as where nothing can be installed."""
    command = [sys.executable, "-m", "mhmoe_ray.bench.acceptance", "--device", "cpu", "--out", str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)


def run_call(folder, *arguments):
    """Run a call of the acceptance run, and return its exit status and the last line that it printed."""
    process = start_call(folder, *arguments)
    output, _ = process.communicate()
    return process.returncode, output.splitlines()[-1]


def case_names(folder, key="case"):
    return [record[key] for record in read_records(folder) if key in record]


def group_members(group):
    """Return the processes of a process group that have not ended."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


@pytest.mark.slow
@pytest.mark.long
@needs_triton
def test_rehearsal_runs_all_parts_and_variants(tmp_path):
    status = INCOMPLETE_STATUS
    while status == INCOMPLETE_STATUS:
        status, last_line = run_call(tmp_path, "--budget", "570")
    assert (status, last_line) == (0, f"complete: {', '.join(PARTS)}")
    records = read_records(tmp_path)[1:]
    assert {record["part"] for record in records} == PARTS.keys()
    cases = [(record["part"], record["case"]) for record in records if "case" in record]
    assert len(cases) == len(set(cases))
    rows = [(record["part"], row) for record in records for row in record.get("rows", [])]
    checks = [row["passed"] for _, row in rows if "passed" in row]
    assert len(checks) > 20
    assert all(checks)
    predicted_names = {row["name"] for part, row in rows if part == "predictions"}
    assert predicted_names <= {f"{part}: {row['name']}" for part, row in rows}
    report = (tmp_path / "report.md").read_text()
    assert all(report.count(f"\n## {part}\n") == 1 for part in PARTS)
    assert report.count("| end of the part | status done") == len(PARTS)
    # The report has no predictions beside the results, because they hold only for full sizes on a GPU.
    assert "reached" not in report
    names_by_part = {name: {row["name"] for part, row in rows if part == name} for name in PARTS}
    variants = {f"{v}, {p}" for v in (*VARIANTS, *GROUP_VARIANTS) for p in ("float32", "bfloat16")}
    assert names_by_part["steps"] == variants
    assert names_by_part["defaults"] >= SETTINGS.keys() | WORKER_SETTINGS.keys()
    assert names_by_part["layers"] >= {"dense", "torch compiled"}
    assert [row["failed"] for part, row in rows if part == "compile" and "failed" in row] == [0] * len(COMPILED_PARTS)
    [machine_row] = [row for part, row in rows if row["name"] == "machine"]
    assert f"torch {torch.__version__}" in report.partition("## ")[0]
    assert machine_row["date"] in report.partition("## ")[0]


@pytest.mark.slow
@pytest.mark.ray
def test_rehearsal_of_a_node_runs_all_strategies(tmp_path):
    status = INCOMPLETE_STATUS
    while status == INCOMPLETE_STATUS:
        status, last_line = run_call(tmp_path, "--gpus", "2")
    assert (status, last_line) == (0, f"complete: {', '.join(NODE_PARTS)}")
    rows = [row for record in part_records(tmp_path, "node") for row in record.get("rows", [])]
    passed_names = [row["name"] for row in rows if row.get("passed")]
    large_names = ["Qwen3-30B, fsdp", "Qwen3-30B, fsdp, ep"]
    assert passed_names == ["ddp", "ddp, ep", "fsdp", "hybrid", *large_names, "killed worker"]
    [exchange_row] = [row for row in rows if "collective_GB/s" in row]
    assert exchange_row["GB/s"] > 0


def test_killed_worker_needs_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    [case] = [case for case in node.cases(Settings("cpu", tmp_path, True, gpus=2)) if case.name == "killed worker"]
    assert list(case.measure()) == [{"name": "killed worker", "skipped": "not run: Ray is missing"}]


@pytest.mark.long
def test_part_that_does_not_fit_into_the_budget_runs_in_the_next_call(tmp_path):
    parts = ("--parts", "ceilings,training")
    # At toy sizes, 24 of the 23 seconds that 33 leave for parts are reserved for `training`.
    status, last_line = run_call(tmp_path, *parts, "--budget", "33")
    assert status == INCOMPLETE_STATUS
    assert last_line.startswith("to be continued by the same command: ")
    assert "training" in last_line
    assert "To be continued: " in (tmp_path / "report.md").read_text()
    assert run_call(tmp_path, *parts, "--budget", "3000") == (0, "complete: ceilings, training")
    assert case_names(tmp_path) == case_names(tmp_path, "started") == ["rates", "micro-batches of 1"]
    assert "To be continued" not in (tmp_path / "report.md").read_text()


@pytest.mark.long
@needs_triton
def test_signal_ends_the_part_and_the_next_call_continues_it(tmp_path):
    process = start_call(tmp_path, "--parts", "correctness")
    wait_until(lambda: case_names(tmp_path), "a case ends")
    [part] = psutil.Process(process.pid).children()
    assert "another call writes to" in _refusal(tmp_path, "--device", "cpu")
    # A stopped part is like one that hangs: it reacts to SIGKILL only.
    part.suspend()
    process.terminate()
    assert process.wait(LIMIT) == 128 + signal.SIGTERM
    members = group_members(part.pid)
    for member in members:
        member.kill()
    assert members == []
    output, _ = process.communicate()
    assert output.splitlines()[-1] == "to be continued by the same command: correctness"
    assert "## correctness" in (tmp_path / "report.md").read_text()
    finished_cases = case_names(tmp_path)
    with (tmp_path / RECORDS_FILE).open("a") as file:
        file.write('{"part":"correctness","case":"torn')
    process = start_call(tmp_path, "--parts", "correctness")
    wait_until(lambda: len(case_names(tmp_path)) > len(finished_cases), "another case ends")
    [part] = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    wait_until(lambda: not group_members(part.pid), "the part ends with the call")
    # The part did not go on to its end.
    assert len(case_names(tmp_path)) < len(list(correctness.cases(Settings("cpu", tmp_path, is_toy=True))))
    assert "has results of another device" in _refusal(tmp_path, "--device", "cuda")
    assert case_names(tmp_path)[: len(finished_cases)] == finished_cases
    assert len(case_names(tmp_path)) == len(set(case_names(tmp_path)))
    started_cases = case_names(tmp_path, "started")
    assert all(started_cases.count(case) == 1 for case in finished_cases)


def test_part_that_never_starts_within_the_budget_fails(tmp_path):
    arguments = ("--parts", "ceilings", "--budget", "10.1")
    assert run_call(tmp_path, *arguments) == (INCOMPLETE_STATUS, "to be continued by the same command: ceilings")
    assert run_call(tmp_path, *arguments) == (1, "complete: ceilings")
    [line] = failures(tmp_path)
    assert "start of the part did not end within the budgets of two calls; raise --budget, now 10.1 s" in line


def test_case_that_two_calls_in_a_row_do_not_end_fails(tmp_path):
    def end_call(*records):
        old_count = len(part_records(tmp_path, "layers"))
        for record in records:
            append_record(tmp_path, {"part": "layers", **record})
        end = check_progress(tmp_path, "layers", old_count, 60)
        append_record(tmp_path, {"part": "layers", "status": TO_BE_CONTINUED, "seconds": 50.0, **end})
        return end

    append_record(tmp_path, IDENTITY)
    assert end_call({"started": "a"}) == {"stalled": "a"}
    assert end_call({"started": "a"}, {"case": "a", "seconds": 1.0, "rows": []}, {"started": "b"}) == {}
    assert end_call({"started": "b"}) == {"stalled": "b"}
    assert failures(tmp_path) == []
    assert end_call({"started": "b"}) == {}
    assert case_names(tmp_path) == ["a", "b"]
    [line] = failures(tmp_path)
    assert line.startswith("layers: b: passed False, error did not end within the budgets of two calls")


def test_torn_lines_are_skipped(tmp_path):
    path = tmp_path / RECORDS_FILE
    append_record(tmp_path, IDENTITY)
    append_record(tmp_path, {"part": "layers", "case": "a", "seconds": 1.0, "rows": [{"name": "first", "ms": 1.5}]})
    with path.open("a") as file:
        file.write('{"part":"layers","case":"b","ro')
    append_record(tmp_path, {"part": "layers", "case": "c", "seconds": 1.0, "rows": [{"name": "third", "ms": 2.5}]})
    with path.open("a") as file:
        file.write('{"part":"lay')
    assert case_names(tmp_path) == ["a", "c"]
    write_report(tmp_path, has_predictions=False, incomplete_parts=["layers"])
    report = (tmp_path / "report.md").read_text()
    assert "| first | ms 1.5 |" in report
    assert "| third | ms 2.5 |" in report


@pytest.mark.long
@needs_triton
def test_limit_on_kernels_is_the_count_on_fake_tensors_and_eight(tmp_path):
    status, _ = run_call(tmp_path, "--parts", "waits", "--budget", "3000")
    assert status == 0
    rows = [row for record in read_records(tmp_path) for row in record.get("rows", [])]
    limits = {row["name"]: row["limit"] for row in rows if "limit" in row}
    settings = Settings("cpu", tmp_path, is_toy=True)
    expected_limits = {}
    for name, moe in settings.layers.items():
        for kernel in ("grouped_gemm", "grouped_mm", "triton"):
            with FakeTensorMode():
                module = MultiHeadMoE(single_layer_spec(settings.layer_width, with_kernel(moe, kernel)))
                x_BTM = torch.empty(1, 8, 16, dtype=torch.bfloat16, requires_grad=True)
                with Accounting() as accounting:
                    with torch.autocast("cpu", torch.bfloat16):
                        y_BTM, routing = module(x_BTM)
                    outputs = (y_BTM, routing.balance_loss, routing.z_loss)
                    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
            expected_limits[f"{name}, {kernel}"] = sum(accounting.kernels.values()) + 8
    assert limits == expected_limits


@needs_triton
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
        f"for part in {[*PARTS, *NODE_PARTS, '__main__']!r}:\n"
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
    append_record(tmp_path, IDENTITY)
    predicted_rows = [{"name": "layers: SMoE", "ms": 22.5}, {"name": "layers: SMoE, grouped_mm", "ms": 22.5}]
    append_record(tmp_path, {"part": "predictions", "case": "all", "seconds": 1.0, "rows": predicted_rows})
    rows = [{"name": "SMoE", "ms": 20.5}, {"name": "SMoE, grouped_mm", "ms": 30.0}]
    rows.append({"name": "MH-MoE h 2 to SMoE", "times": 1.2})
    append_record(tmp_path, {"part": "layers", "case": "tokens", "seconds": 1.0, "rows": rows})
    rows = [{"name": "grouped_gemm", "error": 0.5, "passed": False}]
    append_record(tmp_path, {"part": "correctness", "case": "a", "seconds": 1.0, "rows": rows})
    append_record(tmp_path, {"part": "layers", "status": "ended after its limit of 600 s", "seconds": 600.0})
    write_report(tmp_path, has_predictions=True, incomplete_parts=[])
    report = (tmp_path / "report.md").read_text()
    assert "| SMoE | ms 20.5 | at most 26 ms: reached; 22.5 ms: 0.91 of it |" in report
    assert "| SMoE, grouped_mm | ms 30 | 22.5 ms: 1.33 of it |" in report
    explained_lines = report.partition("each to be explained here:\n\n")[2].partition("\n\n")[0]
    assert explained_lines == "- layers: SMoE, grouped_mm: 1.33 of its prediction"
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert "| MH-MoE h 2 to SMoE | times 1.2 | at most 1.05 times: not reached |" in report
    assert failures(tmp_path) == [
        "layers: end of the part: status ended after its limit of 600 s, seconds 600, calls 1",
        "correctness: grouped_gemm: error 0.5, passed False",
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
    assert {name.partition(":")[0] for name in STATED_PREDICTIONS} <= PARTS.keys()


@needs_triton
def test_predicted_times_are_of_the_counted_work(tmp_path):
    settings = Settings("cpu", tmp_path, is_toy=False)
    for size in settings.layers.values():
        counts = count_pass(settings, size, "grouped_gemm", 32768, torch.bfloat16)
        seconds = predict_layer_seconds(settings, size, "grouped_gemm", 32768)
        flop_seconds = layer_flops(settings, size, 32768) / 798e12
        expected_seconds = flop_seconds + counts.bytes.total() / 3.0e12 + counts.kernels.total() * 4e-6
        assert seconds == pytest.approx(expected_seconds)
