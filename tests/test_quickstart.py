"""Tests of the quickstart and of the commands that the READMEs show, in a folder of their own.

The quickstart starts the local cluster of its lane (a worker process of pytest-xdist), and leaves it running for later
tests.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import list_runs
from tests.cli.audit import assert_samples_in_order
from tests.cli.run import mhmoe
from tests.support.watch import newest_run, start_events, step_of, wait_until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent


def run_quickstart(folder: Path, *overrides: str, **env: str) -> str:
    """Run jobs/quickstart.py in `folder`, assert that it succeeds, and return what it prints.

    Args:
        folder: The folder that has the project's jobs.
        overrides: Keys of the spec to replace, as `key=value`.
        env: Environment variables to add.
    """
    process = subprocess.run(
        [sys.executable, "jobs/quickstart.py", *overrides],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120", **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory, lane_home):
    """Return a new folder with a copy of the project's jobs, and a file of prompts."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    (folder / "prompts.jsonl").write_text('{"prompt": "Fellow citizens"}\n')
    return folder


@pytest.fixture(scope="module")
def first_output(project):
    """Yield the output of a quickstart of 60 steps instead of 700; its cluster is left running."""
    steps = ("train.steps=60", "train.warmup_steps=10", "train.validate_every=60", "train.checkpoint_every=30")
    yield run_quickstart(project, *steps, KEEP="1")
    # Later tests of this lane serve on other ports. The commands of the README, if they ran, have ended the server.
    if mhmoe(project, "serve", "status", "--json").json():
        assert mhmoe(project, "serve", "down").code == 0


@pytest.fixture(scope="module")
def readme(project, first_output):
    """Run the commands of cli/README.md in order, assert that each succeeds, and return the results by subcommand.

    `extended` is the result of `mhmoe resume --until`, `stopped` the JSON of `mhmoe status` after `mhmoe stop`, and
    `evaluated` the JSON of a second `mhmoe eval`.
    """
    block = re.search(r"```sh\n(.*?)```", (ROOT / "mhmoe_ray/cli/README.md").read_text(), re.S)[1]
    results = {}
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "mhmoe"
        # Wait for a step, because a run that is stopped before it trains has no checkpoint to resume from.
        if words == ["stop"]:
            wait_until(lambda: step_of(newest_run(project)), "a step")
        key = "extended" if words[:2] == ["resume", "--until"] else words[0]
        results[key] = result = mhmoe(project, *words, COLUMNS="120")
        assert result.code == 0, (line, result)
        if words == ["stop"]:
            results["stopped"] = mhmoe(project, "status", "--json")
        if words == ["eval"]:
            results["evaluated"] = mhmoe(project, "eval", "--json")
    return results


def printed_losses(printed: str) -> tuple[float, float, float]:
    """Return the last validation loss, the unigram entropy and the bigram loss that a quickstart printed."""
    loss = re.search(r"validation +loss ([\d.]+), perplexity [\d.,]+, at step", printed)[1]
    baselines = re.search(r"([\d.]+) unigram entropy of that text, +([\d.]+) bigram", printed).groups()
    return tuple(map(float, (loss, *baselines)))


def test_quickstart_learns_and_prints_both_baselines(project, first_output):
    loss, unigram, bigram = printed_losses(first_output)
    assert 0 < loss < unigram - 0.2
    assert 0 < bigram < unigram
    run, *_ = list_runs(project / "runs")
    for part in (f"run directory  {run.path}", "dashboard      http://127.0.0.1:", "ask it         curl http://"):
        assert part in first_output
    assert_samples_in_order(run)


def test_every_expert_got_tokens_and_was_trained(project, first_output):
    run, *_ = list_runs(project / "runs")
    spec = run.spec()
    routes = [json.loads(p.read_text())["routes_per_layer_and_expert"] for p in run.routing.iterdir()]
    counts = torch.tensor(routes).sum(0)
    assert counts.shape == (spec.model.moe_layers, spec.model.moe.experts)
    assert (counts > 0).all()
    h_k = spec.model.moe.heads * spec.model.moe.top_k
    assert (counts.sum(1) == spec.train.steps * spec.tokens_per_step * h_k).all()
    trained, _ = load_model(run.checkpoints / sorted(p.name for p in run.checkpoints.iterdir())[-1])
    fresh = Decoder(spec.model)
    init_weights(fresh, spec.seed)
    for (name, trained_weight), initial_weight in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        if ".experts." in name:
            new_EW, old_EW = trained_weight.flatten(1), initial_weight.flatten(1)
            # Only the change perpendicular to the old weights counts, because weight decay alone would shrink an
            # expert.
            along_E1 = (new_EW * old_EW).sum(1, keepdim=True) / old_EW.square().sum(1, keepdim=True)
            turned_E = (new_EW - along_E1 * old_EW).norm(dim=1) / old_EW.norm(dim=1)
            assert (turned_E > 0.1).all(), name


def test_printed_curl_command_is_answered(first_output):
    url, body = re.search(r"ask it +curl (http://\S+) .* -d '(.*)'", first_output).groups()
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= 16
    assert answer.json()["choices"][0]["text"].strip()


@pytest.mark.slow
def test_commands_of_the_readme_succeed_in_their_order(readme):
    assert len(readme) > 8


@pytest.mark.slow
def test_stopped_run_resumes_at_its_step_with_fewer_workers(project, readme):
    _, run, *_ = list_runs(project / "runs")
    stopped_status, steps = readme["stopped"].json(), run.spec().train.steps
    assert steps == 60
    stop_step = stopped_status["last"]["step"]
    assert 1 <= stop_step < 40
    assert readme["stop"].out == f"run {run.id} stopped\n"
    assert (stopped_status["run"], stopped_status["state"], stopped_status["checkpoint"]["step"]) == (
        run.id,
        "stopped",
        stop_step,
    )
    assert [len(event["workers"]) for event in start_events(run)] == [2, 1, 1]
    assert f"training from step {stop_step} on 1 worker, dp 1 x ep 1" in readme["resume"].err
    assert "training from step 40 on 1 worker," in readme["extended"].err
    assert_samples_in_order(run)
    assert history.last_line(run)[metrics.TOKENS] == steps * run.spec().tokens_per_step


@pytest.mark.slow
def test_eval_of_the_readme_equals_the_last_validation(project, readme):
    _, run, *_ = list_runs(project / "runs")
    evaluated, last_line = readme["evaluated"].json()["figures"], history.last_line(run)
    total = evaluated["total"]["all"]
    assert total["loss"] == pytest.approx(last_line[metrics.VAL_LOSS], rel=1e-6)
    assert total["tokens"] == last_line["val_tokens"]
    prepared = read_data_manifest(run.spec().data.prepared).domains
    assert evaluated["domains"].keys() == {name for name in prepared if prepared[name].validation_samples}
    assert "bits/byte" in readme["eval"].out
    assert "it was evaluated before" in readme["evaluated"].err
    # `routing` made no second evaluation, because `eval` also counts the routes that `routing` shows.
    assert len(list((run.path / "evaluations").iterdir())) == 1


@pytest.mark.slow
def test_full_quickstart_ends_below_the_bigram_loss(project, readme):
    loss, _, bigram = printed_losses(run_quickstart(project))
    assert loss < bigram


@pytest.mark.slow
def test_second_quickstart_leaves_a_cluster_that_it_did_not_start(project, readme):
    run_count = len(list_runs(project / "runs"))
    printed = run_quickstart(project, "train.steps=10")
    assert "finished" in printed
    assert len(list_runs(project / "runs")) == run_count + 1
    assert mhmoe(project, "cluster", "status", "--json").json() is not None


def test_readme_and_makefile_name_the_same_targets():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", readme, re.M))
    assert {"quickstart", "test", "soak-train"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile, target
