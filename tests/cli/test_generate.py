"""`mhmoe generate`: text from a checkpoint, in a process without a cluster."""

import subprocess

import pytest
import torch

from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.cli.generate import generate
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.engine import Sampling
from mhmoe_ray.serve.engine.sampler import Chooser
from mhmoe_ray.serve.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import assert_one_line, command, mhmoe
from tests.serve.asking import pieces


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    return folder, make_run(folder, MIXTRAL)


def test_it_says_what_the_engine_says(project):
    folder, run = project
    answerer = load_answerer(newest_checkpoint(run, ("weights",))[0], ServeSpec())
    sampling = Sampling(12, 0.9, top_p=0.8, seed=4)
    text = "".join(piece.text for piece in pieces(answerer, answerer.encode("the quick"), sampling))
    answerer.engine.close()
    options = ("--max-tokens", "12", "--temperature", "0.9", "--top-p", "0.8", "--seed", "4")
    shown = mhmoe(folder, "generate", run.id, "--prompt", "the quick", *options)
    assert (shown.code, shown.out) == (0, f"{text}\n")
    found = mhmoe(folder, "generate", "--prompt", "the quick", *options, "--json").json()
    assert (found["text"], found["tokens"], found["finish_reason"]) == (text, 12, "length")
    assert (found["run"], found["checkpoint"], found["step"]) == (run.id, "step_00000007.1", 7)


def test_a_prompt_may_come_through_a_pipe(project):
    folder, _ = project
    piped = subprocess.run(
        command("generate", "--temperature", "0", "--max-tokens", "4"),
        cwd=folder,
        input="the quick",
        capture_output=True,
        text=True,
        check=True,
    )
    given = mhmoe(folder, "generate", "--prompt", "the quick", "--temperature", "0", "--max-tokens", "4")
    assert piped.stdout == given.out


def test_mistakes_are_one_line(project):
    folder, run = project
    long = mhmoe(folder, "generate", "--prompt", "the quick brown fox " * 100)
    assert_one_line(long, ServeError.exit_code, "the prompt: it has", "shorten it")
    assert_one_line(mhmoe(folder, "generate", run.id, "--prompt", "a", "--checkpoint", "step_9.9"), 8, "step_9.9")
    nucleus = mhmoe(folder, "generate", "--prompt", "a", "--top-p", "0")
    assert (nucleus.code, "--top-p 0: nothing is left to draw from" in nucleus.err) == (2, True)


def test_a_prompt_that_is_not_utf_8_is_one_line(project):
    folder, _ = project
    told = "error: the prompt: it is not UTF-8; give it as such"
    for words, piped in ((["--prompt", b"the \xe9"], b""), ([], b"the \xe9")):
        done = subprocess.run([*command("generate"), *words], cwd=folder, input=piped, capture_output=True)
        assert (done.returncode, done.stderr.decode().splitlines()) == (ServeError.exit_code, [told])


def test_what_the_engine_trips_over_is_one_line(project, monkeypatch):
    def fail(*_):
        raise MemoryError("all of it is taken")

    folder, run = project
    monkeypatch.setattr(Chooser, "choose", fail)
    with pytest.raises(ServeError, match=r"^the engine: MemoryError: all of it is taken; try another checkpoint"):
        generate(run.id, prompt="the quick", storage=str(folder / "runs"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_gpu_that_is_not_there_is_one_line(project):
    asked = mhmoe(project[0], "generate", "--prompt", "a", "--gpus", "1")
    assert_one_line(asked, ServeError.exit_code, "--gpus 1: torch finds no GPU", "give --gpus 0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_it_says_the_same(project):
    asked = ("generate", "--prompt", "the quick", "--temperature", "0", "--max-tokens", "8")
    assert mhmoe(project[0], *asked, "--gpus", "1").out == mhmoe(project[0], *asked).out
