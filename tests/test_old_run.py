"""A run that an earlier version began is resumed, and its result is served, as that version would have done."""

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
"""Folder in which the run lay when it was made."""
TOLERANCES = {"loss": 1e-4, "val_loss": 1e-4, "lr": 1e-9, "grad_norm": 1e-2}
"""Tolerances for differences between CPUs, whose order of addition is their own.

A gradient shows more of it than a loss.
"""
LOGPROB_TOLERANCE = 1e-3


class Resumed(NamedTuple):
    project: Path
    expected: dict[str, Any]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, local_cluster):
    """Return the run in a folder of its own, after `mhmoe resume`.

    A run may be moved with its prepared data: the spec says where both lie, and nothing else does. The place of the
    raw text stays as it was, since the data's manifest identifies the text by it, and checkpoints identify the manifest
    by its digest.
    """
    project = tmp_path_factory.mktemp("old")
    shutil.copytree(FIXTURE / "prepared", project / "prepared")
    shutil.copytree(FIXTURE / RUN, project / "runs" / RUN)
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


def test_each_further_step_has_the_numbers_that_the_earlier_version_measured(resumed):
    lines = (resumed.project / "runs" / RUN / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][-len(resumed.expected["steps"]) :]
    for step, expected in zip(steps, resumed.expected["steps"], strict=True):
        for key, value in expected.items():
            tolerance = TOLERANCES.get(key)
            assert step[key] == (value if tolerance is None else pytest.approx(value, abs=tolerance)), step["step"]


def test_its_result_answers_as_the_earlier_versions_did(resumed):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    deployed = mhmoe(resumed.project, "serve", "deploy", RUN, "--name", "old", "--set", f"serve.port={port}")
    assert deployed.code == 0, deployed.err
    try:
        # Not always at that port: on a cluster that has served before, Serve stays where it is.
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
