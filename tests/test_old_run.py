"""Tests that a run of an earlier version can be resumed and served, with the results that that version had."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.cli.run import mhmoe

pytestmark = pytest.mark.ray

FIXTURE = Path(__file__).parent / "fixtures" / "old_run"
RUN = "old-ea8ec3"
FOLDER = "/tmp/old-run"
"""Folder that the run was made in; its spec has paths below it."""
TOLERANCES = {"loss": 1e-4, "val_loss": 1e-4, "lr": 1e-9, "grad_norm": 1e-2}
"""Tolerances of metrics; all others must be equal. CPUs add in different orders, which changes gradients most."""
LOGPROB_TOLERANCE = 1e-3


class Resumed(NamedTuple):
    """The earlier version's run after its resumption."""

    project: Path
    """Project folder with the run."""
    expected: dict[str, Any]
    """Metrics and answers of the earlier version, from expected.json."""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, local_cluster):
    """Copy the run and its prepared data to a new folder, resume it to its end, and return it."""
    project = tmp_path_factory.mktemp("old")
    shutil.copytree(FIXTURE / "prepared", project / "prepared")
    shutil.copytree(FIXTURE / RUN, project / "runs" / RUN)
    # Only the spec says where a run and its prepared data lie, so their paths are changed there. The path of the raw
    # text must stay, because the manifest of the data contains it, and checkpoints contain the digest of that manifest.
    spec = project / "runs" / RUN / "spec.yaml"
    text = spec.read_text()
    for part in ("runs", "prepared"):
        assert f" {FOLDER}/{part}\n" in text
        text = text.replace(f" {FOLDER}/{part}\n", f" {project / part}\n")
    spec.write_text(text)
    result = mhmoe(project, "resume", RUN)
    assert result.code == 0, result.err
    assert result.out.endswith(f"run {RUN} finished at step 40\n")
    return Resumed(project, json.loads((FIXTURE / "expected.json").read_text()))


def test_resumed_steps_have_the_metrics_of_the_earlier_version(resumed):
    lines = (resumed.project / "runs" / RUN / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][-len(resumed.expected["steps"]) :]
    for step, expected in zip(steps, resumed.expected["steps"], strict=True):
        for key, value in expected.items():
            tolerance = TOLERANCES.get(key)
            assert step[key] == (value if tolerance is None else pytest.approx(value, abs=tolerance)), step["step"]


@pytest.mark.slow
def test_served_completion_equals_that_of_the_earlier_version(resumed):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    deployed = mhmoe(resumed.project, "serve", "deploy", RUN, "--name", "old", "--set", f"serve.port={port}")
    assert deployed.code == 0, deployed.err
    try:
        # The URL is read from the output, because its port may be another one: on a cluster that has served before,
        # Serve keeps its port.
        url = re.search(r" at (http://\S+/v1/completions);", deployed.out)[1]
        answer = httpx.post(url, json=resumed.expected["asked"], timeout=60)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
    finally:
        assert mhmoe(resumed.project, "serve", "down", "old").code == 0
    assert choice["text"] == resumed.expected["text"]
    assert choice["logprobs"]["tokens"] == resumed.expected["tokens"]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert logprobs == pytest.approx(resumed.expected["token_logprobs"], abs=LOGPROB_TOLERANCE)
