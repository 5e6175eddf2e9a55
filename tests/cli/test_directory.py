"""Tests of commands on a run directory whose cluster is gone."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pexpect
import pytest

from mhmoe_ray.cli.follow import _print_last_lines, _RunView
from mhmoe_ray.cli.output import activity_lines
from mhmoe_ray.cluster import runs
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.runs import outcome, outcome_or_lost
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.cli.run import assert_one_line, command, mhmoe
from tests.support.events import WORKER
from tests.support.specs import tiny_spec

HUNG_EVENT = {"rank": 0, "pid": 3, "host": "x", "step": 7, "doing": "training", "seconds": 9.0, "silent": False}


@pytest.fixture
def unused_address():
    """Yield the URL of a port of this machine where nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def run(tmp_path, unused_address):
    """Return a run of 20 steps that has recorded step 7 and no end, and whose local cluster does not answer."""
    run_dir = create_run(tiny_spec(tmp_path))
    add_attempt(run_dir, Attempt("job-1", unused_address, local=True))
    events.record(run_dir, "submitted", attempt=1, job="job-1", address=unused_address)
    events.record(run_dir, "started", group=1, step=0, dp=1, ep=1, groups=[[0]], straddling_groups=0, workers=[WORKER])
    line = {metrics.STEP: 7, metrics.GROUP: 1, metrics.LOSS: 2.5, metrics.TOKENS: 70, metrics.TOKENS_PER_S: 9.0}
    history.append(run_dir, {**line, metrics.DATA_WAIT: 0.0, metrics.TIME: 1000.0})
    return run_dir


def test_run_is_unknown_if_its_cluster_does_not_answer(tmp_path, run):
    status = mhmoe(tmp_path, "status", "--json").json()
    assert status["state"] == "unknown"
    assert "it said running last, but" in status["cluster"]
    assert status["last"]["step"] == 7
    assert mhmoe(tmp_path, "status").out.startswith(f"{run.id}: unknown")


def test_status_shows_bytes_sent_between_ranks(tmp_path, run):
    assert "exchange" not in mhmoe(tmp_path, "status").out
    sent_bytes = {metrics.ROWS_SENT: 3_000_000, metrics.ROWS_LEAST: 2_000_000, metrics.COUNTS_SENT: 320}
    history.append(run, {**history.last_line(run), metrics.STEP: 8, **sent_bytes})
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "3 MB of rows between ranks in a step, 1.50 times the least; 320 B of counts" in output
    events.record(run, "started", group=1, step=0, workers=[], dp=1, ep=4, straddling_groups=1, dispatch="hierarchical")
    history.append(run, {**history.last_line(run), metrics.STEP: 9, metrics.ROWS_BETWEEN_NODES: 1_000_000})
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert (
        "3 MB of rows between ranks in a step (1 MB between nodes), 1.50 times what flat dispatch would send" in output
    )


def test_balance_that_is_not_finite_is_shown(tmp_path, run):
    last_line = {**history.last_line(run), metrics.STEP: 8, metrics.BALANCE: float("nan"), metrics.LEAST_EXPERT: 0.5}
    history.append(run, last_line)
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "not finite (1 is uniform); the least used expert has 0.50 of its share" in output
    _RunView(run, from_now=False).refresh()
    [task] = activity_lines.tasks
    assert task.fields["activity"] == "training: 8 of 20 steps  loss 2.5000  9 tok/s  balance not finite"


def test_follower_prints_all_events_of_a_run(run, capsys):
    workers = [WORKER, WORKER | {"host": "y"}]
    events.record(run, "hung", **HUNG_EVENT)
    events.record(run, "lost", rank=0, ranks=2, host="x", reason="killed", lines=[])
    events.record(run, "skipped_checkpoint", name="step_00000007.1", reason="it is torn")
    events.record(run, "started", group=2, step=5, dp=1, ep=2, groups=[[0, 1]], straddling_groups=1, workers=workers)
    events.record(run, "preempted", step=7, nodes=["n1"], deadline=None)
    events.record(run, "preempted", step=8, nodes=["n1", "n2"], deadline=None)
    line = {**history.last_line(run), metrics.STEP: 8, metrics.SKIPPED: True, metrics.GRAD_NORM: None}
    events.record(run, "spike", step=9, reason="its loss of 9 is above 3")
    history.append(run, {**line, metrics.VAL_LOSS: 2.25})
    _RunView(run, from_now=False).refresh()
    assert capsys.readouterr().err.splitlines() == [
        "training from step 0 on 1 worker, dp 1 x ep 1",
        "warning: rank 0 (process 3 on x): it made no progress for 9 s, training after step 7, and was killed",
        "warning: rank 0 on x failed, and 1 other with it: killed",
        "warning: step_00000007.1: it is torn; the previous one is used",
        "training from step 5 on 2 workers, dp 1 x ep 2, start 2 of the workers",
        "warning: 1 expert-parallel groups lie on more than one node",
        "node n1 is preempted; saved at step 7, restarting on other nodes or with fewer workers",
        "nodes n1, n2 are preempted; saved at step 8, restarting on other nodes or with fewer workers",
        "warning: step 9 is a spike and updated nothing: its loss of 9 is above 3",
        f"its documents: mhmoe data at {run.path}@9",
        "step 8: validation loss 2.2500, loss 2.5000  9 tok/s",
        "warning: step 8 updated nothing: its gradient was not finite",
    ]


def test_status_counts_skipped_steps_and_dropped_routes(tmp_path, run):
    routing = {metrics.BALANCE: 1.0, metrics.LEAST_EXPERT: 0.5, metrics.DROPPED: 0.125}
    history.append(run, {**history.last_line(run), metrics.SKIPPED_STEPS: 2, **routing})
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "2, whose gradient was not finite" in output
    assert "12.50% of routes" in output


def test_list_asks_each_cluster_once_and_does_not_wait_for_old_jobs(tmp_path, run, monkeypatch):
    request_counts = Counter()

    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            request_counts[self.path] += 1
            job = {"status": "FAILED", "message": "killed", "end_time": 1_000_000}
            response = (
                {"ray_version": "2"}
                if "version" in self.path
                else {"data": {"summary": [], "nodeLogicalResources": {}}}
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(job if "jobs" in self.path else response).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        other_runs = [create_run(tiny_spec(tmp_path)) for _ in range(3)]
        for other_run in other_runs:
            add_attempt(other_run, Attempt("job-1", address, local=False))
        try:
            # The job ended long ago, so `outcome` does not have to wait for a late event of the run.
            with monkeypatch.context() as patch:
                patch.setattr(runs.time, "sleep", lambda seconds: pytest.fail("it waits"))
                assert outcome(other_runs[0], connect(address)).reason == "its job ended (failed): killed"
            request_counts.clear()
            states = [r["state"] for r in mhmoe(tmp_path, "list", "--json").json()]
        finally:
            server.shutdown()
            thread.join()
    assert states == ["unknown", *["failed"] * 3]
    assert request_counts == {"/api/version": 1, "/nodes?view=summary": 1, "/api/jobs/job-1": 3}


def test_status_has_the_mean_speed_over_steps_of_unequal_tokens(tmp_path, run):
    assert mhmoe(tmp_path, "status", "--json").json()["tokens_per_s"] is None
    # The steps take 1 and 3 seconds, for 10 and 60 tokens, so the mean speed is 70 tokens in 4 seconds.
    for step, tokens, rate in ((8, 80, 10.0), (9, 140, 20.0)):
        steps = {metrics.STEP: step, metrics.TOKENS: tokens, metrics.TOKENS_PER_S: rate}
        history.append(run, {**history.last_line(run), **steps})
    assert mhmoe(tmp_path, "status", "--json").json()["tokens_per_s"] == 70 / 4


def test_status_shows_interruptions_and_last_lines_of_the_failed_worker(tmp_path, run):
    loss_fields = {"host": "y", "lines": ["Fatal Python error: Segmentation fault", "  File [x]"]}
    events.record(run, "hung", **HUNG_EVENT)
    # The watchdog killed this worker, so the events `hung` and `lost` of rank 0 are one interruption.
    events.record(run, "lost", rank=0, ranks=2, reason="killed", **loss_fields)
    events.record(run, "lost", rank=1, ranks=2, reason="its process is gone: crashed", **loss_fields)
    status = mhmoe(tmp_path, "status", "--json").json()
    assert [i["what"].split()[0:2] for i in status["interruptions"]] == [["rank", "0"], ["rank", "1"]]
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "2 times; last" in output
    assert "s ago: rank 1 on y failed, and 1 other with it: its process is gone: crashed" in output
    assert "Segmentation fault" not in output
    events.record(run, "failed", reason="worker 1 failed")
    assert "Fatal Python error: Segmentation fault\n  File [x]" in mhmoe(tmp_path, "status").out


def test_ranks_that_hang_together_are_listed_as_hung(run):
    for rank in range(3):
        events.record(run, "hung", **{**HUNG_EVENT, "rank": rank})
    events.record(run, "lost", rank=0, ranks=3, host="y", reason="its process is gone", lines=[])
    descriptions = [text for _, text in events.interruptions(events.read(run))]
    assert len(descriptions) == 3
    assert not any("its process is gone" in text for text in descriptions)


@pytest.mark.parametrize(
    "later_event",
    [
        {"kind": "submitted", "attempt": 2, "job": "job-2", "address": "http://127.0.0.1:1"},
        {"kind": "began", "attempt": 2, "host": "x", "pid": 1},
        {"kind": "restoring", "name": None, "step": 0, "attempt": 1},
    ],
)
def test_last_lines_are_those_of_the_failure_that_ended_the_run(run, capsys, later_event):
    events.record(run, "lost", rank=0, ranks=1, host="y", reason="killed", lines=["the first failure"])
    assert runs.run_status(run)["last_lines"] == ["the first failure"]
    events.record(run, **later_event)
    events.record(run, "failed", reason="the data is damaged")
    assert runs.run_status(run)["last_lines"] == []
    _print_last_lines(run)
    assert capsys.readouterr().err == ""


def test_status_shows_the_newest_checkpoint_that_is_not_damaged(tmp_path, run):
    def checkpoint_row():
        [row] = [line for line in mhmoe(tmp_path, "status", COLUMNS="200").out.splitlines() if "checkpoint" in line]
        return re.sub(r", \d+ s ago", "", row.removeprefix("checkpoint").strip())

    events.record(run, "checkpoint", name="step_00000010.1", step=10, pause=0.0, seconds=0.0)
    events.record(run, "checkpoint", name="step_00000020.1", step=20, pause=0.0, seconds=0.0)
    assert checkpoint_row() == "step_00000020.1"
    # An older version of this project recorded the path, and each restart of the workers records the event again.
    for name in ("checkpoint /runs/a-1/checkpoints/step_00000020.1", "step_00000020.1"):
        events.record(run, "skipped_checkpoint", name=name, reason="it is torn")
    assert checkpoint_row() == "step_00000010.1; 1 newer ones were damaged and skipped"
    events.record(run, "checkpoint", name="step_00000020.2", step=20, pause=0.0, seconds=0.0)
    assert checkpoint_row() == "step_00000020.2"


def test_status_shows_applications_of_a_cluster_that_is_gone(tmp_path, run, unused_address):
    application = {"application": "mhmoe", "url": "http://127.0.0.1:8000", "address": unused_address}
    events.record(run, "served", **application, checkpoint="step_00000007.1")
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "http://127.0.0.1:8000 (mhmoe, step_00000007.1): unknown: nothing answers there" in output


def test_watch_without_a_terminal_prints_a_line_at_each_change(tmp_path, run):
    watching = subprocess.Popen(command("status", "--watch"), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert watching.stdout.readline() == f"{run.id}: unknown  step 7/20  loss 2.5000\n"
    history.append(run, {**history.last_line(run), metrics.STEP: 8})
    assert watching.stdout.readline() == f"{run.id}: unknown  step 8/20  loss 2.5000\n"
    events.record(run, "finished", step=8)
    assert watching.communicate(timeout=60)[0] == f"{run.id}: finished  step 8/20  loss 2.5000\n"
    assert watching.returncode == 0


@pytest.mark.long
def test_watch_on_a_terminal_of_80_columns_redraws_until_the_end(tmp_path, run):
    words = command("status", "--watch")
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)
    watching = pexpect.spawn(words[0], words[1:], cwd=tmp_path, dimensions=(40, 80), env=environment, encoding="utf-8")
    watching.expect_exact("7 of 20 (35%)", timeout=60)
    history.append(run, {**history.last_line(run), metrics.STEP: 8})
    watching.expect_exact("8 of 20 (40%)", timeout=60)
    events.record(run, "finished", step=8)
    watching.expect_exact(f"{run.id}: finished", timeout=60)
    watching.expect(pexpect.EOF, timeout=60)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", watching.before).splitlines()
    assert max(map(len, lines)) <= 80
    watching.close()
    assert watching.exitstatus == 0


def test_resume_refuses_a_run_that_may_still_train(tmp_path, run):
    assert_one_line(mhmoe(tmp_path, "resume"), 7, "its cluster does not answer", "wrote something", "or force it")
    assert len(events.read(run)) == 2


@pytest.mark.ray
def test_resume_fails_if_its_token_is_refused(tmp_path, run, local_cluster):
    home = {"MHMOE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    add_attempt(run, Attempt("job-2", local_cluster.address, local=False))
    for path in (run.events_file, run.metrics_file):
        os.utime(path, (time.time() - 10_000,) * 2)
    assert_one_line(mhmoe(tmp_path, "resume", **home), 6, local_cluster.address)


def test_eval_refuses_useless_options_and_dense_runs(tmp_path, run):
    for words, option in [(("--samples", "5"), "--text"), (("--limit", "5"), "--tasks"), (("--set", "a=1"), "--text")]:
        result = mhmoe(tmp_path, "eval", run.id, *words)
        assert result.code == 2
        assert f"{option}: name some" in " ".join(result.err.split())
    assert_one_line(mhmoe(tmp_path, "eval", run.id), 8, "it has no checkpoint yet")
    dense_run = create_run(tiny_spec(tmp_path, model={"moe": None}))
    add_attempt(dense_run, Attempt("job-2", "http://127.0.0.1:1", local=True))
    assert_one_line(mhmoe(tmp_path, "routing", dense_run.id), 7, "it is a dense model, without a router")
    assert_one_line(mhmoe(tmp_path, "report", dense_run.id), 7, "none of the runs has numbers yet")


def test_reason_with_brackets_is_shown_unchanged(tmp_path, run):
    """Errors of Ray, torch and gloo have text in brackets, which rich could take for its markup."""
    reason = "worker 0: [/third_party/gloo/pair.cc:525] Connection closed by peer; [enforce fail at x] :warning:"
    events.record(run, "failed", reason=reason)
    result = mhmoe(tmp_path, "status", COLUMNS="300")
    assert result.code == 0, result.err
    assert reason in result.out


def test_run_of_another_version_does_not_hide_other_runs(tmp_path, run):
    other_run = create_run(tiny_spec(tmp_path))
    add_attempt(other_run, Attempt("job", "http://x", local=True))
    other_run.spec_file.write_text("model: {from: the future}\n")
    states = {r["run"]: r["state"] for r in mhmoe(tmp_path, "list", "--json").json()}
    assert states == {run.id: "unknown", other_run.id: "unreadable spec"}
    assert "unreadable spec" in mhmoe(tmp_path, "list").out


@pytest.fixture
def ended_run(tmp_path, run):
    """Return a second run in the same storage, which has failed."""
    return add_failed_run(tmp_path, "other")


def add_failed_run(folder, name):
    """Create a run that has failed, and return it."""
    run_dir = create_run(tiny_spec(folder).model_copy(update={"name": name}))
    add_attempt(run_dir, Attempt("job-2", "http://127.0.0.1:1", local=True))
    events.record(run_dir, "failed", reason="it did")
    return run_dir


def test_runs_are_listed_by_name_state_and_age(tmp_path, run, ended_run):
    def listed_ids(*words):
        return [r["run"] for r in mhmoe(tmp_path, "list", "--json", *words).json()]

    assert listed_ids() == [run.id, ended_run.id]
    assert listed_ids("tin") == [run.id]
    assert listed_ids("--state", "failed") == [ended_run.id]
    assert listed_ids("--state", "failed", "--state", "unknown") == [run.id, ended_run.id]
    assert listed_ids("--since", "1h") == [run.id, ended_run.id]
    assert listed_ids("--since", "2100-01-01") == []
    assert mhmoe(tmp_path, "list", "nothing").out == "no runs in runs match the filters\n"
    result = mhmoe(tmp_path, "list", "--since", "soon")
    assert (result.code, "it is no time" in result.err) == (2, True)


def test_list_shows_whole_ids_in_a_narrow_terminal(tmp_path):
    failed_run = add_failed_run(tmp_path, "a-name-as-long-as-names-of-runs-in-sweeps-are")
    assert failed_run.id in mhmoe(tmp_path, "list", COLUMNS="80").out


def test_rm_of_a_run_without_its_cluster_needs_quiet_or_force(tmp_path, run, ended_run):
    assert_one_line(mhmoe(tmp_path, "rm", run.id, "--yes"), 7, "its cluster does not answer", "or force it")
    os.utime(run.metrics_file, (time.time() - 10_000,) * 2)
    assert_one_line(mhmoe(tmp_path, "rm", run.id, "--yes"), 7, "its cluster does not answer", "or force it")
    os.utime(run.events_file, (time.time() - 10_000,) * 2)
    assert mhmoe(tmp_path, "rm", run.id, "--yes").code == 0
    events.record(ended_run, "submitted", attempt=2, job="job-3", address="http://127.0.0.1:1")
    assert_one_line(mhmoe(tmp_path, "rm", ended_run.id, "--yes"), 7, "or force it")
    assert mhmoe(tmp_path, "rm", ended_run.id, "--yes", "--force").code == 0
    assert not list((tmp_path / "runs").iterdir())


def test_sweep_treats_a_quiet_run_without_its_cluster_as_failed(run, ended_run):
    """Otherwise a sweep would wait forever for such a run."""
    assert outcome_or_lost(ended_run, connect).reason == "it did"
    with pytest.raises(ClusterError, match="nothing answers there"):
        outcome_or_lost(run, connect)
    for file in (run.metrics_file, run.events_file):
        os.utime(file, (time.time() - 10_000,) * 2)
    assert outcome_or_lost(run, connect).state == "failed"
    assert "does not answer any more" in outcome_or_lost(run, connect).reason


def test_rm_of_ended_runs_needs_a_confirmation(tmp_path, run, ended_run):
    assert_one_line(mhmoe(tmp_path, "rm", ended_run.id), 7, "--yes")
    assert_one_line(mhmoe(tmp_path, "rm", ended_run.id, run.id, "--yes"), 7, run.id)
    assert ended_run.path.exists()
    # A run that is named twice, by its id and its path, is removed once, and the run after it is removed, too.
    runs = [add_failed_run(tmp_path, name) for name in ("twice", "last")]
    names = [runs[0].id, str(runs[0].path), runs[1].id]
    answer = mhmoe(tmp_path, "rm", *names, "--yes")
    assert (answer.code, answer.out.splitlines()) == (0, [f"removed {run.id}" for run in runs])
    words = command("rm", ended_run.id)
    for answer in ("n", "y"):
        terminal = pexpect.spawn(words[0], words[1:], cwd=tmp_path, encoding="utf-8")
        terminal.expect_exact(f"remove {ended_run.id}, with all checkpoints?", timeout=60)
        assert ended_run.path.exists()
        terminal.sendline(answer)
        terminal.expect(pexpect.EOF, timeout=60)
        terminal.close()
        assert terminal.exitstatus == 0
    assert not ended_run.path.exists()
    assert run.path.exists()


def test_shell_completes_runs_and_keys(tmp_path, run, ended_run):
    def completions(line):
        environment = {"_MHMOE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        script = Path(sys.executable).parent / "mhmoe"
        process = subprocess.run(
            [script], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True
        )
        return process.stdout.split()

    assert completions("mhmoe status ") == [ended_run.id, run.id]
    assert completions("mhmoe logs ti") == [run.id]
    assert completions("mhmoe sta") == ["status"]
    assert completions("mhmoe plan x.yaml --set train.l") == ["train.loss_chunk_rows=", "train.lr="]
    assert completions("mhmoe plan x.yaml --set p") == ["preset="]
    assert "match.by=" in completions("mhmoe plan x.yaml --set ma")
    assert "model.moe.experts=" in completions("mhmoe submit x.yaml --set model.moe.e")
