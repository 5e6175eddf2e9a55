"""Commands on run directories whose cluster is gone."""

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

from mhmoe_ray.cli.follow import _bar, _View
from mhmoe_ray.cluster import runs
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.cluster.runs import outcome, outcome_or_gone
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.cli.run import assert_one_line, command, mhmoe
from tests.specs import tiny_spec

HUNG = {"rank": 0, "pid": 3, "host": "x", "step": 7, "doing": "training", "seconds": 9.0, "silent": False}


@pytest.fixture
def nobody():
    """Yield an address where nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def run(tmp_path, nobody):
    made = create_run(tiny_spec(tmp_path))
    add_attempt(made, Attempt("job-1", nobody, local=True))
    events.record(made, "submitted", attempt=1, job="job-1", address=nobody)
    events.record(
        made, "started", group=1, step=0, dp=1, ep=1, groups=[[0]], straddling_groups=0, workers=[{"host": "x"}]
    )
    line = {metrics.STEP: 7, metrics.GROUP: 1, metrics.LOSS: 2.5, metrics.TOKENS: 70, metrics.TOKENS_PER_S: 9.0}
    history.append(made, {**line, metrics.DATA_WAIT: 0.0, metrics.TIME: 1000.0})
    return made


def test_a_run_whose_cluster_does_not_answer_is_not_called_running(tmp_path, run):
    status = mhmoe(tmp_path, "status", "--json").json()
    assert status["state"] == "unknown"
    assert "it said running last, but" in status["cluster"]
    assert status["last"]["step"] == 7
    assert mhmoe(tmp_path, "status").out.startswith(f"{run.id}: unknown")


def test_status_shows_what_ranks_exchanged_where_they_did(tmp_path, run):
    assert "exchange" not in mhmoe(tmp_path, "status").out
    sent = {metrics.ROWS_SENT: 3_000_000, metrics.ROWS_LEAST: 2_000_000, metrics.COUNTS_SENT: 320}
    history.append(run, {**history.last(run), metrics.STEP: 8, **sent})
    shown = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "3 MB of rows between ranks in a step, 1.50 times the least; 320 B of counts" in shown
    events.record(run, "started", group=1, step=0, workers=[], dp=1, ep=4, straddling_groups=1, dispatch="hierarchical")
    history.append(run, {**history.last(run), metrics.STEP: 9, metrics.ROWS_BETWEEN_NODES: 1_000_000})
    shown = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert (
        "3 MB of rows between ranks in a step (1 MB between nodes), 1.50 times what flat dispatch would send" in shown
    )


def test_a_balance_that_was_not_finite_is_said(tmp_path, run):
    last = {**history.last(run), metrics.STEP: 8, metrics.BALANCE: float("nan"), metrics.LEAST_EXPERT: 0.5}
    history.append(run, last)
    shown = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "not finite (1 is uniform); the least used expert has 0.50 of its share" in shown
    with _bar() as bar:
        view = _View(run, bar, from_now=False)
        view.refresh()
    assert "balance not finite" in bar.tasks[0].fields["figures"]


def test_who_follows_a_run_is_told_of_all_that_happens_to_it(run, capsys):
    workers = [{"host": "x"}, {"host": "y"}]
    events.record(run, "hung", **HUNG)
    events.record(run, "lost", rank=0, ranks=2, host="x", reason="killed", lines=[])
    events.record(run, "skipped_checkpoint", name="step_00000007.1", reason="it is torn")
    events.record(run, "started", group=2, step=5, dp=1, ep=2, groups=[[0, 1]], straddling_groups=1, workers=workers)
    events.record(run, "preempted", step=7, nodes=["n1"], deadline=None)
    history.append(run, {**history.last(run), metrics.STEP: 8, metrics.SKIPPED: True, metrics.VAL_LOSS: 2.25})
    with _bar() as bar:
        _View(run, bar, from_now=False).refresh()
    assert capsys.readouterr().err.splitlines() == [
        "training from step 0 on 1 workers, dp 1 x ep 1",
        "warning: rank 0 (process 3 on x) made no progress for 9 s, training after step 7; it was ended",
        "warning: rank 0 on x failed, and 1 other with it: killed",
        "warning: step_00000007.1: it is torn; the one before is used",
        "training from step 5 on 2 workers, dp 1 x ep 2, start 2 of the workers",
        "warning: 1 expert-parallel groups lie on more than one node",
        "node n1 is taken away; saved at step 7, starting elsewhere or smaller",
        "step 8: validation loss 2.2500, loss 2.5000  9 tok/s",
        "warning: step 8 updated nothing: its gradient was not finite",
    ]


def test_status_counts_steps_that_updated_nothing_and_routes_that_were_dropped(tmp_path, run):
    routing = {metrics.BALANCE: 1.0, metrics.LEAST_EXPERT: 0.5, metrics.DROPPED: 0.125}
    history.append(run, {**history.last(run), metrics.SKIPPED_STEPS: 2, **routing})
    shown = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "2, whose gradient was not finite" in shown
    assert "12.50% of routes" in shown


def test_a_list_asks_each_cluster_once_and_waits_for_no_job_that_ended_long_ago(tmp_path, run, monkeypatch):
    asked = Counter()

    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            job = {"status": "FAILED", "message": "killed", "end_time": 1_000_000}
            told = (
                {"ray_version": "2"}
                if "version" in self.path
                else {"data": {"summary": [], "nodeLogicalResources": {}}}
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(job if "jobs" in self.path else told).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        others = [create_run(tiny_spec(tmp_path)) for _ in range(3)]
        for other in others:
            add_attempt(other, Attempt("job-1", address, local=False))
        try:
            with monkeypatch.context() as patch:  # it does not wait until it is sure
                patch.setattr(runs.time, "sleep", lambda seconds: pytest.fail("it waits"))
                assert outcome(others[0], connect(address)).reason == "its job ended (failed): killed"
            asked.clear()
            states = [r["state"] for r in mhmoe(tmp_path, "list", "--json").json()]
        finally:
            server.shutdown()
            thread.join()
    assert states == ["unknown", *["failed"] * 3]
    assert asked == {"/api/version": 1, "/nodes?view=summary": 1, "/api/jobs/job-1": 3}


def test_status_has_the_mean_speed_over_steps_of_unequal_tokens(tmp_path, run):
    assert mhmoe(tmp_path, "status", "--json").json()["tokens_per_s"] is None
    for step, tokens, rate in ((8, 80, 10.0), (9, 140, 20.0)):  # in 1 and in 3 seconds
        steps = {metrics.STEP: step, metrics.TOKENS: tokens, metrics.TOKENS_PER_S: rate}
        history.append(run, {**history.last(run), **steps})
    assert mhmoe(tmp_path, "status", "--json").json()["tokens_per_s"] == 70 / 4


def test_status_tells_what_interrupted_a_run_and_the_last_lines_of_the_worker_that_failed(tmp_path, run):
    lost = {"host": "y", "lines": ["Fatal Python error: Segmentation fault", "  File [x]"]}
    events.record(run, "hung", **HUNG)
    events.record(run, "lost", rank=0, ranks=2, reason="killed", **lost)  # since the watchdog ended it
    events.record(run, "lost", rank=1, ranks=2, reason="its process is gone: crashed", **lost)
    told = mhmoe(tmp_path, "status", "--json").json()
    assert [i["what"].split()[0:2] for i in told["interruptions"]] == [["rank", "0"], ["rank", "1"]]
    shown = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "2 times; last" in shown
    assert "s ago: rank 1 on y failed, and 1 other with it: its process is gone: crashed" in shown
    assert "Segmentation fault" not in shown
    events.record(run, "failed", reason="worker 1 failed")
    assert "Fatal Python error: Segmentation fault\n  File [x]" in mhmoe(tmp_path, "status").out


def test_status_says_where_a_run_was_served_when_that_cluster_is_gone(tmp_path, run, nobody):
    where = {"application": "mhmoe", "url": "http://127.0.0.1:8000", "address": nobody}
    events.record(run, "served", **where, checkpoint="step_00000007.1")
    shown = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "http://127.0.0.1:8000 (mhmoe, step_00000007.1): unknown: nothing answers there" in shown


def test_a_watch_without_a_terminal_gives_a_line_at_each_change_until_the_end(tmp_path, run):
    watching = subprocess.Popen(command("status", "--watch"), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert watching.stdout.readline() == f"{run.id}: unknown  step 7/20  loss 2.5000\n"
    history.append(run, {**history.last(run), metrics.STEP: 8})
    assert watching.stdout.readline() == f"{run.id}: unknown  step 8/20  loss 2.5000\n"
    events.record(run, "finished", step=8)
    assert watching.communicate(timeout=60)[0] == f"{run.id}: finished  step 8/20  loss 2.5000\n"
    assert watching.returncode == 0


@pytest.mark.long
def test_a_watch_on_a_terminal_of_80_columns_is_drawn_until_the_end(tmp_path, run):
    words = command("status", "--watch")
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)
    watching = pexpect.spawn(words[0], words[1:], cwd=tmp_path, dimensions=(40, 80), env=environment, encoding="utf-8")
    watching.expect_exact("7 of 20 (35%)", timeout=60)
    history.append(run, {**history.last(run), metrics.STEP: 8})
    watching.expect_exact("8 of 20 (40%)", timeout=60)
    events.record(run, "finished", step=8)
    watching.expect_exact(f"{run.id}: finished", timeout=60)
    watching.expect(pexpect.EOF, timeout=60)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", watching.before).splitlines()
    assert max(map(len, lines)) <= 80
    watching.close()
    assert watching.exitstatus == 0


def test_resume_does_not_start_a_second_trainer_beside_one_that_may_live(tmp_path, run):
    assert_one_line(mhmoe(tmp_path, "resume"), 7, "its cluster does not answer", "wrote something", "--force")
    assert len(events.events(run)) == 2


@pytest.mark.ray
def test_resume_does_not_guess_when_its_token_is_refused(tmp_path, run, local_cluster):
    home = {"MHMOE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    add_attempt(run, Attempt("job-2", local_cluster.address, local=False))
    for path in (run.events_file, run.metrics_file):
        os.utime(path, (time.time() - 10_000,) * 2)
    assert_one_line(mhmoe(tmp_path, "resume", **home), 6, local_cluster.address)


def test_evaluating_refuses_options_that_would_do_nothing_and_runs_without_experts(tmp_path, run):
    for words, about in [(("--samples", "5"), "--text"), (("--limit", "5"), "--tasks"), (("--set", "a=1"), "--text")]:
        refused = mhmoe(tmp_path, "eval", run.id, *words)
        assert refused.code == 2
        assert f"{about}: name some" in " ".join(refused.err.split())
    assert_one_line(mhmoe(tmp_path, "eval", run.id), 8, "it has no checkpoint yet")
    dense = create_run(tiny_spec(tmp_path, model={"moe": None}))
    add_attempt(dense, Attempt("job-2", "http://127.0.0.1:1", local=True))
    assert_one_line(mhmoe(tmp_path, "routing", dense.id), 7, "it is a dense model, without a router")
    assert_one_line(mhmoe(tmp_path, "report", dense.id), 7, "none of the runs has numbers yet")


def test_a_reason_with_brackets_is_shown_as_it_is(tmp_path, run):
    """Ray, torch and gloo put paths and hints in brackets, which a terminal library may take for its markup."""
    reason = "worker 0: [/third_party/gloo/pair.cc:525] Connection closed by peer; [enforce fail at x] :warning:"
    events.record(run, "failed", reason=reason)
    shown = mhmoe(tmp_path, "status", COLUMNS="300")
    assert shown.code == 0, shown.err
    assert reason in shown.out


def test_a_run_of_another_version_does_not_hide_the_others(tmp_path, run):
    other = create_run(tiny_spec(tmp_path))
    add_attempt(other, Attempt("job", "http://x", local=True))
    other.spec_file.write_text("model: {from: the future}\n")
    listed = {r["run"]: r["state"] for r in mhmoe(tmp_path, "list", "--json").json()}
    assert listed == {run.id: "unknown", other.id: "unreadable spec"}
    assert "unreadable spec" in mhmoe(tmp_path, "list").out


@pytest.fixture
def ended(tmp_path, run):
    """Return another run, which has ended."""
    made = create_run(tiny_spec(tmp_path).model_copy(update={"name": "other"}))
    add_attempt(made, Attempt("job-2", "http://127.0.0.1:1", local=True))
    events.record(made, "failed", reason="it did")
    return made


def test_runs_are_listed_by_name_state_and_age(tmp_path, run, ended):
    def listed(*words):
        return [r["run"] for r in mhmoe(tmp_path, "list", "--json", *words).json()]

    assert listed() == [run.id, ended.id]
    assert listed("tin") == [run.id]
    assert listed("--state", "failed") == [ended.id]
    assert listed("--state", "failed", "--state", "unknown") == [run.id, ended.id]
    assert listed("--since", "1h") == [run.id, ended.id]
    assert listed("--since", "2100-01-01") == []
    assert mhmoe(tmp_path, "list", "nothing").out == "no runs in runs that are so\n"
    wrong = mhmoe(tmp_path, "list", "--since", "soon")
    assert (wrong.code, "it is no time" in wrong.err) == (2, True)


def test_a_run_whose_cluster_is_gone_is_removed_once_it_is_quiet_or_by_force(tmp_path, run, ended):
    assert_one_line(mhmoe(tmp_path, "rm", run.id, "--yes"), 7, "its cluster does not answer", "--force")
    os.utime(run.metrics_file, (time.time() - 10_000,) * 2)
    assert_one_line(mhmoe(tmp_path, "rm", run.id, "--yes"), 7, "its cluster does not answer", "--force")
    os.utime(run.events_file, (time.time() - 10_000,) * 2)
    assert mhmoe(tmp_path, "rm", run.id, "--yes").code == 0
    events.record(ended, "submitted", attempt=2, job="job-3", address="http://127.0.0.1:1")
    assert_one_line(mhmoe(tmp_path, "rm", ended.id, "--yes"), 7, "--force")
    assert mhmoe(tmp_path, "rm", ended.id, "--yes", "--force").code == 0
    assert not list((tmp_path / "runs").iterdir())


def test_a_sweep_takes_a_run_whose_cluster_is_gone_for_over_once_it_is_quiet(run, ended):
    """A sweep would otherwise wait forever for such a run, even for one that has recorded its own end."""
    assert outcome_or_gone(ended, connect).reason == "it did"
    with pytest.raises(ClusterError, match="nothing answers there"):
        outcome_or_gone(run, connect)
    for file in (run.metrics_file, run.events_file):
        os.utime(file, (time.time() - 10_000,) * 2)
    assert outcome_or_gone(run, connect).state == "failed"
    assert "does not answer any more" in outcome_or_gone(run, connect).reason


def test_runs_that_are_over_are_removed_when_somebody_says_so(tmp_path, run, ended):
    assert_one_line(mhmoe(tmp_path, "rm", ended.id), 7, "--yes")
    assert_one_line(mhmoe(tmp_path, "rm", ended.id, run.id, "--yes"), 7, run.id)
    assert ended.path.exists()
    words = command("rm", ended.id)
    for answer in ("n", "y"):
        asking = pexpect.spawn(words[0], words[1:], cwd=tmp_path, encoding="utf-8")
        asking.expect_exact(f"remove {ended.id}, with all checkpoints?", timeout=60)
        assert ended.path.exists()
        asking.sendline(answer)
        asking.expect(pexpect.EOF, timeout=60)
        asking.close()
        assert asking.exitstatus == 0
    assert not ended.path.exists()
    assert run.path.exists()


def test_a_shell_is_offered_runs_and_keys(tmp_path, run, ended):
    def offered(line):
        asked = {"_MHMOE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        script = Path(sys.executable).parent / "mhmoe"
        done = subprocess.run([script], cwd=tmp_path, env={**os.environ, **asked}, capture_output=True, text=True)
        return done.stdout.split()

    assert offered("mhmoe status ") == [ended.id, run.id]
    assert offered("mhmoe logs ti") == [run.id]
    assert offered("mhmoe sta") == ["status"]
    assert offered("mhmoe plan x.yaml --set train.l") == ["train.lr="]
    assert offered("mhmoe plan x.yaml --set p") == ["preset="]
    assert "match.by=" in offered("mhmoe plan x.yaml --set ma")
    assert "model.moe.experts=" in offered("mhmoe submit x.yaml --set model.moe.e")
