"""Tests that commands say on a terminal what they do now, and for how long, and in logs only what changes."""

import json
import re
import shlex

import pytest

from mhmoe_ray.cli import output
from mhmoe_ray.cli.output import ActivityLines, print_note
from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.terminal import Activity
from tests.cli.conftest import write_spec
from tests.cli.run import command, mhmoe
from tests.data.texts import write_corpus
from tests.support.terminal import record

MAX_SILENCE = 3.0
"""Longest time in seconds that users wait without a sign of life.

A thread draws the lines four times a second and waits only for the interpreter lock, which an import of a compiled
module holds for some tenths of a second. Time that the process waits for a processor does not count (`record`).
"""
COMMANDS = {
    "inspect": ("data", "inspect", "raw"),
    "plan": ("plan", "spec.yaml"),
    "prepare": ("data", "prepare", "spec.yaml"),
    "submit": ("submit", "spec.yaml"),
    "status": ("status",),
    "eval": ("eval",),
    "report": ("report",),
    "export": ("ckpt", "export", "--to", "exported"),
    "verify": ("ckpt", "verify"),
    "import": ("ckpt", "import", "exported", "--name", "imported", "--storage", "imports"),
    "generate": ("generate", "--prompt", "the moon", "--max-tokens", "8"),
    "deploy": ("serve", "deploy", "--set", "serve.port=PORT"),
    "down": ("serve", "down"),
    "resume": ("resume", "--until", "40"),
}
"""Commands in an order in which each finds what it needs."""
ACTIVITIES = {
    "inspect": ("looking for the data", "connecting to the cluster", "submitting the job", "inspect: read"),
    "prepare": ("submitting the job", "waiting for the job to start", "preparing data: "),
    "submit": (
        "checking the spec",
        "submitting the job",
        "waiting for the job to start",
        "starting workers",
        "training: ",
    ),
    "eval": (
        "looking for the checkpoint",
        "submitting the job",
        "waiting for the job to start",
        "eval: loading step_",
        "eval: web/a ",
    ),
    "report": ("reading the runs",),
    "export": ("verifying the checkpoint", "exporting step_"),
    "verify": ("verifying ",),
    "import": ("importing exported",),
    "generate": ("loading modules", "loading step_", "generating the answer"),
    "deploy": ("looking for the checkpoint", "deploying step_", "waiting: application mhmoe is DEPLOYING"),
    "down": ("connecting to the cluster", "waiting until application mhmoe finishes its requests"),
    "resume": ("looking for the newest checkpoint", "submitting the job", "training: 30 of 40 steps"),
}
"""Activities in the order in which a command shows them; it may show others in between."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with raw text and a spec."""
    folder = tmp_path_factory.mktemp("terminal")
    write_corpus(folder / "raw")
    write_spec(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(project, lane_home):
    """Run all commands on terminals, and return their recordings by name."""
    port = str(free_ports(1)[0])
    return {
        name: record(project, command(*(word.replace("PORT", port) for word in words)))
        for name, words in COMMANDS.items()
    }


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_is_silent_on_a_terminal(recordings, name):
    recording = recordings[name]
    assert recording.code == 0, recording.text
    assert recording.longest_silence < MAX_SILENCE, recording.text_before
    recording.assert_clean_end()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ACTIVITIES)
def test_lines_name_the_activity_and_its_time(recordings, name):
    frames = recordings[name].frames
    assert all(re.match(r"\d+:\d\d ([a-z]+ing\b|eval: |inspect: )", frame) for frame in frames), set(frames)
    texts = [frame.partition(" ")[2] for frame in frames]
    positions = [next(i for i, text in enumerate(texts) if text.startswith(a)) for a in ACTIVITIES[name]]
    assert positions == sorted(positions)


@pytest.mark.slow
@pytest.mark.ray
def test_resumed_run_starts_at_its_step(recordings):
    steps = [int(step) for step in re.findall(r"training: (\d+) of 40 steps", recordings["resume"].text)]
    assert steps[0] == 30
    assert steps == sorted(steps)


@pytest.mark.slow
@pytest.mark.ray
def test_clock_goes_on_while_a_job_starts(recordings):
    seconds = [int(s) for s in re.findall(r"0:(\d\d) waiting for the job to start", recordings["submit"].text)]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)


@pytest.mark.slow
@pytest.mark.ray
def test_interrupted_command_leaves_a_clean_terminal(project, recordings):
    try:
        recording = record(project, command("resume", "--until", "4000"), interrupt_at="of 4,000 steps")
    finally:
        stopping = mhmoe(project, "stop", "--now")
    assert recording.code == 0
    assert "detached; the run goes on" in recording.text
    recording.assert_clean_end()
    assert stopping.code == 0


@pytest.mark.slow
@pytest.mark.ray
def test_logs_have_no_line_twice_and_results_are_apart(project, recordings):
    for words in (("eval", "--again", "--json"), ("data", "inspect", "raw", "--json")):
        result = mhmoe(project, *words)
        assert result.json()
        lines = result.err.splitlines()
        assert len(lines) == len(set(lines))
        assert "\x1b" not in result.err


@pytest.mark.long
def test_failed_command_leaves_a_clean_terminal(tmp_path):
    recording = record(tmp_path, command("eval", "missing"))
    assert recording.code == 7
    assert recording.text.splitlines()[-1].startswith("error: run missing: there is no such run")
    recording.assert_clean_end()


@pytest.mark.long
def test_result_in_a_file_is_apart_from_the_lines_on_the_terminal(project):
    recording = record(project, ["sh", "-c", f"{shlex.join(command('plan', 'spec.yaml', '--json'))} > plan.json"])
    assert recording.code == 0
    assert json.loads((project / "plan.json").read_text())
    assert {frame.partition(" ")[2] for frame in recording.frames} == {"planning"}


@pytest.mark.long
def test_names_in_activities_do_not_control_the_terminal(tmp_path):
    text = record(tmp_path, command("ckpt", "import", "\x1b]0;title\x07")).text
    assert r"importing \x1b]0;title" in text
    assert "\x1b]" not in text


def test_log_has_a_line_when_words_change_or_time_has_passed(capsys, monkeypatch):
    monkeypatch.setattr(output, "activity_lines", ActivityLines())
    for _ in range(7):
        print_note(Activity("preparing data:", "training the tokenizer"))
    print_note(Activity("connecting to the cluster"))
    for shard_count in range(1, 5):
        print_note(Activity("preparing data:", f"packing {shard_count} of 4 shards", shard_count, 4))
    for _ in range(2):
        monkeypatch.setattr(output, "LINE_SECONDS", 0.0)
        print_note(Activity("preparing data:", "packing 5 of 6 shards", 5, 6))
    assert capsys.readouterr().err.splitlines() == [
        "preparing data: training the tokenizer",
        "preparing data: packing 1 of 4 shards",
        "preparing data: packing 4 of 4 shards",
        "preparing data: packing 5 of 6 shards",
    ]


def test_remaining_time_counts_from_the_first_amount():
    """A resumed run is not estimated to have done its earlier steps within this command."""
    lines, current_time = ActivityLines(), 100.0
    lines.get_time = lambda: current_time
    lines.show(Activity("training:", "20 of 40 steps", 20, 40))
    for step in (22, 24, 26):
        current_time += 4
        task = lines.show(Activity("training:", f"{step} of 40 steps", step, 40))
    assert output._describe(task) == "training: 26 of 40 steps, 0:28 left"
