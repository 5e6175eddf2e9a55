"""The main job as README tells it, with a cluster and a folder of its own."""

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

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.layout import list_runs
from mhmoe_ray.runs.model import load_model
from tests.cli.audit import assert_read_as_ordered
from tests.cli.run import command

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent


class Home:
    """A folder with the project's jobs and a MHMOE_HOME."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        self.env = {**os.environ, "MHMOE_HOME": str(folder / "home"), "COLUMNS": "120"}

    def run(self, *words: str, **env: str) -> str:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**self.env, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def quickstart(self, *overrides: str, **env: str) -> str:
        return self.run(sys.executable, "jobs/quickstart.py", *overrides, **env)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = Home(tmp_path_factory.mktemp("quickstart"))
    yield made
    made.run(*command("cluster", "down"))


@pytest.fixture(scope="module")
def first(home):
    """What the first quickstart printed, a seventh as long as it is; its cluster and server are left running."""
    return home.quickstart("train.steps=100", "train.validate_every=50", "train.checkpoint_every=50", KEEP="1")


def losses(printed: str) -> tuple[float, float, float]:
    """Of the last validation, the unigram entropy and the bigram model."""
    loss = re.search(r"validation +loss ([\d.]+), perplexity [\d.,]+, at step", printed)[1]
    to_beat = re.search(r"([\d.]+) unigram entropy of that text, +([\d.]+) bigram", printed).groups()
    return tuple(map(float, (loss, *to_beat)))


def test_it_learns_and_prints_both_figures_to_beat(home, first):
    loss, unigram, bigram = losses(first)
    assert 0 < loss < unigram - 0.5
    assert 0 < bigram < unigram
    [run] = list_runs(home.folder / "runs")
    for part in (f"run directory  {run.path}", "dashboard      http://127.0.0.1:", "ask it         curl http://"):
        assert part in first
    assert_read_as_ordered(run)


def test_every_expert_got_tokens_and_changed(home, first):
    [run] = list_runs(home.folder / "runs")
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
    for (name, new), old in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        if ".experts." in name:
            new_EW, old_EW = new.flatten(1), old.flatten(1)
            # Weight decay alone would shrink an expert, so only what turned counts.
            along_E1 = (new_EW * old_EW).sum(1, keepdim=True) / old_EW.square().sum(1, keepdim=True)
            turned_E = (new_EW - along_E1 * old_EW).norm(dim=1) / old_EW.norm(dim=1)
            assert (turned_E > 0.1).all(), name


def test_the_curl_line_it_prints_is_answered(home, first):
    url, body = re.search(r"ask it +curl (http://\S+) .* -d '(.*)'", first).groups()
    answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= 32
    assert answer.json()["choices"][0]["text"].strip()


def test_readmes_commands_run_in_the_order_it_gives_them(home, first):
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) > 8
    home.run(*command("serve", "down"))
    for program, *words in commands:
        assert program == "mhmoe"
        home.run(*command(*words))


@pytest.mark.slow
def test_a_whole_one_ends_below_the_bigram_model(home, first):
    loss, _, bigram = losses(home.quickstart())
    assert loss < bigram


@pytest.mark.slow
def test_a_second_quickstart_works_and_leaves_a_cluster_that_it_did_not_start(home, first):
    printed = home.quickstart("train.steps=10")
    assert "finished" in printed
    assert len(list_runs(home.folder / "runs")) == 5  # the first, README's two, the whole one and this
    assert home.run(*command("cluster", "status", "--json")).strip() != "null"


def test_readme_and_makefile_name_the_same_targets():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)(?= |`|$)", readme.split("## Installing")[0]):
        assert f"\n{target}:" in makefile, target
    for folder in re.findall(r"^    ( *)(\w+)/ ", readme, re.M):
        assert (ROOT / ("mhmoe_ray" if folder[0] else "") / folder[1]).is_dir(), folder
